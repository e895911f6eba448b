"""BERT's and RoBERTa's configuration, Hugging Face form, and table of tensor names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from lora_jax.errors import UserError
from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.family import TensorSpec, cut, linear, norm
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

_STEMS = {"bert": "Bert", "roberta": "Roberta"}
MODEL_TYPES = tuple(_STEMS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EqualHeads, TextConfig):
    """Sizes and options of an encoder, besides those of `TextConfig`.

    Attributes:
      mlp_size: width of the MLP.
      activation: of the MLP and of the language-model head, by Hugging Face's name.
      norm_eps: epsilon of every LayerNorm.
      max_positions: rows of the table of positions; RoBERTa leaves the first pad_id + 1 unused.
      num_token_types: rows of the table of token types.
      dropout: rate after the embeddings and after each sublayer.
      attention_dropout: rate on attention's probabilities.
      head_dropout: rate before the scoring head's kernels; None: as dropout.
      pooling: for head "pooling": "mean" of the tokens seen, or the first token ("cls").
      normalize: for head "pooling": whether vectors are scaled to length 1.
      further_modules: what sentence-transformers computes besides, which a head "pooling" refuses.
    """

    mlp_size: int
    activation: str = "gelu"
    norm_eps: float = 1e-12
    tied: bool = True
    max_positions: int = 512
    num_token_types: int = 2
    head: Literal["lm", "classification", "regression", "pooling"] | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float | None = None
    pooling: Literal["mean", "cls"] = "mean"
    normalize: bool = False
    further_modules: tuple[str, ...] = ()
    model_type: str = "bert"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_heads()
        if self.head == "pooling" and self.further_modules:
            raise UserError(
                f"this model computes {', '.join(self.further_modules)} besides its pooling, "
                "which is not implemented"
            )
        if self.head == "pooling" and self.pooling not in ("mean", "cls"):
            raise UserError(f"pooling={self.pooling!r} must be 'mean' or 'cls'.")
        if not self.tied:
            raise UserError("an encoder's language-model head is its embedding: tied must be True.")
        if self.is_roberta and self.pad_id is None:
            raise UserError("RoBERTa counts positions from pad_id + 1; give pad_id.")

    @property
    def is_roberta(self) -> bool:
        """Whether it is RoBERTa: other positions, other scoring head, other names."""
        return self.model_type == "roberta"

    @property
    def position_offset(self) -> int:
        """Row of the table that holds position 0."""
        return (self.pad_id or 0) + 1 if self.is_roberta else 0


def config_from_hf(hf: dict[str, Any]) -> BertConfig:
    """config.json's dict -> `BertConfig`.

    Raises:
      UserError: one message that lists every option this model does not implement, or the keys
        that are missing.
    """
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    require(hf, ("vocab_size", *sizes))
    refuse(hf, _unsupported(hf))
    kind = hf["model_type"]
    return BertConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        mlp_size=hf["intermediate_size"],
        activation=optional(hf, "hidden_act", "gelu"),
        norm_eps=optional(hf, "layer_norm_eps", 1e-12),
        max_positions=optional(hf, "max_position_embeddings", 512),
        num_token_types=optional(hf, "type_vocab_size", 2),
        dropout=optional(hf, "hidden_dropout_prob", 0.1),
        attention_dropout=optional(hf, "attention_probs_dropout_prob", 0.1),
        head_dropout=hf.get("classifier_dropout"),
        bos_id=hf.get("bos_token_id"),
        eos_id=hf.get("eos_token_id"),
        pad_id=optional(hf, "pad_token_id", 1 if kind == "roberta" else 0),
        model_type=kind,
        **_pooling(hf.get("sentence_transformers") or {}),
        **head_from_hf(hf, None),
    )


def _pooling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How sentence-transformers pools, as `pretrained.folder` finds it beside config.json."""
    found = {key: settings[key] for key in ("pooling", "normalize") if key in settings}
    return {**found, "further_modules": tuple(settings.get("others", ()))}


def config_to_hf(config: BertConfig) -> dict[str, Any]:
    """`BertConfig` -> config.json's dict."""
    return {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_size,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.num_token_types,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.head_dropout,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
        **head_to_hf(config, _STEMS.get(config.model_type, ""), "ForMaskedLM"),
    }


