"""What a random projection P, D × d, must say of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

Numbers = dict[str, jax.Array]

LONG = 2**14
"""Vectors at least this long go one after another, so that each stays in the cache."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """P, D × d with columns of unit norm, as a linear map from coordinates to parameters.

    Column j depends on (key, D, j) alone, not on d: the first d' coordinates of a subspace are
    the smaller subspace. `numbers` hold what P is scaled by, one entry a coordinate; where they
    are padded with zeros, P ignores the coordinates in that place, and neither they nor what is
    trained there counts. Everything is drawn in float32, whatever it is multiplied with.

    Args:
      size: D.
      cached: hold the random arrays in `numbers`; else `apply` draws them, forwards and
        backwards.
    """

    CACHED_UP_TO: ClassVar[int] = 0

    size: int
    cached: bool

    def numbers(self, key: jax.Array, d: int) -> Numbers:
        """What `apply` needs: "scale" [d], and the random arrays if they are held."""
        raise TypeError(f"{type(self).__name__} does not define numbers")

    def apply(self, key: jax.Array, numbers: Mapping[str, Any], x: jax.Array) -> jax.Array:
        """P·x: [d] -> [D], linear in x."""
        raise TypeError(f"{type(self).__name__} does not define apply")


def columns(key: jax.Array, d: int) -> jax.Array:
    """A key a coordinate: [d]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(d))


def random_signs(key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """±1 as float32, the same whatever JAX's default precision is."""
    odd = jax.random.bits(key, shape, jnp.uint32) & 1
    return jnp.where(odd == 1, jnp.float32(1), jnp.float32(-1))
