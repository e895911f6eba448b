"""RMSNorm and LayerNorm, whose derivative keeps the normalised values and one number a row.

Differentiated step by step they keep several arrays as large as x for the way back (see
`activations`). Statistics are float32, or wider for wider inputs. Axes: D model width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def normalize(x: jax.Array, epsilon: float, centred: bool) -> jax.Array:
    """(x - mean) / std over the last axis, or without `centred` x / rms; [..., D] -> [..., D]."""
    return _normalize(x, epsilon, centred)[0]


@normalize.defjvp
def _derivative(
    epsilon: float, centred: bool, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y, rate = _normalize(x, epsilon, centred)
    along = y * jnp.mean(y * dx, axis=-1, keepdims=True)
    if centred:
        along = along + jnp.mean(dx, axis=-1, keepdims=True)
    return y, rate * (dx - along)


def _normalize(x: jax.Array, epsilon: float, centred: bool) -> tuple[jax.Array, jax.Array]:
    """(normalised values, 1 / std [..., 1]). Variance as the mean of squared deviations: the
    faster E[x²] - E[x]² loses digits where the mean is large."""
    if centred:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return x * rate, rate


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + scale) (Zhang and Sennrich 2019, arXiv:1910.07467).

    The offset is 1 in Gemma, whose scale starts at 0, and 0 elsewhere.
    """

    epsilon: float
    dtype: Any
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        start = nn.initializers.constant(1.0 - self.offset)
        scale = _row(self.param("scale", start, (x.shape[-1],)), x)
        normed = normalize(_wide(x), self.epsilon, False)
        if self.offset:
            return (normed * (self.offset + scale.astype(normed.dtype))).astype(self.dtype)
        # Normalised values are rounded before the scale, as transformers does for Llama.
        return normed.astype(self.dtype) * scale.astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std · scale + bias (Ba et al. 2016, arXiv:1607.06450)."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        shape = (x.shape[-1],)
        scale = _row(self.param("scale", nn.initializers.ones, shape), x)
        bias = _row(self.param("bias", nn.initializers.zeros, shape), x)
        normed = normalize(_wide(x), self.epsilon, True)
        return (normed * scale.astype(normed.dtype) + bias.astype(normed.dtype)).astype(self.dtype)


def _row(vector_D: jax.Array, x: jax.Array) -> jax.Array:
    return vector_D.reshape((1,) * (x.ndim - 1) + (-1,))
