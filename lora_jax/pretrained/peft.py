"""Adapter folders: adapter_config.json and adapter_model.safetensors, in PEFT's form or our own."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import METHODS, Method
from lora_jax.methods.peft import PREFIX, AdapterFiles, NoPeftForm, fused, prompts
from lora_jax.methods.peft.targets import CLASSIFIERS
from lora_jax.models import FAMILIES, TensorSpec
from lora_jax.pretrained import hub, method_json, own_form, provenance
from lora_jax.pretrained.assemble import abstract_params
from lora_jax.pretrained.folder import read_json
from lora_jax.pretrained.load import family_of
from lora_jax.pretrained.names import Names
from lora_jax.pretrained.staging import (
    is_there,
    read_whole,
    staged,
    write_sorted_json,
    write_tensors,
)

__all__ = ["load_adapter", "save_adapter"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_METHOD = "lora_jax.method"
_CONFIG_SHA256 = "lora_jax.config_sha256"
_TASKS = {
    "lm": "CAUSAL_LM", "classification": "SEQ_CLS", "regression": "SEQ_CLS",
    "pooling": "FEATURE_EXTRACTION", None: "FEATURE_EXTRACTION",
}  # fmt: skip


def save_adapter(
    path: str | os.PathLike[str],
    model: Any,
    method: Method,
    trainable: Mapping[str, Any],
    *,
    params: Any = None,
    base_sha256: str | None = None,
    base_name: str | None = None,
) -> None:
    """Writes an adapter folder; `load_adapter` gives back exactly this method and tree.

    Where PEFT has the method, its `PeftModel.from_pretrained` loads the folder too. Else, or
    where it is used in a way that PEFT has no form for (a warning says so), the folder is in a
    form of our own. A folder that is there is replaced as a whole, and only once the new one is
    complete; other files in it are kept.

    Args:
      path: the folder; made if need be.
      model: of a family of lora_jax, whose name table gives the Hugging Face names. Any other
        model's adapter is saved in our own form.
      method: whose class is registered.
      trainable: as from `method.init`. PEFT's form holds LoRA's factors without their padding.
      params: the base's parameters; needed only for PEFT's form where a module is trained in
        part (PEFT saves modules whole), else their shapes are taken from the model.
      base_sha256, base_name: of the base, kept in the safetensors header, so that a load onto
        another base can be refused, and as base_model_name_or_path. By default those of the
        files that `load_pretrained` read; say them where it did not.

    Raises:
      UserError: the disk is full, or the method cannot be described.
    """
    metadata = {_METHOD: method_json.to_json(method)}
    if sha := base_sha256 or provenance.model_sha256(model):
        metadata[provenance.KEY] = sha
    config: dict[str, Any] = {
        "task_type": _task_type(model),
        "base_model_name_or_path": provenance.base_name(model) if base_name is None else base_name,
        "inference_mode": True,
    }
    try:
        files = _to_peft(model, method, trainable, params)
    except NoPeftForm as reason:
        if method.peft_entries and not _only_here(model):
            warnings.warn(
                f"{path} is in lora_jax's own form, which PEFT does not read: {reason}",
                stacklevel=2,
            )
        tensors, metadata[own_form.KEY] = own_form.tensors_of(trainable)
        content = {"peft_type": own_form.PEFT_TYPE, "method": method.name, "reason": str(reason)}
        files = AdapterFiles(content, tensors)
    config |= files.config
    metadata[_CONFIG_SHA256] = _digest(config)
    with staged(Path(path)) as stage:
        write_tensors(stage / TENSORS, files.tensors, metadata)
        write_sorted_json(stage / CONFIG, config)


def _to_peft(model: Any, method: Method, trainable: Mapping[str, Any], params: Any) -> AdapterFiles:
    if method.peft_entries and type(model) not in {f.module for f in FAMILIES.values()}:
        raise NoPeftForm(f"the Hugging Face names of a {type(model).__name__} are unknown")
    if not method.peft_entries:
        raise NoPeftForm(f"PEFT has no method {method.name!r}")
    if _only_here(model):
        raise NoPeftForm(f"transformers has no {type(model).__name__}")
    if params is None:
        ranges = [r for r in map(partition.stack_of, trainable) if r is not None]
        cuts = {edge for r in ranges for edge in r}
        params = abstract_params(family_of(model).tensors(model.config), cuts=cuts)
    return method.to_peft(dict(trainable), _names(model), params)


def _only_here(model: Any) -> bool:
    """Whether the model is of a family of ours that transformers lacks (networks of images): their
    files have our names, and there is nothing that PEFT could put an adapter on."""
    if type(model) not in {f.module for f in FAMILIES.values()}:
        return False
    return not any(x.name.endswith(".weight") for x in family_of(model).tensors(model.config))


def _names(model: Any) -> Names:
    """The model's names as PEFT sees them: those of the transformers class with this head."""
    family, config = family_of(model), model.config
    specs, head = family.tensors(config), getattr(config, "head", "lm")
    if head in (None, "pooling"):  # transformers' bare model has no prefix
        prefix = family.prefix(config)
        specs = [dataclasses.replace(s, name=s.name.removeprefix(prefix)) for s in specs]
    return Names.of([_part(s) for s in specs], tied=head == "lm" and getattr(config, "tied", False))


