"""Blocks shared by the families. Axes: B batch, T positions, D model width, V vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.sites import site

INITIALIZER = nn.initializers.normal(0.02)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
"""Hugging Face's names of activations that are known here."""


def dense(features: int, bias: bool, dtype: Any, name: str) -> nn.Dense:
    """A Dense layer with a 2-D kernel (in, features)."""
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=INITIALIZER, name=name)


def layer_norm(epsilon: float, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """A LayerNorm with scale and bias. Variance as the mean of squared deviations: the faster
    E[x²] - E[x]² loses digits where the mean is large."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + scale) (Zhang and Sennrich 2019, arXiv:1910.07467).

    Statistics are float32, or wider for wider inputs. The offset is 1 in Gemma, whose scale
    starts at 0, and 0 elsewhere.
    """

    epsilon: float
    dtype: Any
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        start = nn.initializers.constant(1.0 - self.offset)
        scale_D = self.param("scale", start, (x.shape[-1],))
        scale = scale_D.reshape((1,) * (x.ndim - 1) + (-1,))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        if self.offset:
            return (normed * (self.offset + scale.astype(wide.dtype))).astype(self.dtype)
        # Normalised values are rounded before the scale, as transformers does for Llama.
        return normed.astype(self.dtype) * scale.astype(self.dtype)


class Embed(nn.Module):
    """Token embedding, and its transpose as a tied head. Sites: ``tokens``, ``out``."""

    vocab_size: int
    features: int
    dtype: Any

    def setup(self) -> None:
        self.embedding = self.param("embedding", INITIALIZER, (self.vocab_size, self.features))

    def __call__(self, tokens: jax.Array, use_site: bool = True) -> jax.Array:
        """int [B, T] -> [B, P + T, D], P the site's length (0 without one)."""
        x_BTD = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        x_BTD = site(self, "tokens", x_BTD, tokens=tokens)
        return site(self, "out", x_BTD, may_lengthen=True, tokens=tokens) if use_site else x_BTD

    def attend(self, x: jax.Array) -> jax.Array:
        """[..., D] -> logits [..., V]."""
        embedding = self.embedding.astype(self.dtype)
        contract = (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(x.astype(self.dtype), embedding, contract)


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202). Site: ``out``."""

    hidden: int
    bias: bool
    dtype: Any
    activation: str = "silu"

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        gate = dense(self.hidden, self.bias, self.dtype, "gate")(x_BTD)
        up = dense(self.hidden, self.bias, self.dtype, "up")(x_BTD)
        inner = ACTIVATIONS[self.activation](gate) * up
        y_BTD = dense(x_BTD.shape[-1], self.bias, self.dtype, "down")(inner)
        return site(self, "out", y_BTD, inputs=x_BTD)


class MLP(nn.Module):
    """down(act(up(x))), with biases. Site: ``out``."""

    hidden: int
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        up = dense(self.hidden, True, self.dtype, "up")(x_BTD)
        y_BTD = dense(x_BTD.shape[-1], True, self.dtype, "down")(ACTIVATIONS[self.activation](up))
        return site(self, "out", y_BTD, inputs=x_BTD)