def tensors(config: BertConfig) -> list[TensorSpec]:
    """Every tensor of the model: our path, Hugging Face name, how to convert, shape."""
    d, m, n = config.hidden_size, config.mlp_size, config.num_layers
    base = prefix(config)
    layer = base + "encoder.layer.{i}."
    rows = [
        TensorSpec(f"{ours}/embedding", f"{base}embeddings.{theirs}.weight", "keep", (size, d))
        for ours, theirs, size in (
            ("embed", "word_embeddings", config.vocab_size),
            ("positions", "position_embeddings", config.max_positions),
            ("token_types", "token_type_embeddings", config.num_token_types),
        )
    ]
    rows += norm("embed_norm", f"{base}embeddings.LayerNorm", d)
    for ours, theirs, d_in, d_out in (
        ("attention/query", "attention.self.query", d, d),
        ("attention/key", "attention.self.key", d, d),
        ("attention/value", "attention.self.value", d, d),
        ("attention/out", "attention.output.dense", d, d),
        ("mlp/up", "intermediate.dense", d, m),
        ("mlp/down", "output.dense", m, d),
    ):
        rows += linear(f"layers/{{i}}/{ours}", layer + theirs, d_in, d_out, layers=n)
    for ours, theirs in (
        ("attention_norm", "attention.output.LayerNorm"),
        ("mlp_norm", "output.LayerNorm"),
    ):
        rows += norm(f"layers/{{i}}/{ours}", layer + theirs, d, layers=n)
    return cut(rows + _head_tensors(config), config.cuts)


def _head_tensors(config: BertConfig) -> list[TensorSpec]:
    d, labels = config.hidden_size, config.num_labels or 0
    if config.head in SCORING:
        dense, out = ("bert.pooler.dense", "classifier")
        if config.is_roberta:
            dense, out = ("classifier.dense", "classifier.out_proj")
        return linear("head/dense", dense, d, d, new=True) + linear(
            "head/out", out, d, labels, new=True
        )
    if config.head != "lm":
        return []
    stem, transform, normed = "cls.predictions", "transform.dense", "transform.LayerNorm"
    if config.is_roberta:
        stem, transform, normed = "lm_head", "dense", "layer_norm"
    bias = TensorSpec("head/bias", f"{stem}.bias", "keep", (config.vocab_size,))
    return [
        *linear("head/dense", f"{stem}.{transform}", d, d),
        *norm("head/norm", f"{stem}.{normed}", d),
        bias,
    ]


def prefix(config: BertConfig) -> str:
    """What the names of all but the head's tensors start with."""
    return f"{config.model_type}."


def ignored(config: BertConfig) -> tuple[str, ...]:
    """Tensors that files may hold besides the table's: buffers, copies of the tied embedding and
    its bias, and the heads that are not wanted."""
    found = [
        r".*embeddings\.(position_ids|token_type_ids)",
        r"(cls\.predictions|lm_head)\.decoder\.(weight|bias)",
        r"cls\.seq_relationship\.(weight|bias)",
    ]
    if config.head != "lm":
        found.append(r"(cls\.predictions|lm_head)\..*")
    if config.head not in SCORING:
        found.append(r"classifier\..*")
    if config.head not in SCORING or config.is_roberta:
        found.append(r"(bert|roberta)\.pooler\..*")
    return tuple(found)


def _unsupported(hf: Mapping[str, Any]) -> list[str]:
    """Options that would change the numbers and that this model does not have."""
    found = []
    if optional(hf, "hidden_act", "gelu") not in ACTIVATIONS:
        found.append(f"hidden_act {hf['hidden_act']!r} (only {', '.join(ACTIVATIONS)})")
    if optional(hf, "position_embedding_type", "absolute") != "absolute":
        found.append(f"position_embedding_type {hf['position_embedding_type']!r} (only absolute)")
    if not optional(hf, "tie_word_embeddings", True):
        found.append("an untied language-model head")
    found += [
        f"{key} (an encoder only)" for key in ("is_decoder", "add_cross_attention") if hf.get(key)
    ]
    return found
