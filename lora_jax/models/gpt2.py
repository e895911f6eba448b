"""GPT-2 (Radford et al. 2019), and GPT-3 (Brown et al. 2020, arXiv:2005.14165), all layers dense.

Parameters: ``embed/embedding``, ``positions/embedding``, ``layers[0:N]/{attention_norm,
attention/{query,key,value,out}, mlp_norm, mlp/{up,down}}``, ``final_norm``, and ``head/kernel``
unless tied. Hugging Face keeps query, key and value in one tensor, c_attn; here they are three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.attention import Attention, Context
from lora_jax.models.blocks import MLP, Embed
from lora_jax.models.family import Family, TensorSpec, cut, linear, norm
from lora_jax.models.norms import LayerNorm
from lora_jax.models.sites import site
from lora_jax.models.text_config import (
    SCORING,
    EqualHeads,
    TextConfig,
    head_from_hf,
    head_to_hf,
    optional,
    refuse,
    require,
)
from lora_jax.models.transformer import Cache, Transformer

__all__ = ["FAMILIES", "GPT2", "GPT2Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(EqualHeads, TextConfig):
    """Sizes and options of a GPT-2, besides those of `TextConfig`.

    Attributes:
      mlp_size: width of the MLP; None: 4 hidden_size.
      activation: of the MLP, by Hugging Face's name.
      norm_eps: epsilon of every LayerNorm.
      max_positions: rows of the table of positions.
      dropout: rate after the embeddings.
      residual_dropout: rate after each sublayer.
      attention_dropout: rate on attention's probabilities.
    """

    mlp_size: int | None = None
    activation: str = "gelu_new"
    norm_eps: float = 1e-5
    tied: bool = True
    max_positions: int = 1024
    dropout: float = 0.1
    residual_dropout: float = 0.1
    attention_dropout: float = 0.1
    model_type: str = "gpt2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_heads()
        if self.mlp_size is None:
            object.__setattr__(self, "mlp_size", 4 * self.hidden_size)


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and added to its input."""

    config: GPT2Config

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: Cache | None, context: Context
    ) -> tuple[jax.Array, tuple[Cache | None, jax.Array | None]]:
        """x [B, T, D], this layer's cache -> (x, (cache, see `Context.passed_on`))."""
        c, off = self.config, context.deterministic
        x_BTD = site(self, "in", x_BTD, tokens=context.tokens)
        entered_BTD = x_BTD
        y_BTD = LayerNorm(c.norm_eps, c.dtype, name="attention_norm")(x_BTD)
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
        )(y_BTD, cache, context)
        x_BTD = context.narrow(x_BTD) + nn.Dropout(c.residual_dropout)(y_BTD, deterministic=off)
        y_BTD = LayerNorm(c.norm_eps, c.dtype, name="mlp_norm")(x_BTD)
        y_BTD = MLP(c.mlp_size or 0, c.activation, c.dtype, name="mlp")(y_BTD)
        x_BTD = x_BTD + nn.Dropout(c.residual_dropout)(y_BTD, deterministic=off)
        x_BTD, beside = context.passed_on(entered_BTD, site(self, "out", x_BTD))
        return x_BTD, (cache, beside)


