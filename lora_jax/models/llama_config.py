"""Llama's configuration, its Hugging Face form, and its table of tensor names.

Reads Llama, Mistral (also with a sliding window), Qwen2 (biases on query, key and value), Qwen3
(norms over each head of query and key) and Gemma (GELU, scaled embedding, norms by 1 + scale).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_jax.errors import UserError
from lora_jax.models.family import TensorSpec, cut, linear, norm
from lora_jax.models.rotary import RopeScaling, scaling_from_hf, scaling_to_hf
from lora_jax.models.text_config import (
    SCORING,
    TextConfig,
    head_from_hf,
    head_to_hf,
    optional,
    refuse,
    require,
)

_GELU = "gelu_pytorch_tanh"
# What a Hugging Face model_type means where config.json does not say it.
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True, "attention_out_bias": False},
    "qwen3": {"head_norm": True},
    "gemma": {"activation": _GELU, "norm_offset": 1.0, "scaled_embedding": True},
}
# Its defaults for what config.json may leave out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen3": {"head_dim": 128},
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
}
_BIASED = ("llama", "qwen3", "gemma")  # attention_bias is an option there
MODEL_TYPES = tuple(_KINDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(TextConfig):
    """Sizes and options of a Llama-like decoder, besides those of `TextConfig`.

    Attributes:
      num_kv_heads, head_dim, mlp_size: sizes. Query heads must be a multiple of key/value heads;
        head_dim is even, and need not be hidden_size / num_heads.
      rope_theta, rope_scaling: rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
      norm_offset: norms multiply by this plus their scale: 1 in Gemma.
      head_norm: an RMSNorm over each head of query and key, before rotation (Qwen3).
      attention_bias: biases of query, key and value.
      attention_out_bias: bias of attention's out; None: as attention_bias (as in Llama).
      mlp_bias: biases of gate, up and down.
      activation: of the MLP's gate, by Hugging Face's name.
      scaled_embedding: whether embeddings are multiplied by sqrt(hidden_size) (Gemma).
      window: tokens that a token sees, itself included (Mistral's sliding window); None: all.
    """

    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    head_norm: bool = False
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    mlp_bias: bool = False
    activation: str = "silu"
    scaled_embedding: bool = False
    window: int | None = None
    model_type: str = "llama"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even for rotary positions.")

    @property
    def out_bias(self) -> bool:
        """Whether attention's out has a bias."""
        return self.attention_bias if self.attention_out_bias is None else self.attention_out_bias


def config_from_hf(hf: dict[str, Any]) -> LlamaConfig:
    """config.json's dict -> `LlamaConfig`.

    Raises:
      UserError: one message that lists every option this model does not implement, or the keys
        that are missing.
    """
    hf = {"model_type": "llama"} | hf
    kind = hf["model_type"]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    require(hf, ("vocab_size", *sizes))
    theta, scaling, problems = scaling_from_hf(hf)
    refuse(hf, problems + _unsupported(hf, kind))
    heads, eos = hf["num_attention_heads"], hf.get("eos_token_id")

    def value(key: str, default: Any) -> Any:
        return optional(hf, key, _DEFAULTS.get(kind, {}).get(key, default))

    options: dict[str, Any] = {
        "attention_bias": kind in _BIASED and value("attention_bias", False),
        "mlp_bias": kind == "llama" and value("mlp_bias", False),
        # Left out, Mistral's window is this; null says that there is none.
        "window": hf.get("sliding_window", 4096) if kind == "mistral" else None,
    }
    # Left out, they are the family's default; null says as many as queries.
    null = "num_key_value_heads" in hf and hf["num_key_value_heads"] is None
    return LlamaConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads if null else value("num_key_value_heads", heads),
        head_dim=value("head_dim", hf["hidden_size"] // heads),
        mlp_size=hf["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=value("rms_norm_eps", 1e-6),
        tied=value("tie_word_embeddings", False),
        max_positions=value("max_position_embeddings", 2048),
        bos_id=hf.get("bos_token_id"),
        eos_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_id=hf.get("pad_token_id"),
        model_type=kind,
        **options | _KINDS[kind] | head_from_hf(hf, "lm"),
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """`LlamaConfig` -> config.json's dict, in a form transformers 4 and 5 both read.

    Raises:
      UserError: the options are a combination the config's model_type cannot express.
    """
    if config.model_type not in _KINDS:
        raise UserError(f"model_type={config.model_type!r} must be one of {', '.join(_KINDS)}.")
    hf: dict[str, Any] = {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_size,
        "hidden_act": config.activation,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling_to_hf(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "bos_token_id": config.bos_id,
        "pad_token_id": config.pad_id,
        "eos_token_id": list(config.eos_id) if isinstance(config.eos_id, tuple) else config.eos_id,
        **head_to_hf(config, config.model_type.capitalize(), "ForCausalLM"),
    }
    if config.model_type in _BIASED:
        hf["attention_bias"] = config.attention_bias
    if config.model_type == "llama":
        hf["mlp_bias"] = config.mlp_bias
    if config.model_type == "mistral":
        hf["sliding_window"] = config.window
    _check_expressible(config, config_from_hf(hf))
    return hf


def _check_expressible(config: LlamaConfig, read: LlamaConfig) -> None:
    """UserError for what a config.json of this model_type would not say."""
    names = [
        f.name
        for f in dataclasses.fields(config)
        if f.name
        in ("attention_bias", "mlp_bias", "window", *(k for d in _KINDS.values() for k in d))
    ]
    lost = [n for n in names if getattr(config, n) != getattr(read, n)]
    if "attention_out_bias" in lost and config.out_bias == read.out_bias:
        lost.remove("attention_out_bias")  # None and its meaning are the same
    if lost:
        raise UserError(
            f"a {config.model_type!r} model of transformers cannot have "
            f"{', '.join(f'{n}={getattr(config, n)}' for n in lost)}; set model_type to one of "
            f"{', '.join(_KINDS)} that can."
        )


def tensors(config: LlamaConfig) -> list[TensorSpec]:
    """Every tensor of the model: our path, Hugging Face name, how to convert, shape."""
    d, m, n = config.hidden_size, config.mlp_size, config.num_layers
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention, mlp = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    kernels = (
        ("attention/query", attention + "q_proj", d, q, config.attention_bias),
        ("attention/key", attention + "k_proj", d, kv, config.attention_bias),
        ("attention/value", attention + "v_proj", d, kv, config.attention_bias),
        ("attention/out", attention + "o_proj", q, d, config.out_bias),
        ("mlp/gate", mlp + "gate_proj", d, m, config.mlp_bias),
        ("mlp/up", mlp + "up_proj", d, m, config.mlp_bias),
        ("mlp/down", mlp + "down_proj", m, d, config.mlp_bias),
    )
    norms = [
        ("attention_norm", "model.layers.{i}.input_layernorm", d),
        ("mlp_norm", "model.layers.{i}.post_attention_layernorm", d),
    ]
    if config.head_norm:
        norms += [
            ("attention/query_norm", attention + "q_norm", config.head_dim),
            ("attention/key_norm", attention + "k_norm", config.head_dim),
        ]
    vocabulary = (config.vocab_size, d)
    rows = [TensorSpec("embed/embedding", "model.embed_tokens.weight", "keep", vocabulary)]
    for ours, theirs, size in norms:
        rows += norm(f"layers/{{i}}/{ours}", theirs, size, bias=False, layers=n)
    for ours, theirs, d_in, d_out, bias in kernels:
        rows += linear(f"layers/{{i}}/{ours}", theirs, d_in, d_out, bias=bias, layers=n)
    rows += norm("final_norm", "model.norm", d, bias=False)
    if config.head == "lm" and not config.tied:
        rows += linear("head", "lm_head", d, config.vocab_size, bias=False)
    if config.head in SCORING:
        rows += linear("head", "score", d, config.num_labels or 0, bias=False, new=True)
    return cut(rows, config.cuts)


def ignored(config: LlamaConfig) -> tuple[str, ...]:
    """Tensors that files may hold besides the table's: old rotary buffers, a tied head's copy, a
    head that is not wanted."""
    found = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
    if config.tied or config.head != "lm":
        found.append(r"lm_head\.weight")
    if config.head not in SCORING:
        found.append(r"score\.weight")
    return tuple(found)


def _unsupported(hf: dict[str, Any], kind: str) -> list[str]:
    """Options that would change the numbers and that this model does not have."""
    if kind not in _KINDS:
        return [f"model_type {kind!r} (only {', '.join(_KINDS)})"]
    found = []
    # Gemma's older files say "gelu" and mean the tanh form, which is what it was trained with.
    acts = ("gelu", "gelu_new", _GELU) if kind == "gemma" else ("silu", "swish")
    if optional(hf, "hidden_act", acts[0]) not in acts:
        found.append(
            f"hidden_act {hf['hidden_act']!r} (only {acts[-1] if kind == 'gemma' else acts[0]})"
        )
    if optional(hf, "pretraining_tp", 1) != 1:
        found.append(f"pretraining_tp {hf['pretraining_tp']} (only 1)")
    if optional(hf, "attention_dropout", 0.0):
        found.append(f"attention_dropout {hf['attention_dropout']} (only 0)")
    if kind == "gemma" and hf.get("use_bidirectional_attention"):
        found.append("use_bidirectional_attention (only causal)")
    if kind in ("qwen2", "qwen3") and optional(hf, "use_sliding_window", False):
        found.append(f"sliding_window {hf.get('sliding_window')} in some layers (only in mistral)")
    mixed = set(optional(hf, "layer_types", ())) - {"full_attention"}
    if mixed and (kind != "mistral" or mixed != {"sliding_attention"}):
        found.append(f"layer_types {sorted(set(hf['layer_types']))} (only full_attention)")
    return found
