"""Data: sources (TFDS, files), tasks (records -> tokens and loss mask), packing and batches.

Each name is imported on first use, so that `import lora_jax.data` loads neither TFDS nor grain.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "Tokenizer": "tokenizer",
    "render": "chat",
    "TFDS": "sources",
    "Files": "sources",
    "TASKS": "tasks",
    "TextToText": "tasks",
    "Chat": "chat",
    "G2P": "tasks",
    "phoneme_error_rate": "metrics",
    "batches": "loader",
    "eval_batches": "loader",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
