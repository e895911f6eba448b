"""Ordered (regex, multiplier) on the paths of trainable leaves: learning rates and weight decay."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from lora_jax import partition
from lora_jax.errors import UserError, nearest

Groups = tuple[tuple[str, float], ...]


def check(groups: Groups, params: Any, what: str) -> None:
    """UserError for a pattern that matches no leaf of `params`, with near misses."""
    names = [name for path in partition.arrays(params) for name in partition.expand(path)]
    for pattern, _ in groups:
        partition.compiled(pattern)
        if not any(_matches(pattern, name) for name in names):
            raise UserError(
                f"{what}: the pattern {pattern!r} matches no trainable leaf; "
                + nearest(pattern.strip("$^"), names)
            )


def scale(groups: Groups) -> optax.GradientTransformation:
    """Multiplies updates by the first group whose regex matches their path; no match is 1.

    Leaves of a stack of layers get one multiplier per layer on their leading axis.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scaled = [
            leaf * multiplier(groups, path, leaf)
            for path, leaf in partition.arrays(updates).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(updates), scaled), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay(rate: jax.Array, groups: Groups) -> optax.GradientTransformation:
    """Adds rate * multiplier * parameter to the updates: decoupled weight decay (Loshchilov &
    Hutter 2019, arXiv:1711.05101) where it stands after the moments."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise UserError("weight decay needs the parameters: tx.update(grads, state, params).")
        found = [
            leaf + rate.astype(x.dtype) * multiplier(groups, path, x) * x
            for (path, x), leaf in zip(
                partition.arrays(params).items(), jax.tree.leaves(updates), strict=True
            )
        ]
        return jax.tree.unflatten(jax.tree.structure(updates), found), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def multiplier(groups: Groups, path: str, leaf: Any) -> Any:
    """A float, or an array that gives each layer of a stacked leaf its own.

    Raises UserError where layers differ but share one value.
    """
    names = partition.expand(path)
    values = [
        next((value for regex, value in groups if _matches(regex, name)), 1.0) for name in names
    ]
    if len(set(values)) == 1:
        return values[0]
    if leaf.shape[:1] != (len(names),):
        raise UserError(
            f"{path} has one value for its {len(names)} layers, but the optimizer groups give "
            "different multipliers to them; use a regex that treats all its layers alike."
        )
    return np.asarray(values, np.float32).reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)


def _matches(pattern: str, name: str) -> bool:
    # `…/kernel/b` also answers to its kernel's and its module's path.
    return partition.matches(pattern, name) or partition.matches(pattern, partition.module(name))
