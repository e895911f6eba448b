"""Reads an adapter in PEFT's format as a LoRA method and its trainable tree."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax import partition
from lora_jax.errors import UserError, nearest
from lora_jax.methods import LoRA
from lora_jax.pretrained import hub, peft_config
from lora_jax.pretrained.folder import read_json
from lora_jax.pretrained.load import family_of
from lora_jax.pretrained.names import Names, module_paths, regexes, rules

_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")


@dataclasses.dataclass
class _Stored:
    """The tensors of an adapter by Hugging Face name: factors as PEFT holds them, whole ones."""

    factors: dict[str, dict[str, np.ndarray]]  # module -> {"A": (r, in), "B": (out, r)}
    whole: dict[str, np.ndarray]  # tensor -> value


def load_adapter(
    path: str | os.PathLike[str],
    model: Any,
    params: Any,
    *,
    base_sha256: str | None = None,
    force: bool = False,
) -> tuple[LoRA, dict[str, Any]]:
    """(method, trainable) of an adapter that PEFT or `save_adapter` wrote.

    PEFT's rank_pattern, alpha_pattern, layers_to_transform and modules_to_save become rules of
    the method; unequal ranks become one factor a stack, padded with zeros.

    Args:
      path: its folder, or a name on the Hugging Face hub.
      model, params: the base; `params` may be any segments of the layers, arrays or shapes.
      base_sha256: of the base at hand; refused where the adapter was saved with another one.
      force: load it all the same.

    Raises:
      UserError: another base, an option that is not implemented, or tensors that do not fit.
    """
    folder = Path(path) if Path(path).is_dir() else hub.resolve(path)
    config = read_json(folder / "adapter_config.json")
    where = str(folder / "adapter_config.json")
    peft_config.check_supported(config, where)
    specs = family_of(model).tensors(model.config)
    names = Names.of(specs, tied=getattr(model.config, "tied", False))
    tensors, metadata = _read(folder)
    _check_base(folder, metadata.get("lora_jax.base_sha256"), base_sha256, force)
    stored = _sort(tensors, names, folder)
    _check_tied(config, stored, names, folder)
    _check_complete(config, stored, names, folder)
    method = _method(config, stored, names)
    return method, _trainable(method, stored, names, params)


def _read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"{folder} holds only adapter_model.bin, which is not read because a pickle can "
                "run code; load it with PEFT and save_pretrained it again"
            )
        raise UserError(f"{file} does not exist")
    try:
        with safe_open(file, framework="numpy") as handle:
            keys = handle.keys()
            return {n: handle.get_tensor(n) for n in keys}, handle.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from None


def _check_base(folder: Path, saved: str | None, here: str | None, force: bool) -> None:
    if saved and here and saved != here and not force:
        raise UserError(
            f"{folder} was trained on a base whose files have SHA-256 {saved[:16]}…, this base's "
            f"have {here[:16]}…; load that base, or pass force=True if the weights are equal"
        )


def _sort(tensors: Mapping[str, np.ndarray], names: Names, folder: Path) -> _Stored:
    """Factors and whole tensors by name; UserError that lists all that do not belong."""
    stored = _Stored({}, {})
    modules, odd = names.modules, []
    for key, value in tensors.items():
        name = key.removeprefix("base_model.model.")
        if match := _FACTOR.fullmatch(name):
            module, embedding, letter = match.groups()
            known = module in modules or (module == "lm_head" and names.tied)
            if known and bool(embedding) == (module in names.embeddings):
                stored.factors.setdefault(module, {})[letter] = value
                continue
            odd.append(f"{key} ({nearest(module, modules)})")
            continue
        if name.endswith(".base_layer.weight"):
            continue  # PEFT's copy of an adapted embedding's frozen weight
        name = name.replace(".base_layer.", ".")
        tied_head = name == "lm_head.weight" and names.tied
        if name in names.ours and value.shape != names.shapes[name]:
            odd.append(f"{key} is {list(value.shape)}, the model's is {list(names.shapes[name])}")
        elif name in names.ours or tied_head:
            stored.whole[name] = value
        else:
            odd.append(f"{key} ({nearest(name, names.ours)})")
    for module, pair in stored.factors.items():
        if set(pair) != {"A", "B"}:
            odd.append(f"{module} has only lora_{''.join(pair)}")
    if odd:
        raise UserError(
            f"{folder} does not fit this model: {'; '.join(odd[:6])}"
            + (f"; and {len(odd) - 6} more" if len(odd) > 6 else "")
        )
    return stored


def _check_tied(config: Mapping[str, Any], stored: _Stored, names: Names, folder: Path) -> None:
    """Drops the head's share of a tied embedding; UserError where the two are not one."""
    if not names.tied:
        return
    embedding = names.tied_embedding
    head_ab, head = stored.factors.pop("lm_head", None), stored.whole.pop("lm_head.weight", None)
    ab, whole = stored.factors.get(embedding), stored.whole.get(f"{embedding}.weight")
    if head_ab is None and head is None and ab is None and whole is None:
        return
    equal = False
    if head_ab is not None and ab is not None:
        equal = np.array_equal(head_ab["A"], ab["B"].T) and np.array_equal(head_ab["B"], ab["A"].T)
    elif head is not None and whole is not None:
        equal = np.array_equal(head, whole)
    if not (equal and config.get("ensure_weight_tying")):
        raise UserError(
            f"{folder} changes the embedding and the head differently, but in this model the head "
            "is the embedding. In PEFT train both with ensure_weight_tying=True, or load a base "
            "whose config.json says tie_word_embeddings: false and whose file holds lm_head.weight"
        )


