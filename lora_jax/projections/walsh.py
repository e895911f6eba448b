"""The fast Walsh–Hadamard transform: n log n, a few small matrix products.

H of size 2^k is the k-fold Kronecker product of [[1, 1], [1, -1]] / sqrt(2) (Sylvester's order):
symmetric, orthonormal, its own inverse.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError
from lora_jax.projections.base import LONG

_BITS = 4
"""A stage's matrix is at most 2^4 wide: fastest on a CPU at n = 2^14 to 2^20."""


def walsh(x: jax.Array) -> jax.Array:
    """x·H along the last axis, of any power of two; float32 or float64, as `x` is.

    Linear, with itself as transpose, in forward and reverse mode and under vmap.

    Raises UserError for a length that is no power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise UserError(f"a Walsh–Hadamard transform needs a power of two, not {n}: pad with zeros")
    # H solves H·y = x: said in this way, no derivative goes through the stages one by one.
    return jax.lax.custom_linear_solve(_walsh, x, lambda _, b: _walsh(b), symmetric=True)


@jax.custom_batching.custom_vmap
def _walsh(x: jax.Array) -> jax.Array:
    n, rows = x.shape[-1], x.size // x.shape[-1]
    if rows > 1 and n >= LONG:
        return jax.lax.map(_one, x.reshape(rows, n)).reshape(x.shape)
    return _one(x)


@_walsh.def_vmap
def _batched(axis_size: int, in_batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
    # Mapped axes become leading ones: a stage that vmap itself maps would move the data about.
    return _walsh(x), True


def _one(x: jax.Array) -> jax.Array:
    """Each stage takes the last digit of the index to the front, transformed.

    After all stages the digits stand in their old order, and what was in front of them (rows)
    behind.
    """
    n, rows = x.shape[-1], x.size // x.shape[-1]
    y = x
    for bits in _stages(n.bit_length() - 1):
        h = jnp.asarray(hadamard(bits), x.dtype)
        contract = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(h, y.reshape(-1, 2**bits), contract, precision="highest")
    return y.reshape(n, rows).T.reshape(x.shape)


def _stages(k: int) -> list[int]:
    """k as a sum of as few parts up to _BITS as will do, as even as can be."""
    parts = -(-k // _BITS)
    return [k // parts + (i < k % parts) for i in range(parts)]


@functools.cache
def hadamard(k: int) -> np.ndarray:
    """H of size 2^k as a float64 matrix."""
    h = np.ones((1, 1))
    for _ in range(k):
        h = np.block([[h, h], [h, -h]]) / np.sqrt(2.0)
    return h
