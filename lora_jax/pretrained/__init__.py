"""Readers and writers of pretrained weights: Hugging Face folders, GGUF, the hub, PEFT adapters."""

from lora_jax.pretrained.load import (
    base_sha256,
    build_model,
    draw,
    load_pretrained,
    load_tokenizer,
    save_pretrained,
)
from lora_jax.pretrained.peft import load_adapter, save_adapter
from lora_jax.pretrained.shape import hf_config

__all__ = [
    "base_sha256",
    "build_model",
    "draw",
    "hf_config",
    "load_adapter",
    "load_pretrained",
    "load_tokenizer",
    "save_adapter",
    "save_pretrained",
]
