"""Leaves trained whole beside an adapter: PEFT's modules_to_save, and its choice of biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods.peft.protocol import PREFIX, ModelNames, NoPeftForm, hf_name
from lora_jax.methods.peft.targets import CLASSIFIERS, unit
from lora_jax.tensors.base import densify


def host(value: Any) -> np.ndarray:
    """The array, or what a weight stands for, as NumPy's."""
    return np.asarray(jax.device_get(densify(value)))


def add_whole(
    names: ModelNames,
    whole: Mapping[str, Any],
    params: Any,
    adapted: set[str],
    tensors: dict[str, np.ndarray],
) -> tuple[str, list[str]]:
    """Adds leaves trained whole to `tensors`; returns PEFT's (bias, modules_to_save).

    PEFT trains whole modules, or the biases of all modules or of all adapted ones; a bias of an
    adapted module lies under its base_layer.

    Args:
      whole: the leaves, by stack path.
      params: the base: arrays, or shapes where no module is trained in part.
      adapted: Hugging Face modules that the adapter changes otherwise.

    Raises:
      NoPeftForm: the biases are neither of these sets.
      UserError: a module is trained in part, and `params` are only shapes.
    """
    trained = _per_tensor(names, whole)
    units = {m: unit(m) for m in names.modules}
    keeps = {
        units[m]
        for m, leaves in names.modules.items()
        for x in leaves
        if f"{m}.{x}" in trained and (x != "bias" or units[m] in CLASSIFIERS)
    }
    bias, more = _bias(names, trained, adapted, keeps)
    to_save = [u for u in dict.fromkeys(units.values()) if u in keeps | more]
    for module in [m for m in names.modules if units[m] in to_save]:
        if module in adapted:
            raise NoPeftForm(f"{module} is both adapted and trained whole, at least in part")
        for last in names.modules[module]:
            tensor = f"{module}.{last}"
            value = trained.pop(tensor) if tensor in trained else _base(names, tensor, params)
            turned = value.T if names.transposed[tensor] else value
            tensors[PREFIX + tensor] = np.ascontiguousarray(turned)
    for tensor, value in trained.items():
        module = tensor.rpartition(".")[0]
        tensors[f"{PREFIX}{module}{'.base_layer' * (module in adapted)}.bias"] = value
    return bias, to_save


def _per_tensor(names: ModelNames, whole: Mapping[str, Any]) -> dict[str, np.ndarray]:
    found = {}
    for leaf, value in whole.items():
        array = host(value)
        stacked = partition.stack_of(leaf) is not None
        for at, ours in enumerate(partition.expand(leaf)):
            found[hf_name(names, ours)] = array[at] if stacked else array
    return found


def _bias(
    names: ModelNames, trained: Mapping[str, Any], adapted: set[str], keeps: set[str]
) -> tuple[str, set[str]]:
    """PEFT's `bias`, and the modules to save only because their bias is trained."""
    alone = {m for t in trained if (m := t.rpartition(".")[0]) and unit(m) not in keeps}
    biased = {m for m, x in names.modules.items() if "bias" in x and unit(m) not in CLASSIFIERS}
    if not alone:
        return "none", set()
    if alone == biased - keeps:
        return "all", set()
    if alone == biased & adapted:
        return "lora_only", set()
    if not alone & adapted:
        return "none", alone
    raise NoPeftForm(
        "PEFT saves the biases of all modules or of all adapted modules; this adapter trains "
        f"those of {', '.join(sorted(alone)[:4])}, … only"
    )


def _base(names: ModelNames, tensor: str, params: Any) -> np.ndarray:
    """An untrained leaf of a module that PEFT saves whole."""
    ours = names.ours[tensor]
    for path, leaf in partition.flatten(params).items():
        if ours not in (layers := partition.expand(path)):
            continue
        if isinstance(leaf, jax.ShapeDtypeStruct | partition.Hole):
            raise UserError(
                f"{tensor} is not trained, but PEFT saves its module whole: give save_adapter "
                "params="
            )
        array = host(leaf)
        return array[layers.index(ours)] if partition.stack_of(path) else array
    raise UserError(f"the parameters lack {ours!r}")
