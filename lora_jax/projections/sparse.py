"""Few nonzeros, every column normalised: Li et al. 2018, arXiv:1804.08838, appendix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.projections.base import Numbers, Projection, columns, random_signs


@dataclasses.dataclass(frozen=True)
class Sparse(Projection):
    """P whose entries are 0 except, each with probability 1/sqrt(D), a random sign; normalised.

    The very sparse projection of Li, Hastie and Church (2006). Its values ±D^(1/4)/sqrt(d) do not
    matter, since the columns are given unit norm. A column is drawn as gaps between its nonzeros,
    which are geometric: exactly independent entries, in O(sqrt(D)). A column with no nonzero (as
    can happen to a tiny tensor) stays zero.

    Cost: about d·sqrt(D) products a pass, and twice that many numbers if held.
    """

    CACHED_UP_TO: ClassVar[int] = 2**22

    @property
    def _room(self) -> int:
        """More nonzeros than a column ever has (six standard deviations)."""
        mean = math.sqrt(self.size)
        return min(self.size, math.ceil(mean + 6.0 * math.sqrt(mean)) + 8)

    def _column(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(rows int32, signs float32), each [room]; beyond the last nonzero the sign is 0."""
        key_gap, key_sign = jax.random.split(key)
        uniform = 1.0 - jax.random.uniform(key_gap, (self._room,), jnp.float32)  # (0, 1]
        density = 1.0 / math.sqrt(self.size)
        none = math.log1p(-density) if density < 1.0 else -math.inf
        # Gaps are bounded so that their sum cannot overflow; e^-64 is beyond float32's uniform.
        gap = 1 + jnp.minimum(jnp.log(uniform) / none, 64.0 / density).astype(jnp.int32)
        rows = jnp.cumsum(gap, dtype=jnp.int32) - 1
        signs = random_signs(key_sign, (self._room,))
        inside = rows < self.size
        return jnp.where(inside, rows, 0), jnp.where(inside, signs, 0.0)

    def _entries(self, key: jax.Array, d: int) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(self._column)(columns(key, d))

    def numbers(self, key: jax.Array, d: int) -> Numbers:
        """{"scale": 1 / norm of the column [d]} and, held, {"rows", "signs": [d, room]}."""
        rows, signs = self._entries(key, d)
        count = jnp.abs(signs).sum(1)
        scale = jnp.where(count > 0, 1.0 / jnp.sqrt(jnp.maximum(count, 1.0)), 0.0)
        return {"scale": scale, **({"rows": rows, "signs": signs} if self.cached else {})}

    def apply(self, key: jax.Array, numbers: Mapping[str, Any], x: jax.Array) -> jax.Array:
        def entries() -> tuple[jax.Array, jax.Array]:
            if self.cached:
                return numbers["rows"], numbers["signs"].astype(x.dtype)
            rows, signs = self._entries(key, d)
            return rows, signs.astype(x.dtype)

        def add(x: jax.Array, rows: jax.Array, signs: jax.Array) -> jax.Array:
            y = jnp.zeros(self.size, x.dtype)
            return y.at[rows].add(x[:, None] * signs, mode="promise_in_bounds")

        def gather(y: jax.Array, rows: jax.Array, signs: jax.Array) -> jax.Array:
            return (y.at[rows].get(mode="promise_in_bounds") * signs).sum(1)

        # Scattering or gathering for many vectors at once is many times slower on a CPU.
        alone = jax.custom_batching.sequential_vmap
        d = x.size

        # [[1, 0], [-P, 1]]·(x, y) = (x, 0) is solved by y = P·x: said in this way, JAX takes what
        # is written here for the transpose and under vmap, in forward and in reverse mode.
        def equations(xy: jax.Array) -> jax.Array:
            return xy.at[d:].add(-add(xy[:d], *entries()))

        def solved(_: Any, b: jax.Array) -> jax.Array:
            return b.at[d:].add(alone(add)(b[:d], *entries()))

        def transposed(_: Any, b: jax.Array) -> jax.Array:
            return b.at[:d].add(alone(gather)(b[d:], *entries()))

        b = jnp.pad(x * numbers["scale"], (0, self.size))
        return jax.lax.custom_linear_solve(equations, b, solved, transposed)[d:]
