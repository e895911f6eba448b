"""Weights as values that know how to multiply, and the interpreter that lets them."""

from lora_jax.tensors.adapt import adapt
from lora_jax.tensors.base import Weight, WeightError, densify, is_weight
from lora_jax.tensors.low_rank import LowRank

__all__ = ["LowRank", "Weight", "WeightError", "adapt", "densify", "is_weight"]
