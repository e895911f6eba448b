"""Other views of W + s·A·B that are low-rank again: casts, slices, transposes, reshapes, ….

Each function is a rule of `LowRank` (see `base.Weight`) for the primitive that it is named after.
A slice along an input axis is a slice of A, along an output axis one of B, along a batch axis one
of whatever carries that axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lora_jax.tensors.base import apply_primitive

if TYPE_CHECKING:
    from lora_jax.tensors.low_rank import LowRank

Rule = Callable[["LowRank", Sequence[Any], int, Any], Any]


def on_w(name: str) -> Rule:
    """The rule of a primitive that W alone takes.

    A cast or rounding is about W's storage: the factors keep float32, and are cast to the
    activations' dtype in use.
    """

    def rule(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
        return dataclasses.replace(leaf, w=apply_primitive(name, [leaf.w], 0, params))

    return rule


def stop_gradient(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    stop = jax.lax.stop_gradient
    w = apply_primitive("stop_gradient", [leaf.w], 0, params)
    return dataclasses.replace(leaf, w=w, a=stop(leaf.a), b=stop(leaf.b))


def neg(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    w = apply_primitive("neg", [leaf.w], 0, params)
    return dataclasses.replace(leaf, w=w, scale=-leaf.scale)


def mul(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    """W times a scalar: the scale takes it too."""
    other = args[1 - at]
    if jnp.ndim(other) != 0:
        return NotImplemented
    pair = [leaf.w, other] if at == 0 else [other, leaf.w]
    factor = jnp.asarray(other, jnp.float32)
    w = apply_primitive("mul", pair, at, params)
    return dataclasses.replace(leaf, w=w, scale=leaf.scale * factor)


def div(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    """W over a scalar."""
    if at != 0 or jnp.ndim(args[1]) != 0:
        return NotImplemented
    w = apply_primitive("div", [leaf.w, args[1]], 0, params)
    return dataclasses.replace(leaf, w=w, scale=leaf.scale / jnp.asarray(args[1], jnp.float32))


def transpose(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    permutation = params["permutation"]
    n = leaf.ndim
    new = {old - n: i - n for i, old in enumerate(permutation)}
    if [new[i] for i in leaf.batch_axes] != sorted(new[i] for i in leaf.batch_axes):
        return NotImplemented  # layers and experts swapped: the factors' order would lie
    in_axes, a = _permuted(leaf.a, [new[i] for i in leaf.in_axes], last=False)
    out_axes, b = _permuted(leaf.b, [new[i] for i in leaf.out_axes], last=True)
    w = apply_primitive("transpose", [leaf.w], 0, params)
    return dataclasses.replace(leaf, w=w, a=a, b=b, in_axes=in_axes, out_axes=out_axes)


def _permuted(
    factor: jax.Array, axes: list[int], *, last: bool
) -> tuple[tuple[int, ...], jax.Array]:
    """The factor's in (or out) axes put in ascending order of their new positions."""
    order = sorted(range(len(axes)), key=axes.__getitem__)
    start = factor.ndim - len(axes) - (0 if last else 1)
    full = [*range(start), *(start + i for i in order), *range(start + len(axes), factor.ndim)]
    same = full == list(range(factor.ndim))
    return tuple(axes[i] for i in order), factor if same else factor.transpose(full)


