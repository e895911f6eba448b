"""Methods: rules about a parameter tree. One file each; see `base.Method` for the protocol."""

from lora_jax.methods.base import METHODS, Counts, Method, method_class, register
from lora_jax.methods.full import FullFineTuning
from lora_jax.methods.lora import LoRA

__all__ = ["METHODS", "Counts", "FullFineTuning", "LoRA", "Method", "method_class", "register"]
