"""BERT (Devlin et al. 2019, arXiv:1810.04805) and RoBERTa (Liu et al. 2019, arXiv:1907.11692).

Sentence encoders such as all-MiniLM-L6-v2 are BERTs: with ``head="pooling"`` they give what
sentence-transformers does (Reimers and Gurevych 2019, arXiv:1908.10084).

Parameters: ``embed/embedding``, ``positions/embedding``, ``token_types/embedding``, ``embed_norm``,
``layers[0:N]/{attention/{query,key,value,out}, attention_norm, mlp/{up,down}, mlp_norm}``; heads:
``head/{dense,out}`` (classification, regression) or ``head/{dense,norm,bias}`` (lm). The dense
layer of BERT's scoring head is what transformers calls the pooler.

Axes: B batch, T tokens, D width, V vocabulary, C outputs of a scoring head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.attention import Attention, Context, default_positions
from lora_jax.models.bert_config import (
    MODEL_TYPES,
    BertConfig,
    config_from_hf,
    config_to_hf,
    ignored,
    prefix,
    tensors,
)
from lora_jax.models.blocks import MLP, Embed, dense
from lora_jax.models.family import Family
from lora_jax.models.norms import LayerNorm
from lora_jax.models.sites import site
from lora_jax.models.text_config import SCORING
from lora_jax.models.transformer import Cache, Transformer

__all__ = ["FAMILIES", "Bert", "BertConfig", "pool"]


def pool(hidden: jax.Array, attention_mask: jax.Array | None, how: str = "mean") -> jax.Array:
    """One vector a text: [B, T, D] -> [B, D].

    Args:
      hidden: hidden states.
      attention_mask: [B, T], nonzero where there is a token; None: everywhere.
      how: "mean" of the tokens, or the first one, "cls".
    """
    if how == "cls":
        return hidden[:, 0]
    if attention_mask is None:
        return jnp.mean(hidden, axis=1)
    weights_BT1 = (attention_mask != 0).astype(hidden.dtype)[:, :, None]
    total = jnp.sum(hidden * weights_BT1, axis=1)
    return total / jnp.maximum(jnp.sum(weights_BT1, axis=1), 1)


class Block(nn.Module):
    """One layer: attention and MLP, each added to its input and then normed."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: Cache | None, context: Context
    ) -> tuple[jax.Array, tuple[Cache | None, jax.Array | None]]:
        """x [B, T, D], no cache -> (x, (no cache, see `Context.passed_on`))."""
        c, off = self.config, context.deterministic
        x_BTD = site(self, "in", x_BTD, tokens=context.tokens)
        entered_BTD = x_BTD
        y_BTD, cache = Attention(
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            True,
            True,
            c.dtype,
            c.attention,
            c.attention_dropout,
            name="attention",
        )(x_BTD, cache, context)
        y_BTD = nn.Dropout(c.dropout, name="attention_dropout")(y_BTD, deterministic=off)
        x_BTD = context.narrow(x_BTD) + y_BTD
        x_BTD = LayerNorm(c.norm_eps, c.dtype, name="attention_norm")(x_BTD)
        y_BTD = MLP(c.mlp_size, c.activation, c.dtype, name="mlp")(x_BTD)
        y_BTD = nn.Dropout(c.dropout, name="mlp_dropout")(y_BTD, deterministic=off)
        x_BTD = LayerNorm(c.norm_eps, c.dtype, name="mlp_norm")(x_BTD + y_BTD)
        x_BTD, beside = context.passed_on(entered_BTD, site(self, "out", x_BTD))
        return x_BTD, (cache, beside)


class ScoringHead(nn.Module):
    """out(tanh(dense(x))) of the first token. Dropout before out; in RoBERTa before dense too."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BD: jax.Array, deterministic: bool) -> jax.Array:
        """[B, D] -> [B, C]."""
        c = self.config
        drop = nn.Dropout(c.dropout if c.head_dropout is None else c.head_dropout)
        if c.is_roberta:
            x_BD = drop(x_BD, deterministic=deterministic)
        x_BD = jnp.tanh(dense(c.hidden_size, True, c.dtype, "dense")(x_BD))
        x_BD = drop(x_BD, deterministic=deterministic)
        return dense(c.num_labels or 0, True, c.dtype, "out")(x_BD)


class MaskedLMHead(nn.Module):
    """norm(act(dense(x))), then the embedding's transpose and a bias of its own."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, embed: Embed) -> jax.Array:
        """[..., D] -> [..., V]."""
        c = self.config
        x = ACTIVATIONS[c.activation if not c.is_roberta else "gelu"](
            dense(c.hidden_size, True, c.dtype, "dense")(x)
        )
        logits = embed.attend(LayerNorm(c.norm_eps, c.dtype, name="norm")(x))
        bias_V = self.param("bias", nn.initializers.zeros, (c.vocab_size,))
        return logits + bias_V.astype(c.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class Bert(Transformer):
    """An encoder; see `Transformer` for its calls. RoBERTa's positions count from 0 here too."""

    block = Block
    causal = False

    @nn.nowrap
    def parts(self) -> dict[str, nn.Module]:
        c = self.config
        found: dict[str, nn.Module] = {
            "positions": Embed(c.max_positions, c.hidden_size, c.dtype),
            "token_types": Embed(c.num_token_types, c.hidden_size, c.dtype),
            "embed_norm": LayerNorm(c.norm_eps, c.dtype),
            "embed_dropout": nn.Dropout(c.dropout),
        }
        if c.head in SCORING:
            found["head"] = ScoringHead(c)
        elif c.head == "lm":
            found["head"] = MaskedLMHead(c)
        return found

    @property
    def position_limit(self) -> int:
        return self.config.max_positions - self.config.position_offset

    @nn.nowrap
    def positions_of(self, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """RoBERTa counts only tokens that are not padding, which itself has position -1."""
        c = self.config
        if segment_ids is not None or not c.is_roberta:
            return default_positions((tokens.shape[0], tokens.shape[1]), segment_ids)
        real_BT = (tokens != c.pad_id).astype(jnp.int32)
        return jnp.cumsum(real_BT, axis=1) * real_BT - 1

    def enter(
        self,
        x_BTD: jax.Array,
        positions: jax.Array,
        token_type_ids: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        c = self.config
        if token_type_ids is None or c.num_token_types == 1:
            token_type_ids = jnp.zeros(positions.shape, jnp.int32)
        x_BTD = x_BTD + self.positions(positions + c.position_offset, use_site=False)
        x_BTD = x_BTD + self.token_types(token_type_ids, use_site=False)
        return self.embed_dropout(self.embed_norm(x_BTD), deterministic=deterministic)

    def leave(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD

    def logits(self, hidden: jax.Array) -> jax.Array:
        if self.config.head != "lm":
            return super().logits(hidden)
        return self.head(hidden, self.embed)

    def read(self, tokens: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        return jnp.zeros(tokens.shape[0], jnp.int32)

    def scores(self, x_BD: jax.Array, deterministic: bool) -> jax.Array:
        return self.head(x_BD, deterministic)

    def pooled(self, hidden: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        c = self.config
        x_BD = pool(hidden, attention_mask, c.pooling)
        if not c.normalize:
            return x_BD
        return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=-1, keepdims=True), 1e-12)


FAMILIES = (
    Family(
        "bert",
        MODEL_TYPES,
        config_from_hf,
        config_to_hf,
        Bert,
        tensors,
        ignored,
        prefix,
        # As Google's TensorFlow checkpoints called a LayerNorm's weights.
        renamed=(
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
    ),
)
