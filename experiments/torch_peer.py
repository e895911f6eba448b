"""The PEFT arm of the benchmarks: the same weights and batch on torch, written as PEFT's users do.

Imported only where torch, transformers and peft are installed; `reason` says what is missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

TORCH_NAMES = {"query": "q_proj", "value": "v_proj"}


def reason() -> str | None:
    """Why this arm cannot run; None if it can."""
    missing = [n for n in ("torch", "transformers", "peft") if importlib.util.find_spec(n) is None]
    return (
        f"{', '.join(missing)} not installed (pip install 'lora-jax[parity]')" if missing else None
    )


def make_update(
    folder: str, tokens: np.ndarray, *, rank: int, alpha: float, learning_rate: float, dtype: str
) -> Callable[[], float]:
    """A function that makes one AdamW update on the batch and returns the loss."""
    import peft
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    )
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(TORCH_NAMES.values()), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    batch = torch.from_numpy(tokens.astype(np.int64))

    def update() -> float:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return update
