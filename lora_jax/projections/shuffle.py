"""A pseudo-random permutation of 2^k places that is computed, not held: nothing is sorted.

The place of entry i is a keyed bijection of k-bit numbers: rounds of a product with an odd number
(which carries low bits upwards) and of x ^ (x >> k/2) (which carries them down again).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lora_jax.projections.base import LONG

_ROUNDS = 4


def rounds(key: jax.Array) -> jax.Array:
    """What decides a permutation of any length: uint32 [rounds, 2]."""
    return jax.random.bits(key, (_ROUNDS, 2), jnp.uint32)


def shuffle(drawn: jax.Array, x: jax.Array) -> jax.Array:
    """x [2^k] with entry pi(i) at place i, where `drawn` (from `rounds`) decides pi.

    Linear; its transpose is the inverse permutation, so neither direction scatters.
    """
    n = x.shape[-1]

    def by_pi(x: jax.Array) -> jax.Array:
        return _taken(x, places(drawn, n))

    def back(x: jax.Array) -> jax.Array:
        at = places(drawn, n, inverse=True)
        if n < LONG:
            return _taken(x, at)
        # What a loop reads is there before it begins: else XLA computes x, say a product of two
        # arrays, at each place that is asked for, and reads both of them at random.
        return jax.lax.map(functools.partial(_taken, x), at.reshape(2, -1)).reshape(n)

    return jax.lax.custom_linear_solve(back, x, lambda _, b: by_pi(b), lambda _, b: back(b))


def _taken(x: jax.Array, at: jax.Array) -> jax.Array:
    return x.at[at].get(mode="promise_in_bounds", unique_indices=True)


@functools.partial(jax.jit, static_argnames=("n", "inverse"))  # traced once, used often
def places(drawn: jax.Array, n: int, *, inverse: bool = False) -> jax.Array:
    """pi(0), …, pi(n - 1), or those of its inverse: uint32 [n]; n is a power of two."""
    bits = n.bit_length() - 1
    mask, half = jnp.uint32(n - 1), jnp.uint32((bits + 1) // 2)
    x = jnp.arange(n, dtype=jnp.uint32)
    if not inverse:
        for i in range(_ROUNDS):
            x = (x * (drawn[i, 0] | 1) + drawn[i, 1]) & mask
            x = x ^ (x >> half)
        return x
    for i in reversed(range(_ROUNDS)):
        x = x ^ (x >> half)  # half of the bits or more: its own inverse
        x = ((x - drawn[i, 1]) * _reciprocal(drawn[i, 0] | 1)) & mask
    return x


def _reciprocal(odd: jax.Array) -> jax.Array:
    """1 / odd modulo 2^32, by Newton: each step doubles the three bits that are right at first."""
    x = odd
    for _ in range(4):
        x = x * (2 - odd * x)
    return x
