"""Tiny models of transformers', random and written to a folder, that PEFT adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import lora_jax as lj

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 20, "pad_token_id": 1}
LLAMA = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 20,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7) * 5 % 31 + 3


def fresh(kind: tuple[Any, Any, dict[str, int]], folder: Path) -> tuple[Any, Any, Any]:
    """(transformers' model, ours, parameters), from a folder that transformers wrote.

    Args:
      kind: (class of the model, class of its config, sizes); a classifier has three labels.
    """
    import torch

    cls, config, sizes = kind
    if not folder.exists():
        torch.manual_seed(0)
        options = {"num_labels": 3} if "Sequence" in cls.__name__ else {}
        model = cls(config(**sizes, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return cls.from_pretrained(folder).eval(), *lj.load_pretrained(folder)
