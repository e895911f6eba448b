"""m ∘ V / ‖V‖ with V = W + s·A·B: the weight of DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5).

V is never formed: the norms of its columns follow from |W|² of each column, Wᵀ·A, Aᵀ·A and B, in
O(rank · in · out), and a product with V is LoRA's, times one number for each output.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tensors.adapt import adapt
from lora_jax.tensors.base import apply_primitive, densify, wide
from lora_jax.tensors.low_rank import LowRank
from lora_jax.tensors.rescaled import Rescaled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dora(Rescaled):
    """y = x·W + g ∘ (d·V) − d·W, where d is x with V's dropout; without dropout y = g ∘ (x·V).

    So, as in PEFT, dropout acts on all that the adapter adds to x·W. It costs one more product
    with W; without it the step costs LoRA's and a multiplication of the output.

    Args:
      w: V, a LowRank.
      gain: g = m / ‖V‖, along V's output axes.
    """

    def dense(self) -> jax.Array:
        w = densify(self.w.w)
        v = w.astype(wide(w.dtype)) + self.w.delta()  # rounded once, after the factor
        return (v * self.factor()).astype(w.dtype)

    def _product(self, name: str, args: Sequence[Any], at: int, params: Any) -> Any:
        rule = getattr(Rescaled, f"rule_{name}")
        if self.w.key is None:
            return rule(self, args, at, params)
        x = args[1 - at]
        d = self.w.dropped(x)
        still = dataclasses.replace(self, w=dataclasses.replace(self.w, key=None, rate=None))
        y = rule(still, [d, still] if at == 1 else [still, d], at, params)
        if y is NotImplemented:
            return NotImplemented
        rest = [x - d, self.w.w] if at == 1 else [self.w.w, x - d]
        return y + apply_primitive(name, rest, at, params).astype(y.dtype)

    def rule_dot_general(self, args: Sequence[Any], at: int, params: Any) -> Any:
        return self._product("dot_general", args, at, params)

    def rule_conv_general_dilated(self, args: Sequence[Any], at: int, params: Any) -> Any:
        return self._product("conv_general_dilated", args, at, params)


def column_squares(w: Any, in_axes: Sequence[int]) -> jax.Array:
    """The sum of W² over its input axes: [*batch, *out] in W's order, float32.

    Args:
      w: the weight; one that is not an array is made dense for this.
      in_axes: its input axes.
    """
    w = densify(w)
    w = w.astype(wide(w.dtype))
    return jnp.sum(w * w, axis=tuple(in_axes))


def column_norms(v: LowRank, squares: jax.Array) -> jax.Array:
    """‖W + s·A·B‖ over the input axes, for every output: [*batch, *out] in W's order, float32.

    Args:
      v: the sum; W may be another weight type.
      squares: `column_squares` of W.
    """
    letters = dict(zip(range(-v.ndim, 0), string.ascii_letters, strict=False))
    columns = "".join(letters[i] for i in range(-v.ndim, 0) if i not in v.in_axes)
    w_axes = "".join(letters[i] for i in range(-v.ndim, 0))
    a_axes = "".join(letters[i] if i is not None else "Y" for i in v.a_axes())
    b_axes = "".join(letters[i] if i is not None else "Y" for i in v.b_axes())
    a_again, b_again = a_axes.replace("Y", "Z"), b_axes.replace("Y", "Z")
    a_batch = "".join(x for x in a_axes if x in columns)
    exact = jnp.promote_types(wide(v.dtype), v.a.dtype)

    def against_w(w: jax.Array, a: jax.Array) -> jax.Array:
        return jnp.einsum(
            f"{w_axes},{a_axes}->{columns}Y", w, a.astype(w.dtype), preferred_element_type=exact
        )

    cross = jnp.einsum(f"{columns}Y,{b_axes}->{columns}", adapt(against_w)(v.w, v.a), v.b)
    gram = jnp.einsum(f"{a_axes},{a_again}->{a_batch}YZ", v.a, v.a)
    own = "".join(x for x in columns if x in a_batch + b_axes)
    half = jnp.einsum(f"{a_batch}YZ,{b_axes}->{own}Z", gram, v.b)
    square = jnp.einsum(f"{own}Z,{b_again}->{own}", half, v.b)
    square = square.reshape([squares.shape[i] if x in own else 1 for i, x in enumerate(columns)])
    scale = jnp.asarray(v.scale)
    sizes = dict(zip(v.batch_axes_of(scale), scale.shape, strict=True))
    scale = scale.reshape([sizes.get(i, 1) for i in range(-v.ndim, 0) if i not in v.in_axes])
    return jnp.sqrt(jnp.maximum(squares + 2.0 * scale * cross + scale**2 * square, 0.0))


def dora(v: LowRank, magnitude: jax.Array, squares: jax.Array) -> Dora:
    """The weight m ∘ V / ‖V‖; the norm is a constant to derivatives (section 4.3 of the paper).

    Args:
      v: W + s·A·B.
      magnitude: m, [*batch, *out] in W's order.
      squares: `column_squares` of W; a column where it is 0 (a module that is padding in a sweep,
        or a column of zeros, which has no direction) is left as V has it.
    """
    stop = jax.lax.stop_gradient
    norms = column_norms(dataclasses.replace(v, a=stop(v.a), b=stop(v.b)), squares)
    live = (squares > 0) & (norms > 0)
    gain = jnp.where(live, magnitude / jnp.where(live, norms, 1.0), 1.0)
    return Dora(v, jnp.expand_dims(gain, [i + v.ndim for i in v.in_axes]), v.path)
