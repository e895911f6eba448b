"""W + s·C ⊗ D as one leaf: the update of LoKr (Yeh et al. 2023, arXiv:2309.14859, section 4.3).

C is [m, l] and D is [n, k] for W of [m·n, l·k]. A product takes the inputs as an m × n table and
multiplies its two axes in turn; the Kronecker product is never formed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tensors import structure
from lora_jax.tensors.base import Over, WeightError, apply_primitive, densify, stacked, wide
from lora_jax.tensors.low_rank import LowRank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kronecker(Over):
    """y = x·W + s·x·(C ⊗ D).

    Args:
      w: the frozen weight [*batch, m·n, l·k]: an array, or another weight type.
      c: [*batch, m, l].
      d: [*batch, n, k].
      scale: s, shape () or the batch shape.
      key: None, or a typed PRNG key (shape as of scale): inverted dropout on the update's input.
      rate: the dropout rate, shape ().
      path: W's path, for errors.
    """

    w: Any
    c: jax.Array
    d: jax.Array
    scale: jax.Array
    key: jax.Array | None = None
    rate: jax.Array | None = None
    path: str = dataclasses.field(default="", metadata={"static": True})

    def delta(self) -> jax.Array:
        """s·C ⊗ D, shaped like W."""
        product = jnp.einsum("...ml,...nk->...mnlk", self.c, self.d).reshape(self.shape)
        scale = jnp.asarray(self.scale)
        return product * scale.reshape(scale.shape + (1,) * (self.ndim - scale.ndim))

    def dense(self) -> jax.Array:
        w = densify(self.w)
        return (w.astype(wide(w.dtype)) + self.delta()).astype(w.dtype)

    def stacked(self) -> Any:
        if self.ndim == 2:
            raise WeightError(f"scan runs along an input or output axis of {self.path!r}")
        w = stacked(self.w)
        flags: dict[str, Any] = dict(
            w=w,
            c=True,
            d=True,
            scale=jnp.ndim(self.scale) > 0,
            key=None if self.key is None else self.key.ndim > 0,
            rate=None if self.rate is None else False,
        )
        return dataclasses.replace(self, **flags)

    def _dropped(self, x: jax.Array) -> jax.Array:
        like = LowRank(self.w, self.c, self.d, self.scale, self.key, self.rate, path=self.path)
        return like.dropped(x)

    def rule_dot_general(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """A matrix, or a stack of them batched with x, times activations."""
        x, (contract, batch) = args[1 - at], params["dimension_numbers"]
        n = self.ndim - 2
        if len(contract[at]) != 1 or contract[at][0] < n or tuple(batch[at]) != tuple(range(n)):
            return NotImplemented
        pair = [x, self.w] if at == 1 else [self.w, x]
        y = apply_primitive("dot_general", pair, at, params)
        c, d = self.c.astype(x.dtype), self.d.astype(x.dtype)
        if contract[at][0] == n + 1:  # x·Wᵀ
            c, d = jnp.swapaxes(c, -1, -2), jnp.swapaxes(d, -1, -2)
        (axis,) = contract[1 - at]
        z = jnp.moveaxis(self._dropped(x), [*batch[1 - at], axis], [*range(n), x.ndim - 1])
        free = z.shape[n:-1]
        z = z.reshape(*z.shape[:n], -1, c.shape[-2], d.shape[-2])
        options: dict[str, Any] = dict(
            precision=params["precision"], preferred_element_type=wide(x.dtype)
        )
        z = jnp.einsum("...tmn,...nk->...tmk", z, d, **options).astype(x.dtype)
        z = jnp.einsum("...tmk,...ml->...tlk", z, c, **options)
        scale = jnp.asarray(self.scale)
        z = z * scale.reshape(scale.shape + (1,) * (z.ndim - scale.ndim))
        z = z.reshape(*z.shape[:n], *free, c.shape[-1] * d.shape[-1])
        if at == 0:
            z = jnp.moveaxis(z, -1, n)
        return y + z.astype(y.dtype)

    rule_convert_element_type = structure.on_w("convert_element_type")
    rule_reduce_precision = structure.on_w("reduce_precision")
    rule_sharding_constraint = structure.on_w("sharding_constraint")
    rule_copy = structure.on_w("copy")

    def rule_stop_gradient(self, args: Sequence[Any], at: int, params: Any) -> Any:
        w = apply_primitive("stop_gradient", [self.w], 0, params)
        c, d = jax.lax.stop_gradient((self.c, self.d))
        return dataclasses.replace(self, w=w, c=c, d=d)

    def rule_transpose(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """The two matrix axes swapped: (C ⊗ D)ᵀ = Cᵀ ⊗ Dᵀ."""
        n = self.ndim - 2
        if tuple(params["permutation"]) != (*range(n), n + 1, n):
            return NotImplemented
        w = apply_primitive("transpose", [self.w], 0, params)
        c, d = (jnp.swapaxes(x, -1, -2) for x in (self.c, self.d))
        return dataclasses.replace(self, w=w, c=c, d=d)

    def rule_squeeze(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """Drops batch axes of size one."""
        dims = tuple(params["dimensions"])
        if any(i >= self.ndim - 2 for i in dims):
            return NotImplemented
        return self._batchwise("squeeze", params, lambda x: jnp.squeeze(x, dims))

    def rule_slice(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """Some layers of a stack."""
        strides = params["strides"] or (1,) * self.ndim
        bounds = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
        n = self.ndim - 2
        if bounds[n:] != [(0, size, 1) for size in self.shape[n:]]:
            return NotImplemented
        cut = tuple(slice(*b) for b in bounds[:n])
        return self._batchwise("slice", params, lambda x: x[cut])

    def rule_dynamic_slice(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """One layer of a stack at a traced index."""
        n, sizes, starts = self.ndim - 2, params["slice_sizes"], args[1:]
        if at != 0 or tuple(sizes[n:]) != self.shape[n:]:
            return NotImplemented

        def cut(x: jax.Array) -> jax.Array:
            for i in range(n):
                x = jax.lax.dynamic_slice_in_dim(x, starts[i], sizes[i], i)
            return x

        return self._batchwise("dynamic_slice", params, cut, *starts)

    def _batchwise(self, name: str, params: Any, cut: Any, *further: Any) -> Any:
        w = apply_primitive(name, [self.w, *further], 0, params)
        own = {"c": self.c, "d": self.d, "scale": self.scale, "key": self.key}
        moved = {k: cut(x) for k, x in own.items() if x is not None and jnp.ndim(x)}
        return dataclasses.replace(self, w=w, **moved)
