"""Products of activations with W + s·A·B: W's own operation, plus one with A and one with B.

Each function is a rule of `LowRank` (see `base.Weight`) for the primitive that it is named after.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lora_jax.tensors.base import apply_primitive, wide

if TYPE_CHECKING:
    from lora_jax.tensors.low_rank import LowRank


def dot_general(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    """x·W with any number of contracted and batch axes; contracting out axes uses Wᵀ.

    Batch axes of W (experts) may be contracted too, as in "bei,eio->bo".
    """
    x = args[1 - at]
    (contract, batch) = params["dimension_numbers"]
    ndim = leaf.ndim
    summed = {i - ndim for i in contract[at]}
    kinds = summed - set(leaf.batch_axes)
    if kinds == set(leaf.in_axes):
        one, first, two, second = leaf.a, leaf.a_axes(), leaf.b, leaf.b_axes()
    elif kinds == set(leaf.out_axes):
        one, first, two, second = leaf.b, leaf.b_axes(), leaf.a, leaf.a_axes()
    else:
        return NotImplemented
    if not {i - ndim for i in batch[at]} <= set(leaf.batch_axes):
        return NotImplemented
    base_args = [x, leaf.w] if at == 1 else [leaf.w, x]
    base = apply_primitive("dot_general", base_args, at, params)

    # One letter per axis, so that each product is one einsum beside W's own operation.
    letters = iter(string.ascii_letters)
    names: dict[int | None, str] = {i: next(letters) for i in (*range(-ndim, 0), None)}
    x_names = [""] * x.ndim
    for mine, theirs in ((contract[at], contract[1 - at]), (batch[at], batch[1 - at])):
        for i, j in zip(mine, theirs, strict=True):
            x_names[j] = names[i - ndim]
    x_names = [name or next(letters) for name in x_names]
    x_used = {*contract[1 - at], *batch[1 - at]}
    x_free = "".join(name for j, name in enumerate(x_names) if j not in x_used)
    w_used = {*contract[at], *batch[at]}
    w_free = "".join(names[i - ndim] for i in range(ndim) if i not in w_used)
    shared = "".join(names[i - ndim] for i in batch[at])
    out = shared + (x_free + w_free if at == 1 else w_free + x_free)

    # The middle product keeps batch axes of W that the first factor, the scale or x has: they are
    # summed, or end up in the output, by the second product.
    scale = jnp.asarray(leaf.scale, jnp.float32)
    scaled = leaf.batch_axes_of(scale)
    axes = [i for i in leaf.batch_axes if i in {*first, *scaled, *summed}]
    kept = "".join(names[i] for i in axes if names[i] not in shared)
    middle = shared + x_free + kept + names[None]
    options: dict[str, Any] = dict(
        precision=params["precision"], preferred_element_type=wide(x.dtype)
    )
    t = _einsum("".join(x_names), leaf.dropped(x), names, first, one, middle, options)
    t = t * _spread(scale, [names[i] for i in scaled], middle)
    y = _einsum(middle, t.astype(x.dtype), names, second, two, out, options)
    return base + y.astype(base.dtype)


def _einsum(
    x_letters: str,
    x: jax.Array,
    names: dict[int | None, str],
    axes: list[int | None],
    factor: jax.Array,
    out: str,
    options: dict[str, Any],
) -> jax.Array:
    """x times a factor, with size one along axes of `out` that neither has."""
    own = "".join(names[i] for i in axes)
    made = "".join(name for name in out if name in x_letters + own)
    y = jnp.einsum(f"{x_letters},{own}->{made}", x, factor.astype(x.dtype), **options)
    return jnp.expand_dims(y, [i for i, name in enumerate(out) if name not in made])


def _spread(scale: jax.Array, own: list[str], middle: str) -> jax.Array:
    """s with its axes where `middle` has them, and size one elsewhere."""
    if not own:
        return scale
    order = sorted(range(scale.ndim), key=lambda i: middle.index(own[i]))
    shape = [1] * len(middle)
    for i in order:
        shape[middle.index(own[i])] = scale.shape[i]
    return scale.transpose(order).reshape(shape)


def ragged_dot_general(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    """Rows of x [m, in], sorted by expert, times W [experts, in, out]: `jax.lax.ragged_dot`."""
    numbers = params["ragged_dot_dimension_numbers"]
    plain = (
        at == 1
        and numbers.dot_dimension_numbers == (((1,), (1,)), ((), ()))
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
        and leaf.ndim == 3
        and (leaf.in_axes, leaf.out_axes) == ((-2,), (-1,))
    )
    if not plain:
        return NotImplemented
    x, sizes = args[0], args[2]
    base = apply_primitive("ragged_dot_general", [x, leaf.w, *args[2:]], 1, params)
    # The scale goes to A: a row of the middle product does not say which expert's it is.
    scale = jnp.asarray(leaf.scale, jnp.float32).reshape(-1, 1, 1)
    experts = leaf.shape[0]
    a = (leaf.a.reshape(-1, *leaf.a.shape[-2:]) * scale).astype(x.dtype)
    a = jnp.broadcast_to(a, (experts, *a.shape[1:]))
    b = jnp.broadcast_to(leaf.b.astype(x.dtype), (experts, *leaf.b.shape[-2:]))
    options: dict[str, Any] = dict(
        precision=params["precision"],
        preferred_element_type=wide(x.dtype),
        group_offset=params["group_offset"],
    )
    t = jax.lax.ragged_dot(leaf.dropped(x), a, sizes, **options)
    y = jax.lax.ragged_dot(t.astype(x.dtype), b, sizes, **options)
    return base + y.astype(base.dtype)


def gather(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    """Rows of an embedding W (V, D) at given indices: those rows of A, times B."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    plain = (
        at == 0
        and leaf.ndim == 2
        and (leaf.in_axes, leaf.out_axes) == ((-2,), (-1,))
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and sizes[1] == leaf.shape[1]
    )
    if not plain:
        return NotImplemented
    base = apply_primitive("gather", [leaf.w, args[1]], 0, params)
    rows = jax.lax.gather(  # without dropout, which is of inputs: here those are indices
        leaf.a,
        args[1],
        numbers,
        (1, leaf.a.shape[-1]),
        unique_indices=params["unique_indices"],
        indices_are_sorted=params["indices_are_sorted"],
        mode=params["mode"],
        fill_value=params["fill_value"],
    )
    axis = numbers.offset_dims[0]
    rows = jnp.moveaxis(rows, axis, -1).astype(base.dtype)
    update = jnp.matmul(
        rows, leaf.b.astype(base.dtype), preferred_element_type=wide(base.dtype)
    ) * jnp.asarray(leaf.scale, jnp.float32)
    return base + jnp.moveaxis(update, -1, axis).astype(base.dtype)


def conv_general_dilated(leaf: LowRank, args: Sequence[Any], at: int, params: Any) -> Any:
    """A convolution with A's kernel (spatial and input axes to r), then B on the channels."""
    numbers = params["dimension_numbers"]
    out_dim = numbers.rhs_spec[0]
    groups = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
    if at != 1 or groups or leaf.out_axes != (out_dim - leaf.ndim,) or leaf.batch_axes:
        return NotImplemented
    x = args[0]
    base = apply_primitive("conv_general_dilated", [x, leaf.w], 1, params)
    kernel = jnp.moveaxis(leaf.a, -1, out_dim).astype(x.dtype)
    t = jax.lax.conv_general_dilated(
        leaf.dropped(x),
        kernel,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        numbers,
        precision=params["precision"],
        preferred_element_type=wide(x.dtype),
    )
    channel = numbers.out_spec[1]
    t = jnp.moveaxis(t, channel, -1) * jnp.asarray(leaf.scale, jnp.float32)
    y = jnp.matmul(t.astype(x.dtype), leaf.b.astype(x.dtype), preferred_element_type=wide(x.dtype))
    return base + jnp.moveaxis(y, -1, channel).astype(base.dtype)
