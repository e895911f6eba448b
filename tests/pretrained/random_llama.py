"""A tiny random Llama, made without torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_jax import partition
from lora_jax.pretrained import build_model
from lora_jax.pretrained.assemble import abstract_params
from lora_jax.pretrained.load import family_of

TINY = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def random_model(seed: int = 0, **changes: Any) -> tuple[Any, Any]:
    """(model, params) with entries of size 0.1, and norms around 1."""
    model = build_model({**TINY, **changes})
    like = abstract_params(family_of(model).tensors(model.config))
    rng = np.random.default_rng(seed)
    flat = {
        p: np.float32(0.2 * rng.standard_normal(x.shape) + p.endswith("scale"))
        for p, x in partition.flatten(like).items()
    }
    return model, partition.unflatten_like(like, flat)
