"""W + s·A·B as one leaf: the low-rank update of LoRA (Hu et al. 2021, eq. 3), never made dense.

Axis letters: w axes are batch, in or out. a is [*batch, *in, r], b is [*batch, r, *out]; their
axes follow the order of W's own. Batch axes are layers, experts, or whatever W is stacked over;
a factor without them is shared by all. The in and out axes are static *negative* positions in W,
which survive slicing by scan and batching by vmap.
"""

from __future__ import annotations

import dataclasses
import string
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tensors import products, structure
from lora_jax.tensors.base import Over, WeightError, densify, stacked, wide

_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Over):
    """y = x·W + s·(dropout(x)·A)·B for every operation that is linear in W.

    Args:
      w: the frozen weight [...]: an array, or another weight type (composition).
      a: [*batch, *in, r]. b: [*batch, r, *out]. Kept in their own dtype (float32), multiplied in
        the activations' dtype.
      scale: s, shape () or the batch shape (a scale per layer; an axis of size one is shared).
      key: None, or a typed PRNG key (shape as of scale): inverted dropout on the input of A.
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
    def batch_axes(self) -> tuple[int, ...]:
        """W's axes that are neither in nor out, as negative positions."""
        taken = {*self.in_axes, *self.out_axes}
        return tuple(i for i in range(-len(self.w.shape), 0) if i not in taken)

    # Where each array of the leaf holds the axes of W: position in W by axis of the array, the
    # rank as None. Arrays with fewer batch axes than W hold its last ones.

    def a_axes(self) -> list[int | None]:
        own = self.a.ndim - len(self.in_axes) - 1
        return [*self._last_batch(own), *self.in_axes, None]

    def b_axes(self) -> list[int | None]:
        own = self.b.ndim - len(self.out_axes) - 1
        return [*self._last_batch(own), None, *self.out_axes]

    def batch_axes_of(self, x: Any) -> list[int | None]:
        """Of `scale` and `key`, which have no other axes."""
        return self._last_batch(jnp.ndim(x))

    def _last_batch(self, count: int) -> list[int | None]:
        return list(self.batch_axes[len(self.batch_axes) - count :])

    def dense(self) -> jax.Array:
        w = densify(self.w)
        return (w.astype(wide(w.dtype)) + self.delta()).astype(w.dtype)

    def delta(self) -> jax.Array:
        """s·A·B, float32 or the factors' wider type, shaped and ordered like W."""
        dtype = wide(jnp.promote_types(self.a.dtype, self.b.dtype))
        names: dict[int | None, str] = dict(zip(range(-self.ndim, 0), string.ascii_letters))  # noqa: B905
        names[None] = "Z"
        first = "".join(names[i] for i in self.a_axes())
        second = "".join(names[i] for i in self.b_axes())
        # An axis that neither factor has is shared by all that lies along it.
        out = [i for i in range(-self.ndim, 0) if names[i] in first + second]
        product = jnp.einsum(
            f"{first},{second}->{''.join(names[i] for i in out)}",
            jnp.asarray(self.a, dtype),
            jnp.asarray(self.b, dtype),
        )
        product = jnp.expand_dims(
            product, [i + self.ndim for i in range(-self.ndim, 0) if i not in out]
        )
        scale = jnp.asarray(self.scale, jnp.float32)
        sizes = dict(zip(self.batch_axes_of(scale), scale.shape, strict=True))
        scale = scale.reshape([sizes.get(i, 1) for i in range(-self.ndim, 0)])
        return jnp.broadcast_to(scale * product, self.shape)

    def stacked(self) -> LowRank:
        n = len(self.batch_axes)
        if n == 0:
            raise WeightError(f"scan runs along an input or output axis of {self.path!r}")
        flags: dict[str, Any] = dict(
            w=stacked(self.w),
            a=self.a.ndim - len(self.in_axes) - 1 == n,
            b=self.b.ndim - len(self.out_axes) - 1 == n,
            scale=jnp.ndim(self.scale) == n,
            key=None if self.key is None else self.key.ndim == n,
            rate=None if self.rate is None else jnp.ndim(self.rate) == n,
        )
        return dataclasses.replace(self, **flags)

    def dropped(self, x: jax.Array) -> jax.Array:
        """Inverted dropout of A's input; x itself without a key."""
        if self.key is None or self.rate is None:
            return x
        if self.key.size > 1:
            raise WeightError(
                f"dropout on {self.path!r}, which is stacked, outside of the scan over its layers"
            )
        keep = jax.random.bernoulli(self.key.reshape(()), 1.0 - self.rate, x.shape)
        return jnp.where(keep, x / (1.0 - self.rate).astype(x.dtype), jnp.zeros((), x.dtype))

    # Products with activations.
    rule_dot_general = products.dot_general
    rule_ragged_dot_general = products.ragged_dot_general
    rule_gather = products.gather
    rule_conv_general_dilated = products.conv_general_dilated
    # Another view of the same weight.
    rule_convert_element_type = structure.on_w("convert_element_type")
    rule_reduce_precision = structure.on_w("reduce_precision")
    rule_sharding_constraint = structure.on_w("sharding_constraint")
    rule_copy = structure.on_w("copy")
    rule_stop_gradient = structure.stop_gradient
    rule_neg = structure.neg
    rule_mul = structure.mul
    rule_div = structure.div
    rule_transpose = structure.transpose
    rule_reshape = structure.reshape
    rule_broadcast_in_dim = structure.broadcast_in_dim
    rule_squeeze = structure.squeeze
    rule_slice = structure.slice_
    rule_split = structure.split
    rule_dynamic_slice = structure.dynamic_slice
