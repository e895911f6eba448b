"""PEFT's files of methods that keep a few arrays for each module: VeRA, IA3, LoHa, LoKr, AdaLoRA.

Such an array is called a part here, by the end of its tensor's name (`vera_lambda_d`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError, nearest
from lora_jax.methods.peft import fused, targets
from lora_jax.methods.peft.patterns import module_paths, regexes
from lora_jax.methods.peft.protocol import (
    PREFIX,
    AdapterFiles,
    ModelNames,
    NoPeftForm,
    hf_module,
    refuse,
)
from lora_jax.methods.peft.whole import add_whole, host

Parts = Mapping[str, Mapping[str, Any]]


def write(
    names: ModelNames,
    parts: Parts,
    live: Mapping[str, Sequence[Any]],
    whole: Mapping[str, Any],
    params: Any,
    config: Mapping[str, Any],
    gain: str = "",
) -> AdapterFiles:
    """The files of parts that are already as PEFT has them, but for the layer axis.

    Args:
      parts: {part: its array in each layer} by leaf path; see `layers_of`.
      live: by leaf path and layer, whether the method adapts it.
      whole: leaves trained whole, by path.
      params: the base, or its shapes where no module is trained in part.
      config: the entries of adapter_config.json that only the method knows.
      gain: a part that multiplies outputs, [out, 1], which a fused module has of all its parts.

    Raises:
      NoPeftForm: a module has no Hugging Face name, or is part of a fused one, or biases are
        trained apart from their modules.
    """
    tensors: dict[str, np.ndarray] = {}
    adapted: set[str] = set()
    for leaf, arrays in parts.items():
        for at, (ours, on) in enumerate(zip(partition.expand(leaf), live[leaf], strict=True)):
            module = hf_module(names, ours)
            if not on:
                continue
            if fused.plain(module) != module and not gain:
                raise NoPeftForm(f"{fused.plain(module)} is one module in PEFT, several here")
            adapted.add(module)
            for part, values in arrays.items():
                tensors[f"{PREFIX}{module}.{part}"] = np.ascontiguousarray(values[at])
    tensors, plain = fused.join_gains(tensors, names, gain), {fused.plain(m) for m in adapted}
    adapted = {m for m in names.modules if fused.plain(m) in plain}
    bias, to_save = add_whole(names, whole, params, adapted, tensors)
    if bias != "none":
        raise NoPeftForm("biases trained apart from their modules are written for LoRA alone")
    every = targets.with_parents(names.modules)
    found = {
        "target_modules": targets.short_names(plain, every),
        "modules_to_save": targets.short_names(to_save, every) or None,
        **config,
    }
    if targets.CLASSIFIERS & ({targets.unit(m) for m in names.modules} - set(to_save)):
        found["task_type"] = None  # for SEQ_CLS, PEFT wants the head whole in the file
    return AdapterFiles(found, fused.join_whole(tensors))


def layers_of(leaf: str, value: Any) -> np.ndarray:
    """A leaf's array with a layer axis, of one layer outside of stacks."""
    return host(value) if partition.stack_of(leaf) is not None else host(value)[None]


@dataclasses.dataclass
class Stored:
    """What a file holds.

    Attributes:
      parts: {part: array}, as PEFT has them, by our expanded leaf path.
      whole: modules trained whole: our leaves' values by expanded leaf path.
      targets, train: regexes that say the same, for a method's fields.
    """

    parts: dict[str, dict[str, np.ndarray]]
    whole: dict[str, np.ndarray]
    targets: tuple[str, ...]
    train: tuple[str, ...]