def reshape(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    """Merging or splitting axes that are of one kind: (D, N, H) as (D, N·H) and back."""
    groups = axis_groups(leaf.shape, tuple(params["new_sizes"]))
    if params.get("dimensions") is not None or groups is None:
        return NotImplemented
    n, m = leaf.ndim, len(params["new_sizes"])
    kinds = {
        **{i: "in" for i in leaf.in_axes},
        **{i: "out" for i in leaf.out_axes},
        **{i: "batch" for i in leaf.batch_axes},
    }
    new_axes: dict[str, list[int]] = {"in": [], "out": [], "batch": []}
    for old, new in groups:
        kind = {kinds[i - n] for i in old}
        if len(kind) != 1:
            return NotImplemented
        if kind == {"batch"} and (len(old), len(new)) != (1, 1):
            return NotImplemented  # layers merged with experts: a factor may have only one of them
        new_axes[kind.pop()] += [i - m for i in new]
    sizes = params["new_sizes"]
    in_shape = tuple(sizes[i + m] for i in new_axes["in"])
    out_shape = tuple(sizes[i + m] for i in new_axes["out"])
    a_batch = leaf.a.shape[: leaf.a.ndim - len(leaf.in_axes) - 1]
    b_batch = leaf.b.shape[: leaf.b.ndim - len(leaf.out_axes) - 1]
    return dataclasses.replace(
        leaf,
        w=apply_primitive("reshape", [leaf.w], 0, params),
        a=leaf.a.reshape(*a_batch, *in_shape, leaf.a.shape[-1]),
        b=leaf.b.reshape(*b_batch, leaf.b.shape[len(b_batch)], *out_shape),
        in_axes=tuple(new_axes["in"]),
        out_axes=tuple(new_axes["out"]),
    )


def axis_groups(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[list[int], list[int]]] | None:
    """Smallest runs of axes with equal products; None where unit axes of `old` make that ambiguous.

    A new unit axis, as of attention's one key head, goes with the axis behind it.
    """
    if 1 in old:
        return None
    wide = [j for j, n in enumerate(new) if n != 1]
    groups = _equal_runs(old, tuple(new[j] for j in wide))
    if groups is None or not wide:
        return groups
    homes = [
        next((k for k, w in enumerate(wide) if w >= j), len(wide) - 1) for j in range(len(new))
    ]
    return [(a, [j for j, k in enumerate(homes) if k in b]) for a, b in groups]


def _equal_runs(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[list[int], list[int]]] | None:
    groups, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        i2, j2 = i + 1, j + 1
        while (a := math.prod(old[i:i2])) != (b := math.prod(new[j:j2])):
            if a < b:
                i2 += 1
            else:
                j2 += 1
        groups.append((list(range(i, i2)), list(range(j, j2))))
        i, j = i2, j2
    return groups if (i, j) == (len(old), len(new)) else None


def broadcast_in_dim(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    """One weight for a stack of layers: new axes are batch axes, which the factors share."""
    shape, places = params["shape"], params["broadcast_dimensions"]
    n, m = leaf.ndim, len(shape)
    new = {i - n: place - m for i, place in enumerate(places)}
    kept = {*leaf.in_axes, *leaf.out_axes}
    if len(args) > 1 or any(leaf.shape[i] != shape[new[i]] for i in kept):
        return NotImplemented
    before = [new[i] for i in leaf.batch_axes]
    added = [i for i in range(-m, 0) if i not in new.values()]
    if before and added and max(added) > min(before):
        return NotImplemented  # factors hold the last batch axes: new ones must come before them
    return dataclasses.replace(
        leaf,
        w=apply_primitive("broadcast_in_dim", [leaf.w], 0, params),
        in_axes=tuple(new[i] for i in leaf.in_axes),
        out_axes=tuple(new[i] for i in leaf.out_axes),
    )


def squeeze(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    """Drops batch axes of size one."""
    n = leaf.ndim
    dropped = {i - n for i in params["dimensions"]}
    if not dropped <= set(leaf.batch_axes):
        return NotImplemented
    w = apply_primitive("squeeze", [leaf.w], 0, params)
    first = {i: lambda x, axis: jnp.squeeze(x, axis) for i in dropped}
    # Negative positions count from the end: an axis moves by what is dropped behind it.
    moved = {i: i + sum(d > i for d in dropped) for i in range(-n, 0)}
    return dataclasses.replace(
        _along(leaf, first),
        w=w,
        in_axes=tuple(moved[i] for i in leaf.in_axes),
        out_axes=tuple(moved[i] for i in leaf.out_axes),
    )


def slice_(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    """Some layers of a stack, or some inputs or outputs (one part of a fused kernel)."""
    strides = params["strides"] or (1,) * leaf.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    cuts: dict[int, Any] = {}
    for i, (start, limit, stride) in enumerate(bounds):
        if (start, limit, stride) != (0, leaf.shape[i], 1):
            cuts[i - leaf.ndim] = _slicer(start, limit, stride)
    w = apply_primitive("slice", [leaf.w], 0, params)
    return dataclasses.replace(_along(leaf, cuts), w=w)


def split(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    """The parts of a fused kernel (query, key and value in one)."""
    axis, parts = params["axis"] - leaf.ndim, []
    start = 0
    pieces = apply_primitive("split", [leaf.w], 0, params)
    for w, size in zip(pieces, params["sizes"], strict=True):
        cut = {axis: _slicer(start, start + size, 1)}
        parts.append(dataclasses.replace(_along(leaf, cut), w=w))
        start += size
    return parts


def _slicer(start: int, limit: int, stride: int) -> Callable[[Any, int], Any]:
    def cut(x: Any, axis: int) -> Any:
        return x[(slice(None),) * axis + (slice(start, limit, stride),)]

    return cut


def dynamic_slice(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    """One layer of a stack at a traced index; or inputs or outputs from a traced index."""
    if at != 0:
        return NotImplemented
    sizes, starts = params["slice_sizes"], args[1:]
    cuts: dict[int, Any] = {}
    for i, (size, start) in enumerate(zip(sizes, starts, strict=True)):
        if size != leaf.shape[i]:
            cuts[i - leaf.ndim] = lambda x, axis, start=start, size=size: (
                jax.lax.dynamic_slice_in_dim(x, start, size, axis)
            )
    w = apply_primitive("dynamic_slice", [leaf.w, *starts], 0, params)
    return dataclasses.replace(_along(leaf, cuts), w=w)


def _along(leaf: LowRank, cuts: dict[int, Callable[[Any, int], Any]]) -> LowRank:
    """Applies `cuts[axis of W](array, its own axis)` to each array of the leaf that has the axis.

    W itself is left to the caller. From the last axis to the first, so that an axis that a cut
    drops does not move those still to come. A scale or key of size one along an axis of W is
    shared along it, and keeps that size unless the axis is dropped.
    """

    def one(x: Any, axes: list[int | None]) -> Any:
        for position in reversed(range(len(axes))):
            axis = axes[position]
            if axis is None or axis not in cuts:
                continue
            if x.shape[position] == leaf.shape[axis]:
                x = cuts[axis](x, position)
        return x

    return dataclasses.replace(
        leaf,
        a=one(leaf.a, leaf.a_axes()),
        b=one(leaf.b, leaf.b_axes()),
        scale=one(leaf.scale, leaf.batch_axes_of(leaf.scale)),
        key=None if leaf.key is None else one(leaf.key, leaf.batch_axes_of(leaf.key)),
    )
