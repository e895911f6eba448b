"""Trees of different sizes in one array: padded with zeros to a hull, stacked, and cut back.

Padding is exact where zeros stay zero under training: a zero column of A beside a zero row of B
has no gradient, and SGD, Adam, AdamW and Lion leave what has no gradient at zero. A path that a
member lacks (an untargeted module) is the same with every column zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import partition
from lora_jax.errors import UserError


def hull(trees: Sequence[Any], path: str = "") -> Any:
    """The smallest tree of ShapeDtypeStructs that holds each of `trees`, nested dicts of arrays.

    Raises UserError where one leaf has another type or number of axes in two of them.
    """
    if isinstance(trees[0], Mapping):
        keys = sorted({key for tree in trees for key in tree})
        return {
            key: hull([tree[key] for tree in trees if key in tree], f"{path}/{key}".strip("/"))
            for key in keys
        }
    kinds = {(str(x.dtype), len(x.shape)) for x in trees}
    if len(kinds) > 1:
        raise UserError(f"{path} has {kinds} in different members: they cannot share a program")
    shape = tuple(map(max, *(x.shape for x in trees))) if len(trees) > 1 else tuple(trees[0].shape)
    return jax.ShapeDtypeStruct(shape, trees[0].dtype)


def pad(tree: Any, like: Any) -> Any:
    """`tree` with zeros added at the end of its axes, and for leaves it lacks: shaped `like`."""
    flat = partition.flatten(tree)
    wanted = partition.flatten(like)
    extra = set(flat) - set(wanted)
    if extra:
        raise UserError(f"the hull lacks {', '.join(sorted(extra)[:3])}")
    return partition.unflatten_like(like, {n: _padded(flat.get(n), w) for n, w in wanted.items()})


def _padded(x: Any, like: Any) -> jax.Array:
    if x is None:
        return jnp.zeros(like.shape, like.dtype)
    if tuple(x.shape) == tuple(like.shape):
        return x  # also what jnp.pad cannot take: typed random keys
    return jnp.pad(x, [(0, big - small) for small, big in zip(x.shape, like.shape, strict=True)])


def cut(tree: Any, like: Any) -> Any:
    """The inverse of `pad`: what of `tree` is inside the shapes of `like`."""
    flat = partition.flatten(tree)
    small = partition.flatten(like)
    return partition.unflatten_like(like, {n: _cut(flat[n], x.shape) for n, x in small.items()})


def _cut(x: Any, shape: tuple[int, ...]) -> Any:
    return x if tuple(x.shape) == tuple(shape) else x[tuple(map(slice, shape))]


def stack(trees: Sequence[Any]) -> Any:
    """Equal trees as one, with a leading axis over them."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def take(tree: Any, index: int) -> Any:
    """One of the stacked trees."""
    return jax.tree.map(lambda x: x[index], tree)
