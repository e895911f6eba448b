"""Fastfood (Le et al. 2013, arXiv:1408.3060) as Li et al. and Aghajanyan et al. normalise it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.projections.base import Numbers, Projection, columns, random_signs
from lora_jax.projections.shuffle import rounds, shuffle
from lora_jax.projections.walsh import walsh


@dataclasses.dataclass(frozen=True)
class Fastfood(Projection):
    """P = c·H·G·Π·H·B, its first D rows and first d columns; L is the power of two from D up.

    B are random signs, Π a (pseudo-random) permutation, G normal numbers, H orthonormal.
    c = L / (|G|·sqrt(D)): all L rows of a column have norm sqrt(L/D) exactly, so the D rows have
    norm 1 on average, with a spread of about sqrt((L - D) / (2·L·D)). Le et al.'s further
    diagonal S is left out, as in both papers.

    Cost: O(D log D) for P·x and for its transpose, and one vector of L numbers (G). The first H
    meets d numbers followed by zeros, so it is a transform of d numbers, repeated.

    Of a tensor smaller than the subspace (L < d) only the first L coordinates act, as in the
    published code; they already span it.
    """

    CACHED_UP_TO: ClassVar[int] = 2**24  # 64 MiB; drawing it takes as long as the rest of a pass

    @property
    def length(self) -> int:
        """L."""
        return 2 ** (self.size - 1).bit_length()

    def _gauss(self, key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, 2), (self.length,), jnp.float32)

    def numbers(self, key: jax.Array, d: int) -> Numbers:
        """{"scale": c·B [d], "rounds": of Π [rounds, 2]} and, held, {"gauss": G [L]}."""
        gauss = self._gauss(key)
        c = self.length / (jnp.linalg.norm(gauss) * math.sqrt(self.size))
        signs = jax.vmap(random_signs)(columns(jax.random.fold_in(key, 0), d))
        held = {"gauss": gauss} if self.cached else {}
        return {"scale": c * signs, "rounds": rounds(jax.random.fold_in(key, 1)), **held}

    def apply(self, key: jax.Array, numbers: Mapping[str, Any], x: jax.Array) -> jax.Array:
        x = (x * numbers["scale"])[: self.length]
        short = 2 ** (x.size - 1).bit_length()  # H·(x, 0, 0, …) repeats H·(x, 0) of this length
        small = walsh(jnp.pad(x, (0, short - x.size))) * math.sqrt(short / self.length)
        long = shuffle(numbers["rounds"], jnp.tile(small, self.length // short))

        def times_gauss(z: jax.Array) -> jax.Array:
            gauss = numbers["gauss"] if self.cached else self._gauss(key)
            return z * gauss.astype(z.dtype)

        # What is not held is drawn again on the way back, not kept for it.
        scaled = times_gauss(long) if self.cached else jax.checkpoint(times_gauss)(long)
        return walsh(scaled)[: self.size]
