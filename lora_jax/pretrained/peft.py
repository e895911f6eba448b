"""Adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import LoRA
from lora_jax.pretrained import peft_config
from lora_jax.pretrained.assemble import abstract_params
from lora_jax.pretrained.load import family_of, staged, write_json
from lora_jax.pretrained.names import Names
from lora_jax.pretrained.peft_read import load_adapter

__all__ = ["load_adapter", "save_adapter"]

PREFIX = "base_model.model."


def save_adapter(
    path: str | os.PathLike[str],
    model: Any,
    method: LoRA,
    trainable: Mapping[str, Any],
    *,
    params: Any = None,
    base_sha256: str | None = None,
    base_name: str = "",
) -> None:
    """Writes a folder that PEFT's `PeftModel.from_pretrained` loads.

    Args:
      path: the folder; made if need be. Its files are replaced only by whole ones.
      model: of a family of lora_jax, whose name table gives the Hugging Face names.
      method: LoRA. Each layer is saved with its own rank: padding is left out.
      trainable: as from `method.init`: LoRA factors in PEFT's float32, whole leaves as they are.
      params: the base's parameters; needed only where a module is trained in part (PEFT saves
        modules whole), else their shapes are taken from the model.
      base_sha256: of the base's files (`lora_jax.pretrained.base_sha256`), kept in the
        safetensors header, so that a load onto another base can be refused.
      base_name: of the base, for PEFT's base_model_name_or_path.

    Raises:
      UserError: the method or the choice of biases has no form in PEFT.
    """
    if not isinstance(method, LoRA):
        raise UserError(
            f"{type(method).__name__} has no form among PEFT's LoRA files; merge it and "
            "save_pretrained"
        )
    specs = family_of(model).tensors(model.config)
    names = Names.of(specs, tied=getattr(model.config, "tied", False))
    shapes = params if params is not None else abstract_params(specs, cuts=_cuts(trainable))
    ranks, scales = method.ranks(shapes), method.scales(shapes)
    whole = {p: v for p, v in trainable.items() if p not in ranks}
    lacking = [p for p in ranks if p not in trainable]
    if lacking:
        raise UserError(f"trainable lacks {', '.join(lacking[:4])}, which the method adapts")

    tensors: dict[str, np.ndarray] = {}
    module_ranks: dict[str, int] = {}
    module_alphas: dict[str, float] = {}
    for leaf in ranks:
        _add_factors(
            names, leaf, trainable[leaf], ranks[leaf], np.atleast_1d(scales[leaf]),
            method.scaling == "rslora", tensors, module_ranks, module_alphas,
        )  # fmt: skip
    bias, to_save = _add_whole(names, whole, params, set(module_ranks), tensors)
    tied = names.tied and names.tied_embedding in {*module_ranks, *to_save}
    if tied:
        _add_tied_head(names, tensors)
    config = peft_config.make_config(
        ranks=module_ranks, alphas=module_alphas, every_module=names.modules,
        modules_to_save=peft_config.short_names(to_save, names.modules), bias=bias,
        rslora=method.scaling == "rslora", dropout=method.dropout, start=method.start, tied=tied,
        base_name=base_name,
    )  # fmt: skip
    metadata = {"format": "pt"}
    if base_sha256:
        metadata["lora_jax.base_sha256"] = base_sha256
    with staged(Path(path)) as stage:
        save_file(tensors, stage / "adapter_model.safetensors", metadata=metadata)
        write_json(stage / "adapter_config.json", config)


def _cuts(trainable: Mapping[str, Any]) -> set[int]:
    """Where the stacks of the trained model are cut in segments."""
    ranges = [r for r in map(partition.stack_of, trainable) if r is not None]
    return {edge for r in ranges for edge in r}


def _host(value: Any) -> np.ndarray:
    return np.asarray(jax.device_get(value))


def _add_factors(
    names: Names,
    leaf: str,
    factors: Mapping[str, Any],
    ranks: list[int],
    scales: np.ndarray,
    rslora: bool,
    tensors: dict[str, np.ndarray],
    module_ranks: dict[str, int],
    module_alphas: dict[str, float],
) -> None:
    """Adds the factors of every layer of one leaf, each cut to its own rank."""
    a, b = _host(factors["a"]), _host(factors["b"])
    if partition.stack_of(leaf) is None:
        a, b = a[None], b[None]
    for at, ours in enumerate(partition.expand(leaf)):
        rank = ranks[at]
        if not rank:
            continue
        module = _hf_name(names, ours).rpartition(".")[0]
        # PEFT computes x·Aᵀ·Bᵀ with A (r, in) and B (out, r); an embedding's A is (r, vocabulary).
        a_t = np.ascontiguousarray(a[at][:, :rank].T)
        b_t = np.ascontiguousarray(b[at][:rank].T)
        if module in names.embeddings:
            tensors[f"{PREFIX}{module}.lora_embedding_A"] = a_t
            tensors[f"{PREFIX}{module}.lora_embedding_B"] = b_t
        else:
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a_t
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b_t
        module_ranks[module] = rank
        # Seven digits are what float32 scales carry: 15.9999995 was 16.
        alpha = float(f"{float(scales[at]) * (rank**0.5 if rslora else rank):.7g}")
        module_alphas[module] = int(alpha) if alpha == int(alpha) else alpha


def _hf_name(names: Names, ours: str) -> str:
    if ours not in names.theirs:
        raise UserError(f"{ours!r} has no Hugging Face name in this model's family")
    return names.theirs[ours]


def _add_whole(
    names: Names,
    whole: Mapping[str, Any],
    params: Any,
    adapted: set[str],
    tensors: dict[str, np.ndarray],
) -> tuple[str, list[str]]:
    """Adds leaves trained whole; returns PEFT's (bias, modules_to_save).

    PEFT trains whole modules, or the biases of all modules or of all adapted ones; a bias of an
    adapted module lies under its base_layer.
    """
    trained: dict[str, np.ndarray] = {}
    for leaf, value in whole.items():
        array = _host(value)
        stacked = partition.stack_of(leaf) is not None
        for at, ours in enumerate(partition.expand(leaf)):
            trained[_hf_name(names, ours)] = array[at] if stacked else array
    to_save = [m for m in names.modules if f"{m}.weight" in trained]
    alone = {t.rpartition(".")[0] for t in trained if t.endswith(".bias")} - set(to_save)
    biased = {m for m, leaves in names.modules.items() if "bias" in leaves}
    if not alone:
        bias = "none"
    elif alone == biased - set(to_save):
        bias = "all"
    elif alone == biased & adapted:
        bias = "lora_only"
    elif not alone & adapted:
        bias = "none"
        to_save += sorted(alone)
    else:
        raise UserError(
            "PEFT saves the biases of all modules or of all adapted modules; this adapter trains "
            f"those of {', '.join(sorted(alone)[:4])}, … only. Train one of these sets, or merge "
            "and save_pretrained"
        )
    for module in to_save:
        for last in names.modules[module]:
            tensor = f"{module}.{last}"
            value = trained[tensor] if tensor in trained else _base(names, tensor, params)
            tensors[PREFIX + tensor] = _their_layout(names, tensor, value)
    for module in alone - set(to_save):
        inner = ".base_layer" if module in adapted else ""
        tensors[f"{PREFIX}{module}{inner}.bias"] = trained[f"{module}.bias"]
    return bias, to_save


def _base(names: Names, tensor: str, params: Any) -> np.ndarray:
    """An untrained leaf of a module that PEFT saves whole."""
    if params is None:
        raise UserError(
            f"{tensor} is not trained, but PEFT saves its module whole: give save_adapter params="
        )
    ours = names.ours[tensor]
    for path, leaf in partition.flatten(params).items():
        if ours in (layers := partition.expand(path)):
            array = _host(leaf)
            return array[layers.index(ours)] if partition.stack_of(path) else array
    raise UserError(f"the parameters lack {ours!r}")


def _their_layout(names: Names, tensor: str, value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value.T if names.transposed[tensor] else value)


def _add_tied_head(names: Names, tensors: dict[str, np.ndarray]) -> None:
    """A tied head changes with the embedding here; PEFT wants the head's share spelled out."""
    stem = f"{PREFIX}{names.tied_embedding}"
    if f"{stem}.weight" in tensors:
        tensors[f"{PREFIX}lm_head.weight"] = tensors[f"{stem}.weight"].copy()
        return
    a, b = tensors[f"{stem}.lora_embedding_A"], tensors[f"{stem}.lora_embedding_B"]
    tensors[f"{PREFIX}lm_head.lora_A.weight"] = np.ascontiguousarray(b.T)
    tensors[f"{PREFIX}lm_head.lora_B.weight"] = np.ascontiguousarray(a.T)
