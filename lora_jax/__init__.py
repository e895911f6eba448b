"""lora_jax: LoRA experiments in JAX, for any function of a parameter tree."""

from __future__ import annotations

from typing import Any

from lora_jax import lazy

__version__ = "0.1.0"

# Loaded on first use, so that `import lora_jax` costs what it uses (PEP 562).
_HOME = {
    "UserError": "errors",
    "keep_memory": "host",
    "adapt": "tensors",
    "densify": "tensors",
    "LowRank": "tensors",
    "quantize": "tensors.quantized",
    "LoRA": "methods",
    "FullFineTuning": "methods",
    "METHODS": "methods",
    "merge_error": "methods.merge_error",
    "combine_adapters": "methods.algebra",
    "reduce_rank": "methods.algebra",
    "stack_adapters": "sweeps.adapter_stack",
    "match_budget": "methods.budget",
    "load_pretrained": "pretrained",
    "save_pretrained": "pretrained",
    "load_tokenizer": "pretrained",
    "load_adapter": "pretrained",
    "save_adapter": "pretrained",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
