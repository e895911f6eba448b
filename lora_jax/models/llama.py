"""Llama (Touvron et al. 2023, arXiv:2302.13971) and its kin: Mistral, Qwen, Gemma.

Parameters (a stack may be split into segments, e.g. ``layers[0:2]`` and ``layers[2:30]``):
``embed/embedding``, ``layers[0:N]/{attention_norm, attention/{query,key,value,out},
mlp_norm, mlp/{gate,up,down}}``, ``final_norm/scale``, and ``head/kernel`` unless tied or absent.
A classification or regression head reads the last token, as transformers' does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.attention import Attention, Context
from lora_jax.models.blocks import GatedMLP
from lora_jax.models.family import Family
from lora_jax.models.llama_config import (
    MODEL_TYPES,
    LlamaConfig,
    config_from_hf,
    config_to_hf,
    ignored,
    tensors,
)
from lora_jax.models.norms import RMSNorm
from lora_jax.models.sites import site
from lora_jax.models.transformer import Cache, Transformer

__all__ = ["FAMILIES", "Block", "Llama", "LlamaConfig", "config_from_hf", "config_to_hf", "tensors"]


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and added to its input."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: Cache | None, context: Context
    ) -> tuple[jax.Array, tuple[Cache | None, jax.Array | None]]:
        """x [B, T, D], this layer's cache -> (x, (cache, see `Context.passed_on`))."""
        c = self.config
        x_BTD = site(self, "in", x_BTD, tokens=context.tokens)
        entered_BTD = x_BTD
        y_BTD = RMSNorm(c.norm_eps, c.dtype, c.norm_offset, name="attention_norm")(x_BTD)
        y_BTD, cache = Attention(
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.attention_bias,
            c.out_bias,
            c.dtype,
            c.attention,
            head_norm_eps=c.norm_eps if c.head_norm else None,
            name="attention",
        )(y_BTD, cache, context)
        x_BTD = context.narrow(x_BTD) + y_BTD
        y_BTD = RMSNorm(c.norm_eps, c.dtype, c.norm_offset, name="mlp_norm")(x_BTD)
        mlp = GatedMLP(c.mlp_size, c.mlp_bias, c.dtype, c.activation, name="mlp")
        x_BTD = site(self, "out", x_BTD + mlp(y_BTD))
        x_BTD, beside = context.passed_on(entered_BTD, x_BTD)
        return x_BTD, (cache, beside)


class Llama(Transformer):
    """A decoder with rotary positions; see `Transformer` for its calls."""

    block = Block

    @nn.nowrap
    def parts(self) -> dict[str, nn.Module]:
        c = self.config
        norm = RMSNorm(c.norm_eps, c.dtype, c.norm_offset)
        return {"final_norm": norm, **self.head_parts()}

    def enter(
        self,
        x_BTD: jax.Array,
        positions: jax.Array,
        token_type_ids: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        if not self.config.scaled_embedding:
            return x_BTD
        # Rounded to the activations' dtype first, as Gemma was trained.
        return x_BTD * jnp.asarray(self.config.hidden_size**0.5, x_BTD.dtype)


FAMILIES = (
    Family(
        "llama",
        MODEL_TYPES,
        config_from_hf,
        config_to_hf,
        Llama,
        tensors,
        ignored,
        prefix=lambda config: "model.",
    ),
)