def read(
    files: AdapterFiles,
    names: ModelNames,
    wanted: Collection[str],
    *,
    known: Collection[str],
    shared: Collection[str] = (),
) -> Stored:
    """The parts and whole modules of a file.

    Args:
      wanted: the parts that the method knows.
      known: entries of adapter_config.json that the method understands; others must be empty.
      shared: tensors that are not of a module; left to the caller.

    Raises:
      UserError: an option that is not implemented, or a tensor that does not belong or is missing.
    """
    _check_options(files, known)
    stored = Stored({}, {}, (), ())
    odd: list[str] = []
    joint = fused.parts(names.modules)
    for key, value in fused.split(files.tensors, names).items():
        name = key.removeprefix(PREFIX)
        module, _, part = name.rpartition(".")
        if key in shared or name.endswith(".base_layer.weight") or ".original_module." in name:
            continue
        name = name.replace(".modules_to_save.", ".")
        if part in wanted and f"{module}.weight" in names.ours:
            stored.parts.setdefault(names.ours[f"{module}.weight"], {})[part] = value
        elif name in names.ours and value.shape == names.shapes[name]:
            stored.whole[names.ours[name]] = value.T if names.transposed[name] else value
        elif module in joint:
            odd.append(f"{key}: the module is {len(joint[module])} here, and {part} is of all")
        else:
            odd.append(f"{key} {list(value.shape)} ({nearest(name, names.ours)})")
    for module in names.linear | names.embeddings:
        ours = names.ours[f"{module}.weight"]
        named = targets.is_targeted(files.config, module, names.linear, names.head)
        if named != (ours in stored.parts):
            odd.append(f"{module} is {'' if named else 'not '}in target_modules, "
                       f"and {'not ' if named else ''}in the file")  # fmt: skip
    odd += [
        f"{name}, of modules_to_save, is not in the file"
        for module, leaves in names.modules.items()
        for leaf in leaves
        if targets.is_kept(files.config, module)
        and names.ours[name := f"{module}.{leaf}"] not in stored.whole
    ]
    refuse(odd, f"{files.where} does not fit this model")
    leaves = list(names.theirs)
    modules = module_paths(stored.parts)
    stored.targets = tuple(regexes(modules, module_paths(leaves)))
    stored.train = tuple(regexes(stored.whole, leaves))
    return stored


_PLAIN = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type",
    "peft_version", "revision", "target_modules", "task_type",
}  # fmt: skip


def _check_options(files: AdapterFiles, known: Collection[str]) -> None:
    odd = [
        f"{k}={v!r}"
        for k, v in sorted(files.config.items())
        if v and k not in _PLAIN and k not in known and v != "none"
    ]
    if odd:
        raise UserError(
            f"{files.where} uses options that are not implemented here: {'; '.join(odd)}. Merge "
            "the adapter with PEFT (merge_and_unload, save_pretrained) and load the merged model"
        )


def gather(stored: Stored, leaf: str, part: str, like: Any, where: str) -> jnp.ndarray:
    """A part of all layers of a leaf as one array shaped `like`, zeros where a layer has none."""
    stacked = partition.stack_of(leaf) is not None
    size, rows = tuple(like.shape[stacked:]), []
    for ours in partition.expand(leaf):
        value = stored.parts.get(ours, {}).get(part)
        if value is None and ours in stored.parts:
            raise UserError(f"{where}: {ours} has no {part}")
        value = np.zeros(size, np.float32) if value is None else value
        if value.size > np.prod(size) or value.ndim != len(size):
            raise UserError(f"{where}: {part} of {ours} is {list(value.shape)}, not {list(size)}")
        pads = [(0, n - m) for n, m in zip(size, value.shape, strict=True)]
        rows.append(np.pad(value, pads))
    return jnp.asarray(np.stack(rows) if stacked else rows[0], like.dtype)


def fill(
    stored: Stored, like: Mapping[str, Any], names: Mapping[str, str], where: str
) -> dict[str, Any]:
    """What the file holds as a trainable tree.

    Args:
      stored: parts turned as ours are.
      like: the tree's shapes; what is adapted is a dict.
      names: of the parts, by our names in these.
    """
    return {
        leaf: {k: gather(stored, leaf, names[k], x, where) for k, x in wanted.items()}
        if isinstance(wanted, Mapping)
        else whole_of(stored, leaf, wanted)
        for leaf, wanted in like.items()
    }


def whole_of(stored: Stored, leaf: str, like: Any) -> jnp.ndarray:
    """A leaf trained whole, of all its layers."""
    values = [stored.whole[ours] for ours in partition.expand(leaf)]
    stacked = partition.stack_of(leaf) is not None
    return jnp.asarray(np.stack(values) if stacked else values[0], like.dtype)
