"""Methods whose update is low-rank in the end, as a plain LoRA: what files and other tools take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base
from lora_jax.methods.lora import LoRA, rule_names
from lora_jax.methods.peft.patterns import regexes, rules, seven_digits
from lora_jax.methods.peft.whole import host

Columns = Mapping[str, Sequence[Sequence[int]]]


def plain_lora(
    method: LoRA, params: Any, trainable: base.Trainable, factors: Mapping[str, Any], kept: Columns
) -> tuple[LoRA, base.Trainable]:
    """(LoRA, tree) that computes W + s·A·B with the factors' columns that are kept.

    Args:
      method: whose scales s are taken, and which may train further leaves whole.
      trainable: its tree; what is not in `factors` is taken as it is.
      factors: {"a": [*batch, *in, R], "b": [*batch, R, *out]} by leaf path.
      kept: by leaf path, the numbers of the columns that each layer uses.
    """
    flat, names = partition.flatten(params), rule_names(params)
    scales = method.scales(params)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tree: base.Trainable = {}
    for path, columns in kept.items():
        tree[path] = _packed(method, path, flat[path], factors[path], columns)
        for ours, chosen, s in zip(
            partition.expand(path), columns, np.atleast_1d(scales[path]), strict=True
        ):
            if chosen:
                ranks[names[ours]] = len(chosen)
                root = len(chosen) ** (0.5 if method.scaling == "rslora" else 1.0)
                alphas[names[ours]] = seven_digits(float(s) * root)
    if not ranks:
        raise UserError("no column is left in any layer: there is nothing to keep of the update")
    every = list(names.values())
    lora = LoRA(
        rank=rules(ranks, every), alpha=rules(alphas, every), targets=tuple(regexes(ranks, every)),
        scaling=method.scaling, dropout=method.dropout, train=method.train, layouts=method.layouts,
    )  # fmt: skip
    return lora, tree | {p: v for p, v in trainable.items() if p not in factors}


def _packed(
    method: LoRA, path: str, leaf: Any, ab: Any, columns: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The factors with each layer's chosen columns first and zeros after them."""
    stacked = partition.stack_of(path) is not None
    a, b = host(ab["a"]), host(ab["b"])
    rank_axis = len(method.layout(path, leaf).axes("b"))  # of b; a's is the last
    a, b = (a, b) if stacked else (a[None], b[None])
    b = np.moveaxis(b, rank_axis + (not stacked), -1)
    widest = max(len(c) for c in columns)
    packed = []
    for factor in (a, b):
        out = np.zeros((*factor.shape[:-1], widest), np.float32)
        for layer, chosen in enumerate(columns):
            out[layer, ..., : len(chosen)] = factor[layer][..., list(chosen)]
        packed.append(out)
    a, b = packed[0], np.moveaxis(packed[1], -1, rank_axis + (not stacked))
    a, b = (a, b) if stacked else (a[0], b[0])
    return {"a": jnp.asarray(a), "b": jnp.asarray(b)}


def as_lora(method: LoRA) -> LoRA:
    """The LoRA with the same fields, of a method that has further ones."""
    return LoRA(**{f.name: getattr(method, f.name) for f in dataclasses.fields(LoRA)})
