"""AdaLoRA in PEFT's files: lora_A, lora_E and lora_B of each module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods.peft import parts
from lora_jax.methods.peft.patterns import module_paths, rules, seven_digits
from lora_jax.methods.peft.protocol import PREFIX, AdapterFiles, ModelNames, NoPeftForm

_SCHEDULE = {
    "target_r": "target_rank", "total_step": "total_steps", "tinit": "initial_steps",
    "tfinal": "final_steps", "deltaT": "every", "beta1": "beta1", "beta2": "beta2",
    "orth_reg_weight": "orthogonality", "lora_dropout": "dropout",
}  # fmt: skip
_NAMES = ("lora_A", "lora_E", "lora_B")
_KNOWN = {
    *_SCHEDULE, "init_r", "r", "lora_alpha", "rank_pattern", "init_lora_weights", "runtime_config",
    "megatron_core", "qalora_group_size",  # their defaults are not empty, and mean nothing alone
}  # fmt: skip


def write(
    method: Any, trainable: Mapping[str, Any], names: ModelNames, params: Any
) -> AdapterFiles:
    """The files of an AdaLoRA: pruned triplets are there, with a singular value of zero.

    Raises:
      NoPeftForm: modules differ in rank or alpha; see also `parts.write`.
    """
    ranks = method.ranks(params)
    different = {r for layers in ranks.values() for r in layers if r}
    alphas = {
        seven_digits(float(s) * r)
        for path, layers in ranks.items()
        for s, r in zip(np.atleast_1d(method.scales(params)[path]), layers, strict=True)
        if r
    }
    if len(different) > 1 or len(alphas) > 1:
        raise NoPeftForm("PEFT's AdaLoRA has one rank and one alpha for all modules")
    arrays = {}
    for path in ranks:
        a, e, b = (parts.layers_of(path, trainable[path][k]) for k in "aeb")
        arrays[path] = {
            "lora_A": a.swapaxes(-1, -2), "lora_E": e[..., None], "lora_B": b.swapaxes(-1, -2),
        }  # fmt: skip
    config = {
        "peft_type": "ADALORA", "init_r": different.pop(), "lora_alpha": alphas.pop(),
        "bias": "none", "fan_in_fan_out": False,
        **{theirs: getattr(method, ours) for theirs, ours in _SCHEDULE.items()},
    }  # fmt: skip
    whole = {p: v for p, v in trainable.items() if p not in ranks}
    return parts.write(names, arrays, ranks, whole, params, config)


def read(
    cls: type[Any], files: AdapterFiles, names: ModelNames, params: Any, saved: Any = None
) -> tuple[Any, dict[str, Any]]:
    """(method, trainable), with the triplets that a rank_pattern left out put back as zeros."""
    config = files.config
    stored = parts.read(_unpruned(files), names, _NAMES, known=_KNOWN)
    every = module_paths(names.theirs)
    ranks = {partition.module(o): x["lora_A"].shape[0] for o, x in stored.parts.items()}
    method = saved if isinstance(saved, cls) else cls(
        rank=rules(ranks, every), alpha=config.get("lora_alpha", 8), targets=stored.targets,
        train=stored.train,
        **{ours: config[theirs] for theirs, ours in _SCHEDULE.items()
           if config.get(theirs) is not None},  # total_step may be null
    )  # fmt: skip
    turned = dataclasses.replace(
        stored, parts={k: {n: _ours(n, v) for n, v in x.items()} for k, x in stored.parts.items()}
    )
    like = jax.eval_shape(lambda: method.init(jax.random.key(0), params))
    return method, parts.fill(turned, like, dict(zip("aeb", _NAMES, strict=True)), files.where)


def _ours(name: str, value: np.ndarray) -> np.ndarray:
    return value[:, 0] if name == "lora_E" else value.T


def _unpruned(files: AdapterFiles) -> AdapterFiles:
    tensors = dict(files.tensors)
    for name, kept in (files.config.get("rank_pattern") or {}).items():
        stem = PREFIX + name.removeprefix(PREFIX).partition(".lora_E")[0]
        chosen = np.asarray(kept, bool).reshape(-1)
        for part in _NAMES:
            key = f"{stem}.{part}"
            if key not in tensors:
                raise UserError(f"{files.where}: rank_pattern names {name}, but there is no {key}")
            value = tensors[key].T if part == "lora_B" else tensors[key]
            if len(value) == len(chosen):
                continue
            full = np.zeros((len(chosen), *value.shape[1:]), value.dtype)
            full[chosen] = value
            tensors[key] = full.T if part == "lora_B" else full
    return dataclasses.replace(files, tensors=tensors)
