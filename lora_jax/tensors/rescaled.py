"""W ∘ g as one leaf: a weight whose rows, columns or layers are multiplied by learned numbers.

What IA3 does to keys, values and hidden units (Liu et al. 2022, arXiv:2205.05638, section 3.3) and
DoRA to the columns of W + s·A·B: a product with W, and one multiplication of its input or output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tensors import structure
from lora_jax.tensors.base import Over, apply_primitive, densify, stacked, wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rescaled(Over):
    """y = (x ∘ g)·W where g runs along W's inputs, y = (x·W) ∘ g where it runs along its outputs.

    Args:
      w: the weight [...]: an array, or another weight type (composition).
      gain: g, with W's axes, each of W's size or of size one; leading axes may be missing.
      path: W's path, for errors.
    """

    w: Any
    gain: jax.Array
    path: str = dataclasses.field(default="", metadata={"static": True})

    def factor(self) -> jax.Array:
        """g with as many axes as W: a scan that shares g leaves it an axis of size one more."""
        extra = self.gain.ndim - self.ndim
        if extra > 0:
            return self.gain.reshape(self.gain.shape[extra:])
        return self.gain.reshape((1,) * -extra + self.gain.shape)

    def dense(self) -> jax.Array:
        w = densify(self.w)
        return (w.astype(wide(w.dtype)) * self.factor()).astype(w.dtype)

    def stacked(self) -> Any:
        own = self.gain.ndim == self.ndim and self.gain.shape[0] == self.shape[0]
        w = stacked(self.w)
        flags: dict[str, Any] = dict(w=w, gain=own)
        return dataclasses.replace(self, **flags)

    def _onto(self, y: jax.Array, places: Mapping[int, int]) -> jax.Array:
        """y times g, whose axis i lies along y's axis places[i]; its other axes have size one."""
        g = self.factor()
        order = sorted(places, key=places.__getitem__)
        rest = [i for i in range(g.ndim) if i not in places]
        sizes = {places[i]: g.shape[i] for i in places}
        g = g.transpose([*rest, *order]).reshape([sizes.get(j, 1) for j in range(y.ndim)])
        return (y.astype(wide(y.dtype)) * g).astype(y.dtype)

    def _varies(self) -> set[int]:
        return {i for i, n in enumerate(self.factor().shape) if n != 1}

    # Products with activations.

    def rule_dot_general(self, args: Sequence[Any], at: int, params: Any) -> Any:
        x, (contract, batch) = args[1 - at], params["dimension_numbers"]
        summed, shared, varies = list(contract[at]), list(batch[at]), self._varies()
        if varies & set(summed):
            if varies - {*summed, *shared}:
                return NotImplemented  # it varies along summed and kept axes at once
            theirs = [*contract[1 - at], *batch[1 - at]]
            x = self._onto(x, dict(zip([*summed, *shared], theirs, strict=True)))
            return apply_primitive("dot_general", _pair(x, self.w, at), at, params)
        y = apply_primitive("dot_general", _pair(x, self.w, at), at, params)
        # The output has the batch axes, the left side's own and then the right side's own.
        free = [i for i in range(self.ndim) if i not in summed and i not in shared]
        first = y.ndim - len(free) if at == 1 else len(shared)
        return self._onto(y, {i: j for j, i in [*enumerate(shared), *enumerate(free, first)]})

    def rule_gather(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """Rows of an embedding (V, D), with g along D."""
        numbers = params["dimension_numbers"]
        rows = (
            at == 0
            and self.ndim == 2
            and tuple(numbers.collapsed_slice_dims) == (0,)
            and params["slice_sizes"][1] == self.shape[1]
            and self._varies() <= {1}
        )
        if not rows:
            return NotImplemented
        y = apply_primitive("gather", [self.w, args[1]], 0, params)
        return self._onto(y, {1: numbers.offset_dims[0]})

    def rule_conv_general_dilated(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """A convolution, with g along its output channels or along its input channels."""
        numbers, x, varies = params["dimension_numbers"], args[0], self._varies()
        out_dim, in_dim = numbers.rhs_spec[:2]
        if at != 1 or not (varies <= {out_dim} or varies <= {in_dim}):
            return NotImplemented
        if varies <= {out_dim}:
            y = apply_primitive("conv_general_dilated", [x, self.w], 1, params)
            return self._onto(y, {out_dim: numbers.out_spec[1]})
        if params["feature_group_count"] != 1:
            return NotImplemented
        x = self._onto(x, {in_dim: numbers.lhs_spec[1]})
        return apply_primitive("conv_general_dilated", [x, self.w], 1, params)

    # Other views of the same weight.

    rule_convert_element_type = structure.on_w("convert_element_type")
    rule_reduce_precision = structure.on_w("reduce_precision")
    rule_sharding_constraint = structure.on_w("sharding_constraint")
    rule_copy = structure.on_w("copy")
    rule_neg = structure.on_w("neg")

    def rule_stop_gradient(self, args: Sequence[Any], at: int, params: Any) -> Any:
        w = apply_primitive("stop_gradient", [self.w], 0, params)
        return dataclasses.replace(self, w=w, gain=jax.lax.stop_gradient(self.gain))

    def rule_mul(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """W times a scalar."""
        if jnp.ndim(args[1 - at]) != 0:
            return NotImplemented
        pair = _pair(args[1 - at], self.w, at)
        return dataclasses.replace(self, w=apply_primitive("mul", pair, at, params))

    def rule_div(self, args: Sequence[Any], at: int, params: Any) -> Any:
        if at != 0 or jnp.ndim(args[1]) != 0:
            return NotImplemented
        return dataclasses.replace(self, w=apply_primitive("div", [self.w, args[1]], 0, params))

    def rule_transpose(self, args: Sequence[Any], at: int, params: Any) -> Any:
        w = apply_primitive("transpose", [self.w], 0, params)
        return dataclasses.replace(self, w=w, gain=self.factor().transpose(params["permutation"]))

    def rule_reshape(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """Merging or splitting axes, along all of which g varies or along none."""
        groups = structure.axis_groups(self.shape, tuple(params["new_sizes"]))
        if params.get("dimensions") is not None or groups is None:
            return NotImplemented
        sizes, varies = [1] * len(params["new_sizes"]), self._varies()
        for old, new in groups:
            along = varies & set(old)
            if along and along != set(old):
                return NotImplemented
            for j in new:
                sizes[j] = params["new_sizes"][j] if along else 1
        w = apply_primitive("reshape", [self.w], 0, params)
        return dataclasses.replace(self, w=w, gain=self.factor().reshape(sizes))

    def rule_broadcast_in_dim(self, args: Sequence[Any], at: int, params: Any) -> Any:
        if len(args) > 1:
            return NotImplemented
        sizes, g = [1] * len(params["shape"]), self.factor()
        for i, j in enumerate(params["broadcast_dimensions"]):
            sizes[j] = g.shape[i]
        w = apply_primitive("broadcast_in_dim", [self.w], 0, params)
        return dataclasses.replace(self, w=w, gain=g.reshape(sizes))

    def rule_squeeze(self, args: Sequence[Any], at: int, params: Any) -> Any:
        w = apply_primitive("squeeze", [self.w], 0, params)
        return dataclasses.replace(self, w=w, gain=self.factor().squeeze(params["dimensions"]))

    def rule_slice(self, args: Sequence[Any], at: int, params: Any) -> Any:
        strides = params["strides"] or (1,) * self.ndim
        bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        g, varies = self.factor(), self._varies()
        cut = tuple(slice(*b) if i in varies else slice(None) for i, b in enumerate(bounds))
        w = apply_primitive("slice", [self.w], 0, params)
        return dataclasses.replace(self, w=w, gain=g[cut])

    def rule_dynamic_slice(self, args: Sequence[Any], at: int, params: Any) -> Any:
        if at != 0:
            return NotImplemented
        g, starts = self.factor(), args[1:]
        for i in self._varies():
            g = jax.lax.dynamic_slice_in_dim(g, starts[i], params["slice_sizes"][i], i)
        w = apply_primitive("dynamic_slice", [self.w, *starts], 0, params)
        return dataclasses.replace(self, w=w, gain=g)

    def rule_split(self, args: Sequence[Any], at: int, params: Any) -> Any:
        axis, g, start, parts = params["axis"], self.factor(), 0, []
        pieces = apply_primitive("split", [self.w], 0, params)
        for w, size in zip(pieces, params["sizes"], strict=True):
            own = g
            if axis in self._varies():
                own = jax.lax.slice_in_dim(g, start, start + size, axis=axis)
            parts.append(dataclasses.replace(self, w=w, gain=own))
            start += size
        return parts


def _pair(x: Any, w: Any, at: int) -> list[Any]:
    """An equation's two inputs, with the weight at its place."""
    return [x, w] if at == 1 else [w, x]
