"""W + s·A·B as one leaf: the low-rank update of LoRA (Hu et al. 2021, eq. 3), never made dense.

Axis letters: w axes are batch, in or out. a is [*batch, *in, r], b is [*batch, r, *out]; their
axes follow the order of W's own. Batch axes are layers, experts, or whatever W is stacked over;
a factor without them is shared by all. The in and out axes are static *negative* positions in W,
which survive slicing by scan and batching by vmap.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tensors.base import Weight, WeightError, is_weight

_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Weight):
    """y = x·W + s·(dropout(x)·A)·B for every operation that is linear in W.

    Args:
      w: the frozen weight [...]: an array, or another weight type (composition).
      a: [*batch, *in, r]. b: [*batch, r, *out]. Kept in their own dtype (float32), multiplied in
        the activations' dtype.
      scale: s, shape () or the batch shape (a scale per layer).
      key: None, or a typed PRNG key (shape () or batch): inverted dropout on the input of A.
      rate: the dropout rate, shape (); a number, so it may be traced.
      in_axes, out_axes: negative positions of W's input and output axes, ascending.
      path: W's path, for errors.
    """

    w: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    key: jax.Array | None = None
    rate: jax.Array | None = None
    in_axes: tuple[int, ...] = dataclasses.field(default=(-2,), metadata=_STATIC)
    out_axes: tuple[int, ...] = dataclasses.field(default=(-1,), metadata=_STATIC)
    path: str = dataclasses.field(default="", metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        return self.w.dtype

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """W's axes that are neither in nor out, as negative positions."""
        taken = {*self.in_axes, *self.out_axes}
        return tuple(i for i in range(-len(self.w.shape), 0) if i not in taken)

    def dense(self) -> jax.Array:
        w = self.w.dense() if is_weight(self.w) else self.w
        return (w.astype(jnp.float32) + self.delta()).astype(w.dtype)

    def delta(self) -> jax.Array:
        """s·A·B, float32, shaped and ordered like W."""
        letters = string.ascii_letters
        names = {i: letters[n] for n, i in enumerate(range(-self.ndim, 0))}
        a = jnp.asarray(self.a, jnp.float32) * self._scale_like(self.a)
        subscripts = f"{self._a_letters(names, 'Z')},{self._b_letters(names, 'Z')}"
        out = "".join(names[i] for i in range(-self.ndim, 0))
        product = jnp.einsum(f"{subscripts}->{out}", a, jnp.asarray(self.b, jnp.float32))
        return jnp.broadcast_to(product, self.shape)

    def stacked(self) -> LowRank:
        n = len(self.batch_axes)
        if n == 0:
            raise WeightError(f"scan runs along an input or output axis of {self.path!r}")
        flags: dict[str, Any] = dict(
            w=self.w.stacked() if is_weight(self.w) else True,
            a=self.a.ndim - len(self.in_axes) - 1 == n,
            b=self.b.ndim - len(self.out_axes) - 1 == n,
            scale=jnp.ndim(self.scale) == n,
            key=None if self.key is None else self.key.ndim == n,
            rate=None if self.rate is None else jnp.ndim(self.rate) == n,
        )
        return dataclasses.replace(self, **flags)

    # Letters: one per axis of W, so that each product is one einsum beside W's own operation.

    def _a_letters(self, names: dict[int, str], rank: str) -> str:
        batch = [names[i] for i in self.batch_axes]
        own = batch[len(batch) - (self.a.ndim - len(self.in_axes) - 1) :]
        return "".join([*own, *(names[i] for i in self.in_axes), rank])

    def _b_letters(self, names: dict[int, str], rank: str) -> str:
        batch = [names[i] for i in self.batch_axes]
        own = batch[len(batch) - (self.b.ndim - len(self.out_axes) - 1) :]
        return "".join([*own, rank, *(names[i] for i in self.out_axes)])

    def _scale_like(self, factor: jax.Array) -> jax.Array:
        """s, with trailing axes of size one so that it multiplies `factor` by its batch axes."""
        scale = jnp.asarray(self.scale, jnp.float32)
        return scale.reshape(scale.shape + (1,) * (factor.ndim - scale.ndim))

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.key is None or self.rate is None:
            return x
        if self.key.ndim:
            raise WeightError(
                f"dropout on {self.path!r}, which is stacked, outside of the scan over its layers"
            )
        keep = jax.random.bernoulli(self.key, 1.0 - self.rate, x.shape)
        return jnp.where(keep, x / (1.0 - self.rate).astype(x.dtype), jnp.zeros((), x.dtype))

    def rule_dot_general(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """x·W with any number of contracted and batch axes; contracting out axes uses Wᵀ."""
        x = args[1 - at]
        (contract, batch) = params["dimension_numbers"]
        ndim = self.ndim
        w_contract = tuple(i - ndim for i in contract[at])
        if set(w_contract) == set(self.in_axes):
            transposed = False
        elif set(w_contract) == set(self.out_axes):
            transposed = True
        else:
            return NotImplemented
        if not {i - ndim for i in batch[at]} <= set(self.batch_axes):
            return NotImplemented
        base_args = [x, self.w] if at == 1 else [self.w, x]
        base = _apply("dot_general", base_args, at, params)

        letters = iter(string.ascii_letters)
        w_names = {i: next(letters) for i in range(-ndim, 0)}
        x_names: list[str | None] = [None] * x.ndim
        for mine, theirs in ((contract[at], contract[1 - at]), (batch[at], batch[1 - at])):
            for i, j in zip(mine, theirs, strict=True):
                x_names[j] = w_names[i - ndim]
        x_free = [j for j, name in enumerate(x_names) if name is None]
        for j in x_free:
            x_names[j] = next(letters)
        rank = next(letters)
        w_used = {*contract[at], *batch[at]}
        w_free = "".join(w_names[i - ndim] for i in range(ndim) if i not in w_used)
        x_rest = "".join(str(x_names[j]) for j in x_free)
        shared = "".join(w_names[i - ndim] for i in batch[at])
        out = shared + (x_rest + w_free if at == 1 else w_free + x_rest)

        first, second = self._a_letters(w_names, rank), self._b_letters(w_names, rank)
        one, two = (self.b, self.a) if transposed else (self.a, self.b)
        if transposed:
            first, second = second, first
        # Batch axes of W that x does not have stay in the middle product when the first factor
        # carries them.
        middle_batch = "".join(
            w_names[i] for i in self.batch_axes if w_names[i] in first and w_names[i] not in shared
        )
        middle = shared + x_rest + middle_batch + rank
        einsum = dict(precision=params["precision"], preferred_element_type=jnp.float32)
        t = jnp.einsum(
            f"{''.join(map(str, x_names))},{first}->{middle}",
            self._dropped(x),
            one.astype(x.dtype),
            **einsum,
        )
        t = t * self._scale_in(middle, w_names)
        y = jnp.einsum(
            f"{middle},{second}->{out}", t.astype(x.dtype), two.astype(x.dtype), **einsum
        )
        return base + y.astype(base.dtype)

    def _scale_in(self, middle: str, w_names: dict[int, str]) -> jax.Array:
        """s with its batch axes where the product `middle` has them."""
        scale = jnp.asarray(self.scale, jnp.float32)
        if scale.ndim == 0:
            return scale
        batch = [w_names[i] for i in self.batch_axes][len(self.batch_axes) - scale.ndim :]
        if any(name not in middle for name in batch):
            raise WeightError(f"{self.path!r} has a scale per layer but factors shared by layers")
        order = sorted(range(scale.ndim), key=lambda i: middle.index(batch[i]))
        shape = [1] * len(middle)
        for i in order:
            shape[middle.index(batch[i])] = scale.shape[i]
        return scale.transpose(order).reshape(shape)

    def rule_gather(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """Rows of an embedding W (V, D) at given indices: those rows of A, times B."""
        numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
        plain = (
            at == 0
            and self.ndim == 2
            and (self.in_axes, self.out_axes) == ((-2,), (-1,))
            and tuple(numbers.collapsed_slice_dims) == (0,)
            and tuple(numbers.start_index_map) == (0,)
            and not numbers.operand_batching_dims
            and sizes[1] == self.shape[1]
        )
        if not plain:
            return NotImplemented
        base = _apply("gather", [self.w, args[1]], 0, params)
        a = self._dropped(self.a)
        rows = jax.lax.gather(
            a,
            args[1],
            numbers,
            (1, a.shape[-1]),
            unique_indices=params["unique_indices"],
            indices_are_sorted=params["indices_are_sorted"],
            mode=params["mode"],
            fill_value=params["fill_value"],
        )
        axis = numbers.offset_dims[0]
        rows = jnp.moveaxis(rows, axis, -1).astype(base.dtype)
        update = jnp.matmul(
            rows, self.b.astype(base.dtype), preferred_element_type=jnp.float32
        ) * jnp.asarray(self.scale, jnp.float32)
        return base + jnp.moveaxis(update, -1, axis).astype(base.dtype)

    def rule_transpose(self, args: Sequence[Any], at: int, params: Any) -> Any:
        permutation = params["permutation"]
        n = self.ndim
        new = {old - n: i - n for i, old in enumerate(permutation)}
        if [new[i] for i in self.batch_axes] != sorted(new[i] for i in self.batch_axes):
            return NotImplemented  # layers and experts swapped: the factors' order would lie
        in_axes, a = _permuted(self.a, [new[i] for i in self.in_axes], last=False)
        out_axes, b = _permuted(self.b, [new[i] for i in self.out_axes], last=True)
        w = _apply("transpose", [self.w], 0, params)
        return dataclasses.replace(self, w=w, a=a, b=b, in_axes=in_axes, out_axes=out_axes)

    def rule_convert_element_type(self, args: Sequence[Any], at: int, params: Any) -> Any:
        # Only W is cast: the factors keep float32 and are cast to the activations' dtype in use.
        return dataclasses.replace(self, w=_apply("convert_element_type", [self.w], 0, params))

    def _elementwise(self, name: str, params: Any) -> Any:
        return dataclasses.replace(self, w=_apply(name, [self.w], 0, params))

    def rule_sharding_constraint(self, args: Sequence[Any], at: int, params: Any) -> Any:
        return self._elementwise("sharding_constraint", params)

    def rule_copy(self, args: Sequence[Any], at: int, params: Any) -> Any:
        return self._elementwise("copy", params)

    def rule_stop_gradient(self, args: Sequence[Any], at: int, params: Any) -> Any:
        stop = jax.lax.stop_gradient
        w = _apply("stop_gradient", [self.w], 0, params)
        return dataclasses.replace(self, w=w, a=stop(self.a), b=stop(self.b))

    def rule_mul(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """W times a scalar: the scale takes it too."""
        other = args[1 - at]
        if jnp.ndim(other) != 0:
            return NotImplemented
        pair = [self.w, other] if at == 0 else [other, self.w]
        return dataclasses.replace(
            self, w=_apply("mul", pair, at, params), scale=self.scale * other.astype(jnp.float32)
        )

    def rule_slice(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """One or more layers of a stack (batch axes only)."""
        starts, limits = params["start_indices"], params["limit_indices"]
        strides = params["strides"] or (1,) * self.ndim
        index = tuple(slice(*s) for s in zip(starts, limits, strides, strict=True))
        touched = [i - self.ndim for i, n in enumerate(self.shape) if index[i] != slice(0, n, 1)]
        if any(i not in self.batch_axes for i in touched):
            return NotImplemented
        w = _apply("slice", [self.w], 0, params)
        return self._index_batch(w, [index[i] for i in self.batch_axes])

    def rule_squeeze(self, args: Sequence[Any], at: int, params: Any) -> Any:
        dropped = {i - self.ndim for i in params["dimensions"]}
        if not dropped <= set(self.batch_axes):
            return NotImplemented
        if self.batch_axes[: len(dropped)] != tuple(range(-self.ndim, -self.ndim + len(dropped))):
            return NotImplemented
        if set(self.batch_axes[: len(dropped)]) != dropped:
            return NotImplemented
        w = _apply("squeeze", [self.w], 0, params)
        return self._index_batch(w, [0] * len(dropped))

    def rule_dynamic_slice(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """One layer of a stack at a traced index."""
        sizes, starts = params["slice_sizes"], args[1:]
        touched = [i for i, n in enumerate(self.shape) if sizes[i] != n]
        if at != 0 or any(i - self.ndim not in self.batch_axes for i in touched):
            return NotImplemented
        w = _apply("dynamic_slice", [self.w, *starts], 0, params)
        new = dataclasses.replace(self, w=w)
        for i in touched:
            position = self.batch_axes.index(i - self.ndim)
            new = new._map_batch(
                lambda x, p, s=starts[i], n=sizes[i]: jax.lax.dynamic_slice_in_dim(x, s, n, p),
                position,
            )
        return new

    def _map_batch(self, f: Any, position: int) -> LowRank:
        """f(array, axis) on every array that carries the batch axis number `position`."""
        n = len(self.batch_axes)

        def one(x: Any, own: int) -> Any:
            return f(x, position - (n - own)) if own > n - 1 - position else x

        return dataclasses.replace(
            self,
            a=one(self.a, self.a.ndim - len(self.in_axes) - 1),
            b=one(self.b, self.b.ndim - len(self.out_axes) - 1),
            scale=one(self.scale, jnp.ndim(self.scale)),
            key=None if self.key is None else one(self.key, self.key.ndim),
        )

    def _index_batch(self, w: Any, index: list[Any]) -> LowRank:
        n = len(self.batch_axes)

        def one(x: Any, own: int) -> Any:
            return x[tuple(index[n - own :])] if own else x

        return dataclasses.replace(
            self,
            w=w,
            a=one(self.a, self.a.ndim - len(self.in_axes) - 1),
            b=one(self.b, self.b.ndim - len(self.out_axes) - 1),
            scale=one(self.scale, jnp.ndim(self.scale)),
            key=None if self.key is None else one(self.key, self.key.ndim),
        )

    def rule_reshape(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """Merging or splitting axes that are of one kind: (D, N, H) as (D, N·H) and back."""
        groups = _axis_groups(self.shape, tuple(params["new_sizes"]))
        if params.get("dimensions") is not None or groups is None:
            return NotImplemented
        n, m = self.ndim, len(params["new_sizes"])
        kinds = {
            **{i: "in" for i in self.in_axes},
            **{i: "out" for i in self.out_axes},
            **{i: "batch" for i in self.batch_axes},
        }
        new_axes: dict[str, list[int]] = {"in": [], "out": [], "batch": []}
        for old, new in groups:
            kind = {kinds[i - n] for i in old}
            if len(kind) != 1:
                return NotImplemented
            new_axes[kind.pop()] += [i - m for i in new]
        if len(new_axes["batch"]) != len(self.batch_axes):
            return NotImplemented
        sizes = params["new_sizes"]
        in_shape = tuple(sizes[i + m] for i in new_axes["in"])
        out_shape = tuple(sizes[i + m] for i in new_axes["out"])
        a_batch = self.a.shape[: self.a.ndim - len(self.in_axes) - 1]
        b_batch = self.b.shape[: self.b.ndim - len(self.out_axes) - 1]
        return dataclasses.replace(
            self,
            w=_apply("reshape", [self.w], 0, params),
            a=self.a.reshape(*a_batch, *in_shape, self.a.shape[-1]),
            b=self.b.reshape(*b_batch, self.b.shape[len(b_batch)], *out_shape),
            in_axes=tuple(new_axes["in"]),
            out_axes=tuple(new_axes["out"]),
        )

    def rule_conv_general_dilated(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """A convolution with A's kernel (spatial and input axes to r), then B on the channels."""
        numbers = params["dimension_numbers"]
        out_dim = numbers.rhs_spec[0]
        groups = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
        if at != 1 or groups or self.out_axes != (out_dim - self.ndim,) or self.batch_axes:
            return NotImplemented
        x = args[0]
        base = _apply("conv_general_dilated", [x, self.w], 1, params)
        kernel = jnp.moveaxis(self.a, -1, out_dim).astype(x.dtype)
        t = jax.lax.conv_general_dilated(
            self._dropped(x),
            kernel,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            numbers,
            precision=params["precision"],
            preferred_element_type=jnp.float32,
        )
        channel = numbers.out_spec[1]
        t = jnp.moveaxis(t, channel, -1) * jnp.asarray(self.scale, jnp.float32)
        y = jnp.matmul(
            t.astype(x.dtype), self.b.astype(x.dtype), preferred_element_type=jnp.float32
        )
        return base + jnp.moveaxis(y, -1, channel).astype(base.dtype)


def _apply(name: str, args: list[Any], at: int, params: Any) -> Any:
    """The primitive on W itself: by W's own rule where W is a weight in turn."""
    if is_weight(args[at]):
        rule = getattr(args[at], f"rule_{name}", None)
        result = NotImplemented if rule is None else rule(args, at, params)
        if result is NotImplemented:
            raise WeightError(f"{name} is not possible on {args[at].path!r}")
        return result
    from jax.extend.core import primitives

    return getattr(primitives, f"{name}_p").bind(*args, **params)


def _permuted(
    factor: jax.Array, axes: list[int], *, last: bool
) -> tuple[tuple[int, ...], jax.Array]:
    """The factor's in (or out) axes put in ascending order of their new positions."""
    order = sorted(range(len(axes)), key=axes.__getitem__)
    start = factor.ndim - len(axes) - (0 if last else 1)
    full = [*range(start), *(start + i for i in order), *range(start + len(axes), factor.ndim)]
    same = full == list(range(factor.ndim))
    return tuple(axes[i] for i in order), factor if same else factor.transpose(full)


def _axis_groups(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[list[int], list[int]]] | None:
    """Smallest runs of axes with equal products; None where unit axes make that ambiguous."""
    if 1 in old or 1 in new:
        return None
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