def _check_complete(config: Mapping[str, Any], stored: _Stored, names: Names, folder: Path) -> None:
    """UserError for modules that the config names and the file lacks, or the other way round."""
    problems = []
    candidates = names.linear | names.embeddings
    for module in names.modules:
        wanted = module in candidates and peft_config.is_targeted(
            config, module, names.linear, names.head
        )
        if wanted and module not in stored.factors:
            problems.append(f"no factors for {module}")
        elif module in stored.factors and not wanted:
            problems.append(f"factors for {module}, which the config does not target")
        elif module in stored.factors:
            problems += _misfits(config, module, stored.factors[module], names)
    for kept in config.get("modules_to_save") or ():
        for module, leaves in names.modules.items():
            if module == kept or module.endswith(f".{kept}"):
                problems += [
                    f"no tensor {module}.{x}" for x in leaves if f"{module}.{x}" not in stored.whole
                ]
    if problems:
        raise UserError(
            f"{folder}: adapter_config.json and adapter_model.safetensors disagree: "
            f"{'; '.join(problems[:6])}"
            + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        )


def _misfits(
    config: Mapping[str, Any], module: str, pair: Mapping[str, np.ndarray], names: Names
) -> list[str]:
    rank = peft_config.lookup(config.get("rank_pattern"), module, config.get("r", 8))
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        return [f"{module} should have rank {rank}, has A {a.shape} and B {b.shape}"]
    d_in, d_out = names.sizes[module]
    if (a.shape[1], b.shape[0]) != (d_in, d_out):
        return [f"{module} maps {d_in} to {d_out}, its factors {a.shape[1]} to {b.shape[0]}"]
    return []


def _method(config: Mapping[str, Any], stored: _Stored, names: Names) -> LoRA:
    """The LoRA whose rules say what rank_pattern, alpha_pattern and the rest say."""
    every_leaf = list(names.theirs)
    every = module_paths(every_leaf)
    ranks, alphas = {}, {}
    for module, pair in stored.factors.items():
        ours = partition.module(names.ours[f"{module}.weight"])
        ranks[ours] = int(pair["A"].shape[0])
        alphas[ours] = peft_config.lookup(
            config.get("alpha_pattern"), module, config.get("lora_alpha", 8)
        )
    whole = [names.ours[t] for t in stored.whole]
    return LoRA(
        rank=rules(ranks, every),
        alpha=rules(alphas, every),
        targets=tuple(regexes(ranks, every)),
        scaling="rslora" if config.get("use_rslora") else "standard",
        dropout=float(config.get("lora_dropout") or 0.0),
        start="gaussian" if config.get("init_lora_weights") == "gaussian" else "uniform",
        train=tuple(regexes(whole, every_leaf)),
    )


def _trainable(method: LoRA, stored: _Stored, names: Names, params: Any) -> dict[str, Any]:
    """Fills what `method.init` would make: its paths, its padding, its dtypes."""
    like = jax.eval_shape(method.init, jax.random.key(0), params)
    trainable: dict[str, Any] = {}
    # `eval_shape` sorts the paths; put them in the order `init` has: factors, then whole leaves.
    ranks = method.ranks(params)
    whole = [p for p in partition.flatten(params) if p in like and p not in ranks]
    for path in [*ranks, *whole]:
        shape = like[path]
        stacked = partition.stack_of(path) is not None
        layers = partition.expand(path)
        if not isinstance(shape, Mapping):
            arrays = []
            for ours in layers:
                tensor = names.theirs[ours]
                value = stored.whole[tensor]
                arrays.append(value.T if names.transposed[tensor] else value)
            value = np.stack(arrays) if stacked else arrays[0]
            trainable[path] = jnp.asarray(value, shape.dtype)
            continue
        a = np.zeros(shape["a"].shape, np.float32)
        b = np.zeros(shape["b"].shape, np.float32)
        for at, ours in enumerate(layers):
            pair = stored.factors.get(names.theirs[ours].rpartition(".")[0])
            if pair is None:
                continue
            a_l, b_l = (a[at], b[at]) if stacked else (a, b)
            a_l[:, : pair["A"].shape[0]] = pair["A"].T
            b_l[: pair["B"].shape[1]] = pair["B"].T
        trainable[path] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    return trainable