def _part(spec: TensorSpec) -> TensorSpec:
    """A part of a fused tensor as a tensor of its own, in the module `fused.part_name`."""
    if spec.part is None:
        return spec
    module, _, last = spec.name.rpartition(".")
    # Parts lie along our last axis, which is Hugging Face's first where we transpose.
    theirs = spec.our_shape[::-1] if spec.op == "transpose" else spec.our_shape
    return dataclasses.replace(
        spec, name=f"{fused.part_name(module, spec.part[0])}.{last}", shape=theirs, part=None
    )


def _task_type(model: Any) -> str | None:
    config = getattr(model, "config", None)
    return _TASKS.get(getattr(config, "head", "lm")) if config is not None else None


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def load_adapter(
    path: str | os.PathLike[str],
    model: Any,
    params: Any,
    *,
    base_sha256: str | None = None,
    force: bool = False,
    head: bool = True,
) -> tuple[Any, dict[str, Any]]:
    """(method, trainable) of an adapter that PEFT or `save_adapter` wrote.

    The method is exactly the saved one; of PEFT's own files, and where adapter_config.json was
    edited since, it is what the config says: PEFT's rank_pattern, alpha_pattern,
    layers_to_transform and modules_to_save become rules of the method, and unequal ranks one
    factor a stack, padded with zeros.

    Args:
      path: its folder, or a name on the Hugging Face hub.
      model, params: the base; `params` may be arrays or shapes and, for a method that PEFT has,
        any segments of the layers.
      base_sha256: of the base at hand, by default of the files that `load_pretrained` read;
        refused where the adapter was saved with another one.
      force: load it all the same.
      head: False leaves out what PEFT's form holds of a classification head, of whatever size:
        a start for another task.

    Raises:
      UserError: another base, an option that is not implemented, or tensors that do not fit.
    """
    folder, files, metadata = _read(path)
    if provenance.KEY in metadata and not force:
        here = base_sha256 or provenance.model_sha256(model)
        provenance.check(folder, metadata, here)
    method = _saved_method(files, metadata)
    if _is_ours(files):
        if method is None:
            raise UserError(f"{files.where}: the header of {TENSORS} lacks {_METHOD}")
        tree = metadata.get(own_form.KEY)
        return method, own_form.read(files.tensors, tree, params, files.where)
    if not head:
        files, method = _without_head(files), None
    reader = _reader(files) if method is None else type(method)
    return reader.from_peft(files, _names(model), params, method)


