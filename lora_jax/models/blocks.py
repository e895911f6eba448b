"""Blocks shared by the families. Axes: B batch, T positions, D model width, V vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.activations import ACTIVATIONS, gated
from lora_jax.models.sites import site

INITIALIZER = nn.initializers.normal(0.02)


def dense(features: int, bias: bool, dtype: Any, name: str) -> nn.Dense:
    """A Dense layer with a 2-D kernel (in, features)."""
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=INITIALIZER, name=name)


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
        inner = gated(self.activation)(gate, up)
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
