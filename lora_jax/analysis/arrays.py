"""One code for NumPy and JAX arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any
"""A NumPy or JAX array; a function given both computes with JAX."""


def library(*arrays: Array) -> Any:
    """The module to compute with: `jax.numpy` where any is of JAX (or traced), else NumPy."""
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def dot(x: Array, y: Array) -> Array:
    """x @ y; with JAX at full precision, which accelerators do not take by themselves."""
    if library(x, y) is np:
        return np.matmul(x, y)
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def turned(x: Array) -> Array:
    """The transpose of the matrices in x."""
    return library(x).swapaxes(x, -1, -2)


def ratio(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is 0."""
    xp = library(x, y)
    return xp.where(y == 0, 0.0, x / xp.where(y == 0, 1.0, y))
