"""Normal numbers, every column normalised: Li et al. 2018, arXiv:1804.08838, section 2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.projections.base import Numbers, Projection, columns

_ROWS = 256
"""Rows of P that exist at one time, and share a key with their column."""


@dataclasses.dataclass(frozen=True)
class Dense(Projection):
    """P of independent normal numbers whose columns are then given unit norm.

    Cost: D·d products a pass. Held, P is D·d floats in memory, read once a pass. Not held, it is
    drawn in blocks of 256 rows, forwards and again backwards: 1 KiB·d of memory, but D·d normal
    numbers, some fifty times the products' own time on a CPU. For large D take another kind.
    """

    CACHED_UP_TO: ClassVar[int] = 2**18

    @property
    def _blocks(self) -> int:
        return -(-self.size // _ROWS)

    def _block(self, keys: jax.Array, index: jax.Array) -> jax.Array:
        """[d, rows] of the block `index`; rows beyond D are zero."""
        drawn = jax.vmap(
            lambda k: jax.random.normal(jax.random.fold_in(k, index), (_ROWS,), jnp.float32)
        )(keys)
        inside = index * _ROWS + jnp.arange(_ROWS) < self.size
        return jnp.where(inside[None], drawn, 0.0)

    def numbers(self, key: jax.Array, d: int) -> Numbers:
        """{"scale": 1 / norm of the column, [d]} and, held, {"matrix": [d, D] unnormalised}."""
        keys, index = columns(key, d), jnp.arange(self._blocks)

        def add(total: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            block = self._block(keys, i)
            return total + (block**2).sum(1), block if self.cached else None

        squares, blocks = jax.lax.scan(add, jnp.zeros(d, jnp.float32), index)
        held = {}
        if blocks is not None:
            held = {"matrix": jnp.moveaxis(blocks, 0, 1).reshape(d, -1)[:, : self.size]}
        return {"scale": 1.0 / jnp.sqrt(squares), **held}

    def apply(self, key: jax.Array, numbers: Mapping[str, Any], x: jax.Array) -> jax.Array:
        x = x * numbers["scale"]
        if self.cached:
            return jnp.matmul(x, numbers["matrix"].astype(x.dtype), precision="highest")
        keys = columns(key, x.size)

        @jax.checkpoint  # or the loop would keep all of P for the way back
        def rows(x: jax.Array, i: jax.Array) -> jax.Array:
            return jnp.matmul(x, self._block(keys, i).astype(x.dtype), precision="highest")

        y = jax.lax.map(lambda i: rows(x, i), jnp.arange(self._blocks))
        return y.reshape(-1)[: self.size]
