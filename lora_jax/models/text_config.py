"""What every family's configuration has, and the heads a model can carry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lora_jax.errors import UserError
from lora_jax.models.stack import REMAT

Head = Literal["lm", "classification", "regression", "pooling"]
SCORING = ("classification", "regression")
HEADS = ("lm", *SCORING, "pooling")

# How transformers calls the classes with each head: its architectures end so.
_ENDINGS: tuple[tuple[str, Head | None], ...] = (
    ("ForCausalLM", "lm"),
    ("LMHeadModel", "lm"),
    ("ForMaskedLM", "lm"),
    ("ForPreTraining", "lm"),
    ("ForSequenceClassification", "classification"),
    ("Model", None),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes and options that all families share.

    Attributes:
      vocab_size, hidden_size, num_layers, num_heads: sizes.
      head: what the model returns: "lm" logits [B, T, V]; "classification" and "regression"
        [B, num_labels]; "pooling" one vector a text [B, D]; None hidden states [B, T, D].
      num_labels: outputs of a scoring head; None: 2 classes, or 1 value for regression.
      tied: the language-model head is the embedding, transposed.
      max_positions: context length it was trained for, in tokens.
      bos_id, eos_id, pad_id: token ids; eos_id may be several.
      model_type: the Hugging Face family it is written as.
      dtype: computations' dtype; norms' statistics and softmax stay float32.
      remat: "none", "full" or "dots" (see `stack.scanned`).
      unroll: layers per iteration of the compiled loop; num_layers removes the loop; None: see
        `stack.iteration`.
      attention: None: `attention.attend`; "xla" or "cudnn": that implementation of
        `jax.nn.dot_product_attention`.
      source: where the weights were loaded from; no part of equality, nor of config.json.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head: Head | None = "lm"
    num_labels: int | None = None
    tied: bool = False
    max_positions: int = 2048
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    pad_id: int | None = None
    model_type: str
    dtype: str = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int | None = None
    attention: Literal["xla", "cudnn"] | None = None
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Layers at which the stack is cut into segments when parameters are made.

        A scoring head reads one position: the last layer, as a segment of its own, computes one
        query, one output of attention and one row of the MLP instead of as many as there are
        tokens.
        """
        scores = self.head in SCORING and self.num_layers > 1
        return (self.num_layers - 1,) if scores else ()

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise UserError(f"remat={self.remat!r} must be one of {', '.join(REMAT)}.")
        if self.unroll is not None and self.unroll < 1:
            raise UserError(f"unroll={self.unroll} must be at least 1.")
        if self.head is not None and self.head not in HEADS:
            raise UserError(f"head={self.head!r} must be None or one of {', '.join(HEADS)}.")
        if self.head not in SCORING:
            if self.num_labels is not None:
                raise UserError(
                    f"num_labels={self.num_labels} needs head='classification' or 'regression', "
                    f"not head={self.head!r}."
                )
        elif self.num_labels is None:
            object.__setattr__(self, "num_labels", 1 if self.head == "regression" else 2)
        elif self.num_labels < 1:
            raise UserError(f"num_labels={self.num_labels} must be at least 1.")


class EqualHeads:
    """For configs whose heads share hidden_size evenly, keys and values as many as queries."""

    hidden_size: int
    num_heads: int

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    def check_heads(self) -> None:
        """UserError where the width does not divide into the heads."""
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}."
            )


def optional(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value of config.json, which writes null for "the default"."""
    return default if hf.get(key) is None else hf[key]


def require(hf: Mapping[str, Any], keys: Sequence[str]) -> None:
    """UserError that names every key that config.json lacks."""
    if missing := [key for key in keys if hf.get(key) is None]:
        raise UserError(
            f"config.json of this {hf.get('model_type')} model lacks {', '.join(missing)}."
        )


def refuse(hf: Mapping[str, Any], problems: Sequence[str]) -> None:
    """UserError that lists every option that would change the numbers and is not implemented, and
    how the weights are quantised if they are. A reader that gives dense ones has taken that out of
    the config (`pretrained.bitsandbytes.Dequantized`)."""
    if quantised := hf.get("quantization_config"):
        by = quantised.get("quant_method", "")
        problems = [*problems, f"quantization_config {by} (only bitsandbytes' nf4)"]
    if problems:
        raise UserError(
            f"this {hf.get('model_type')} model uses options that lora_jax does not implement: "
            f"{'; '.join(problems)}. Use a checkpoint without them."
        )


def head_from_hf(hf: Mapping[str, Any], default: Head | None) -> dict[str, Any]:
    """The fields head and num_labels that config.json's architecture means."""
    architecture = (hf.get("architectures") or [""])[0]
    head = next((h for ending, h in _ENDINGS if architecture.endswith(ending)), default)
    if head != "classification":
        return {"head": head}
    if hf.get("problem_type") == "multi_label_classification":
        refuse(hf, ["problem_type 'multi_label_classification' (only one label a text)"])
    labels = optional(hf, "id2label", None)
    count = len(labels) if labels else optional(hf, "num_labels", 2)
    regression = hf.get("problem_type") == "regression" or count == 1
    return {"head": "regression" if regression else "classification", "num_labels": count}


def head_to_hf(config: TextConfig, stem: str, lm: str) -> dict[str, Any]:
    """config.json's share of the head: `stem` is "Bert", `lm` the ending of its LM class."""
    if config.head not in SCORING:
        return {"architectures": [stem + (lm if config.head == "lm" else "Model")]}
    names = [f"LABEL_{i}" for i in range(config.num_labels or 0)]
    regression = config.head == "regression"
    return {
        "architectures": [f"{stem}ForSequenceClassification"],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "regression" if regression else "single_label_classification",
    }
