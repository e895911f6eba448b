"""Activations whose derivative is made on the way forward: one array is kept for the way back.

Differentiated step by step, x·sigmoid(x) alone keeps three arrays as large as x for the backward
pass; in layers under scan each is copied into a stack and out again. Value and slope together are
one loop over x, and only the slope is kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Pair = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""x -> (f(x), f'(x))."""


def _silu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    s = jax.nn.sigmoid(x)
    y = x * s
    return y, s + y * (1.0 - s)


def _gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x·Φ(x). By erf, as torch: erfc is exact in the tail, where x·Φ(x) is nothing, and slower."""
    below = 0.5 * (1.0 + jax.lax.erf(x * (0.5**0.5)))
    density = jnp.exp(-0.5 * jnp.square(x)) * (1.0 / math.sqrt(2.0 * math.pi))
    return x * below, below + x * density


def _gelu_tanh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale, cubic = math.sqrt(2.0 / math.pi), 0.044715
    square = jnp.square(x)
    t = jnp.tanh(scale * x * (1.0 + cubic * square))
    below = 0.5 * (1.0 + t)
    inner = scale * (1.0 + 3.0 * cubic * square)
    return x * below, below + 0.5 * x * (1.0 - jnp.square(t)) * inner


def _relu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.nn.relu(x), (x > 0).astype(x.dtype)


_PAIRS: dict[str, Pair] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": _relu,
    "silu": _silu,
    "swish": _silu,
}


def _activation(pair: Pair) -> Callable[[jax.Array], jax.Array]:
    @jax.custom_jvp
    def f(x: jax.Array) -> jax.Array:
        return pair(x)[0]

    @f.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        y, slope = pair(*primals)
        return y, slope * tangents[0]

    return f


@functools.cache
def gated(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(gate, up) -> f(gate)·up, which keeps two arrays for the way back: f'(gate)·up and f(gate).

    Args:
      name: of f in `ACTIVATIONS`.
    """
    pair = _PAIRS[name]

    @jax.custom_jvp
    def f(gate: jax.Array, up: jax.Array) -> jax.Array:
        return pair(gate)[0] * up

    @f.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (gate, up), (dgate, dup) = primals, tangents
        y, slope = pair(gate)
        return y * up, (slope * up) * dgate + y * dup

    return f


ACTIVATIONS = {name: _activation(pair) for name, pair in _PAIRS.items()}
"""Hugging Face's names of activations that are known here."""
