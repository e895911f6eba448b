"""Data: sources (TFDS, files), tasks (records -> tokens and loss mask), packing and batches.

Each name is imported on first use, so that `import lora_jax.data` loads neither TFDS nor grain.
"""

from __future__ import annotations

from typing import Any

from lora_jax import lazy

_HOMES = {
    "Tokenizer": "tokenizer",
    "render": "chat",
    "TFDS": "sources",
    "Files": "sources",
    "TASKS": "tasks",
    "TextToText": "tasks.text_to_text",
    "Chat": "tasks.chat",
    "G2P": "tasks.g2p",
    "Glue": "tasks.glue",
    "E2E": "tasks.e2e",
    "Classification": "tasks.classification",
    "Regression": "tasks.regression",
    "ImageClassification": "tasks.image_classification",
    "Text": "tasks.text",
    "phoneme_error_rate": "metrics",
    "batches": "loader",
    "eval_batches": "loader",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
