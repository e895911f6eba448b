"""Llama's configuration, its Hugging Face form, and its table of tensor names.

Reads LlamaForCausalLM, MistralForCausalLM without a sliding window, and Qwen2ForCausalLM (biases on
query, key and value only).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from lora_jax.errors import UserError
from lora_jax.models.family import TensorSpec
from lora_jax.models.rotary import RopeScaling
from lora_jax.models.stack import REMAT

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
MODEL_TYPES = tuple(_ARCHITECTURES)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a Llama-like decoder.

    Attributes:
      vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, mlp_size: sizes.
        Query heads must be a multiple of key/value heads; head_dim is even, and need not be
        hidden_size / num_heads.
      rope_theta, rope_scaling: rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
      tied: the head is the embedding, transposed.
      attention_bias: biases of query, key and value.
      attention_out_bias: bias of attention's out; None: as attention_bias (as in Llama).
      mlp_bias: biases of gate, up and down.
      max_positions: context length it was trained for, in tokens. Not enforced.
      bos_id, eos_id, pad_id: token ids; eos_id may be several.
      model_type: the Hugging Face family it is written as.
      dtype: computations' dtype; norms' statistics and softmax stay float32.
      remat: "none", "full" or "dots" (see `stack.scanned`).
      unroll: layers per iteration of the compiled loop; num_layers removes the loop.
      attention: implementation of `jax.nn.dot_product_attention`: None, "xla" or "cudnn".
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied: bool = False
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    mlp_bias: bool = False
    max_positions: int = 2048
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    pad_id: int | None = None
    model_type: str = "llama"
    dtype: str = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1
    attention: Literal["xla", "cudnn"] | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even for rotary positions.")
        if self.remat not in REMAT:
            raise UserError(f"remat={self.remat!r} must be one of {', '.join(REMAT)}.")
        if self.unroll < 1:
            raise UserError(f"unroll={self.unroll} must be at least 1.")

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
    model_type = hf.get("model_type", "llama")
    required = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    missing = [key for key in required if hf.get(key) is None]
    if missing:
        raise UserError(f"config.json of this {model_type} model lacks {', '.join(missing)}.")
    theta, scaling, problems = _rope_from_hf(hf)
    problems += _unsupported(hf, model_type)
    if problems:
        raise UserError(
            f"this {model_type} model uses options that lora_jax does not implement: "
            f"{'; '.join(problems)}. Use a checkpoint without them."
        )
    heads = hf["num_attention_heads"]
    eos = hf.get("eos_token_id")
    qwen = model_type == "qwen2"
    return LlamaConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=_get(hf, "num_key_value_heads", 8 if model_type == "mistral" else heads),
        head_dim=_get(hf, "head_dim", hf["hidden_size"] // heads),
        mlp_size=hf["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_get(hf, "rms_norm_eps", 1e-6),
        tied=_get(hf, "tie_word_embeddings", False),
        attention_bias=qwen or (model_type == "llama" and _get(hf, "attention_bias", False)),
        attention_out_bias=False if qwen else None,
        mlp_bias=model_type == "llama" and _get(hf, "mlp_bias", False),
        max_positions=_get(hf, "max_position_embeddings", 2048),
        bos_id=hf.get("bos_token_id"),
        eos_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_id=hf.get("pad_token_id"),
        model_type=model_type,
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """`LlamaConfig` -> config.json's dict, in a form transformers 4 and 5 both read.

    Raises:
      UserError: the biases are a combination the config's model_type cannot express.
    """
    biases = (config.attention_bias, config.out_bias, config.mlp_bias)
    fits = {
        "llama": biases[0] == biases[1],
        "mistral": not any(biases),
        "qwen2": biases == (True, False, False),
    }
    if not fits.get(config.model_type, False):
        raise UserError(
            f"a {config.model_type!r} model of transformers cannot have attention_bias="
            f"{biases[0]}, attention_out_bias={biases[1]}, mlp_bias={biases[2]}; set "
            f"model_type to one of {', '.join(_ARCHITECTURES)} that can."
        )
    hf: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_size,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_hf(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "bos_token_id": config.bos_id,
        "pad_token_id": config.pad_id,
        "eos_token_id": list(config.eos_id) if isinstance(config.eos_id, tuple) else config.eos_id,
    }
    if config.model_type == "llama":
        hf |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    else:
        hf |= {"sliding_window": None}
    return hf


def tensors(config: LlamaConfig) -> list[TensorSpec]:
    """Every tensor of the model: our path, Hugging Face name, how to convert, shape."""
    d, m = config.hidden_size, config.mlp_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention, mlp = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    dense = (
        ("attention/query", attention + "q_proj", (q, d), config.attention_bias),
        ("attention/key", attention + "k_proj", (kv, d), config.attention_bias),
        ("attention/value", attention + "v_proj", (kv, d), config.attention_bias),
        ("attention/out", attention + "o_proj", (d, q), config.out_bias),
        ("mlp/gate", mlp + "gate_proj", (m, d), config.mlp_bias),
        ("mlp/up", mlp + "up_proj", (m, d), config.mlp_bias),
        ("mlp/down", mlp + "down_proj", (d, m), config.mlp_bias),
    )
    norms = (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))
    n = config.num_layers
    rows = [
        TensorSpec("embed/embedding", "model.embed_tokens.weight", "keep", (config.vocab_size, d))
    ]
    for ours, theirs in norms:
        rows.append(
            TensorSpec(
                f"layers/{{i}}/{ours}/scale", f"model.layers.{{i}}.{theirs}.weight", "keep", (d,), n
            )
        )
    for ours, theirs, shape, bias in dense:
        rows.append(
            TensorSpec(f"layers/{{i}}/{ours}/kernel", f"{theirs}.weight", "transpose", shape, n)
        )
        if bias:
            rows.append(
                TensorSpec(f"layers/{{i}}/{ours}/bias", f"{theirs}.bias", "keep", shape[:1], n)
            )
    rows.append(TensorSpec("final_norm/scale", "model.norm.weight", "keep", (d,)))
    if not config.tied:
        rows.append(
            TensorSpec("head/kernel", "lm_head.weight", "transpose", (config.vocab_size, d))
        )
    return rows


def ignored(config: LlamaConfig) -> tuple[str, ...]:
    """Tensors that files may hold besides the table's: old rotary buffers, a tied head's copy."""
    buffers = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    return buffers + ((r"lm_head\.weight",) if config.tied else ())


def _get(hf: dict[str, Any], key: str, default: Any) -> Any:
    """config.json writes null for "the default"."""
    return default if hf.get(key) is None else hf[key]


def _rope_from_hf(hf: dict[str, Any]) -> tuple[float, RopeScaling | None, list[str]]:
    """(theta, scaling, unsupported options) from rope_parameters (transformers 5) or the older
    rope_theta and rope_scaling."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(_get(rope, "rope_theta", _get(hf, "rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    problems = []
    if _get(rope, "partial_rotary_factor", _get(hf, "partial_rotary_factor", 1.0)) != 1.0:
        problems.append("partial_rotary_factor other than 1")
    if kind == "default":
        return theta, None, problems
    needed = {
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if kind not in needed:
        return theta, None, [*problems, f"rope type {kind!r} (only default, linear, llama3)"]
    absent = [key for key in needed[kind] if rope.get(key) is None]
    if absent:
        return theta, None, [*problems, f"rope type {kind!r} without {', '.join(absent)}"]
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"])), problems
    return (
        theta,
        RopeScaling(
            "llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=int(rope["original_max_position_embeddings"]),
        ),
        problems,
    )


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def _unsupported(hf: dict[str, Any], model_type: str) -> list[str]:
    """Options that would change the numbers and that this model does not have."""
    found = []
    if model_type not in _ARCHITECTURES:
        found.append(f"model_type {model_type!r} (only {', '.join(_ARCHITECTURES)})")
    if _get(hf, "hidden_act", "silu") not in ("silu", "swish"):
        found.append(f"hidden_act {hf['hidden_act']!r} (only silu)")
    if _get(hf, "pretraining_tp", 1) != 1:
        found.append(f"pretraining_tp {hf['pretraining_tp']} (only 1)")
    if hf.get("quantization_config"):
        found.append("quantization_config (only unquantised weights)")
    if _get(hf, "attention_dropout", 0.0):
        found.append(f"attention_dropout {hf['attention_dropout']} (only 0)")
    # Mistral and Qwen2 before transformers 5 say so differently; both list layer_types since.
    windowed = model_type == "mistral" or (
        model_type == "qwen2" and _get(hf, "use_sliding_window", False)
    )
    if windowed and hf.get("sliding_window") is not None:
        found.append(f"sliding_window {hf['sliding_window']} (only full attention)")
    elif set(_get(hf, "layer_types", ())) - {"full_attention"}:
        found.append(f"layer_types {sorted(set(hf['layer_types']))} (only full_attention)")
    return found