class GPT2(Transformer):
    """A decoder with learned positions; see `Transformer` for its calls."""

    block = Block

    @nn.nowrap
    def parts(self) -> dict[str, nn.Module]:
        c = self.config
        return {
            "positions": Embed(c.max_positions, c.hidden_size, c.dtype),
            "embed_dropout": nn.Dropout(c.dropout),
            "final_norm": LayerNorm(c.norm_eps, c.dtype),
            **self.head_parts(),
        }

    @property
    def position_limit(self) -> int:
        return self.config.max_positions

    def enter(
        self,
        x_BTD: jax.Array,
        positions: jax.Array,
        token_type_ids: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        x_BTD = x_BTD + self.positions(positions, use_site=False)
        return self.embed_dropout(x_BTD, deterministic=deterministic)


def config_from_hf(hf: dict[str, Any]) -> GPT2Config:
    """config.json's dict -> `GPT2Config`.

    Raises:
      UserError: one message that lists every option this model does not implement, or the keys
        that are missing.
    """
    require(hf, ("vocab_size", "n_embd", "n_layer", "n_head"))
    refuse(hf, _unsupported(hf))
    return GPT2Config(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["n_embd"],
        num_layers=hf["n_layer"],
        num_heads=hf["n_head"],
        mlp_size=hf.get("n_inner"),
        activation=optional(hf, "activation_function", "gelu_new"),
        norm_eps=optional(hf, "layer_norm_epsilon", 1e-5),
        tied=optional(hf, "tie_word_embeddings", True),
        max_positions=optional(hf, "n_positions", 1024),
        dropout=optional(hf, "embd_pdrop", 0.1),
        residual_dropout=optional(hf, "resid_pdrop", 0.1),
        attention_dropout=optional(hf, "attn_pdrop", 0.1),
        bos_id=hf.get("bos_token_id"),
        eos_id=hf.get("eos_token_id"),
        pad_id=hf.get("pad_token_id"),
        **head_from_hf(hf, "lm"),
    )


def config_to_hf(config: GPT2Config) -> dict[str, Any]:
    """`GPT2Config` -> config.json's dict."""
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_size,
        "n_positions": config.max_positions,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.residual_dropout,
        "attn_pdrop": config.attention_dropout,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
        **head_to_hf(config, "GPT2", "LMHeadModel"),
    }


def tensors(config: GPT2Config) -> list[TensorSpec]:
    """Every tensor of the model. GPT-2's Conv1D stores kernels (in, out), as we do."""
    d, m, n = config.hidden_size, config.mlp_size or 0, config.num_layers
    layer = "transformer.h.{i}."

    def conv(path: str, name: str, d_in: int, d_out: int, part: Any = None) -> list[TensorSpec]:
        ours, theirs = f"layers/{{i}}/{path}", layer + name
        return [
            TensorSpec(f"{ours}/kernel", f"{theirs}.weight", "keep", (d_in, d_out), n, part),
            TensorSpec(f"{ours}/bias", f"{theirs}.bias", "keep", (d_out,), n, part),
        ]

    rows = [
        TensorSpec("embed/embedding", "transformer.wte.weight", "keep", (config.vocab_size, d)),
        TensorSpec(
            "positions/embedding", "transformer.wpe.weight", "keep", (config.max_positions, d)
        ),
        *norm("layers/{i}/attention_norm", layer + "ln_1", d, layers=n),
    ]
    for k, name in enumerate(("query", "key", "value")):
        rows += conv(f"attention/{name}", "attn.c_attn", d, 3 * d, (k, 3))
    rows += [
        *conv("attention/out", "attn.c_proj", d, d),
        *norm("layers/{i}/mlp_norm", layer + "ln_2", d, layers=n),
        *conv("mlp/up", "mlp.c_fc", d, m),
        *conv("mlp/down", "mlp.c_proj", m, d),
        *norm("final_norm", "transformer.ln_f", d),
    ]
    if config.head == "lm" and not config.tied:
        rows += linear("head", "lm_head", d, config.vocab_size, bias=False)
    if config.head in SCORING:
        rows += linear("head", "score", d, config.num_labels or 0, bias=False, new=True)
    return cut(rows, config.cuts)


def ignored(config: GPT2Config) -> tuple[str, ...]:
    """Tensors that files may hold besides the table's: the causal mask as buffers, a tied head's
    copy, a head that is not wanted."""
    found = [r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"]
    if config.tied or config.head != "lm":
        found.append(r"lm_head\.weight")
    if config.head not in SCORING:
        found.append(r"score\.weight")
    return tuple(found)


def _unsupported(hf: Mapping[str, Any]) -> list[str]:
    """Options that would change the numbers and that this model does not have."""
    found = []
    if optional(hf, "activation_function", "gelu_new") not in ACTIVATIONS:
        found.append(f"activation_function {hf['activation_function']!r}")
    if not optional(hf, "scale_attn_weights", True):
        found.append("scale_attn_weights false (only true)")
    keys = ("scale_attn_by_inverse_layer_idx", "add_cross_attention")
    return found + [key for key in keys if hf.get(key)]


FAMILIES = (
    Family(
        "gpt2",
        ("gpt2",),
        config_from_hf,
        config_to_hf,
        GPT2,
        tensors,
        ignored,
        prefix=lambda config: "transformer.",
        inputs_first=True,
    ),
)