def arranged(path: str | os.PathLike[str], model: Any, params: Any) -> Any:
    """`params` with their layers cut as the adapter in `path` needs them, for `load_adapter`.

    As its method arranges a base (`Method.arrange`), where the stacks of a saved tree begin and
    end, and around layers of which a module was trained whole.

    Args:
      path, model, params: see `load_adapter`.

    Raises:
      UserError: no adapter there, a damaged one, or layers too few for its method.
    """
    _, files, metadata = _read(path)
    method = _saved_method(files, metadata)
    params = params if method is None else method.arrange(params)
    if _is_ours(files):
        cuts = own_form.edges(metadata.get(own_form.KEY), files.where)
    else:
        cuts = _edges_of_whole(files, _names(model), params)
    return partition.split_stacks(params, cuts)


def _edges_of_whole(files: AdapterFiles, names: Names, params: Any) -> dict[str, list[int]]:
    """By the name of a stack: between which layers the modules that PEFT saved whole change."""
    tensors = [
        re.sub(r"\.(modules_to_save|base_layer)\.", ".", name).removeprefix(PREFIX)
        for form in (files.tensors, prompts.wrapped(files.tensors))
        for name in fused.split(form, names)
        if not name.endswith(".base_layer.weight")  # a copy of a frozen one
    ]
    whole = {names.ours[name] for name in tensors if name in names.ours}
    found: dict[str, list[int]] = {}
    for path in partition.flatten(params):
        if (span := partition.stack_of(path)) is not None:
            held = [layer in whole for layer in partition.expand(path)]
            changes = (i for i, (a, b) in enumerate(itertools.pairwise(held), 1) if a != b)
            found.setdefault(partition.stack_name(path), []).extend(span[0] + i for i in changes)
    return found


def _read(path: str | os.PathLike[str]) -> tuple[Path, AdapterFiles, dict[str, str]]:
    """(folder, files, the header's metadata) of a folder, or of a name on the hub."""
    folder = Path(path) if is_there(Path(path)) else hub.resolve(path)
    return folder, *read_whole(folder, read_files)


def _is_ours(files: AdapterFiles) -> bool:
    return files.config.get("peft_type") == own_form.PEFT_TYPE


def _saved_method(files: AdapterFiles, metadata: Mapping[str, str]) -> Method | None:
    """The method that was saved; None in PEFT's own files, and where its config was edited."""
    if _METHOD not in metadata:
        return None
    if not _is_ours(files) and metadata.get(_CONFIG_SHA256) != _digest(files.config):
        return None
    return method_json.from_json(metadata[_METHOD], files.where)


def _without_head(files: AdapterFiles) -> AdapterFiles:
    kept = [m for m in files.config.get("modules_to_save") or () if m not in CLASSIFIERS]
    return dataclasses.replace(
        files,
        config={**files.config, "modules_to_save": kept or None, "task_type": None},
        tensors={n: x for n, x in files.tensors.items() if not CLASSIFIERS & set(n.split("."))},
    )


def _reader(files: AdapterFiles) -> type[Method]:
    """The method whose entries fit adapter_config.json best."""
    fits = [
        cls
        for cls in METHODS.values()
        if cls.peft_entries and all(files.config.get(k) == v for k, v in cls.peft_entries.items())
    ]
    if not fits:
        known = sorted(
            {str(c.peft_entries["peft_type"]) for c in METHODS.values() if c.peft_entries}
        )
        raise UserError(
            f"{files.where}: peft_type is {files.config.get('peft_type')!r}; only "
            f"{', '.join(known)} is read"
        )
    return max(fits, key=lambda cls: len(cls.peft_entries))


def read_files(folder: Path) -> tuple[AdapterFiles, dict[str, str]]:
    """(an adapter's two files, the header's metadata), whatever form it is in."""
    config, file = read_json(folder / CONFIG), folder / TENSORS
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"{folder} holds only adapter_model.bin, which is not read because a pickle can "
                "run code; load it with PEFT and save_pretrained it again"
            )
        raise UserError(f"{file} does not exist")
    try:
        with safe_open(file, framework="numpy") as handle:
            tensors = {n: handle.get_tensor(n) for n in handle.keys()}  # noqa: SIM118
            metadata = handle.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from None
    return AdapterFiles(config, tensors, str(folder)), metadata
