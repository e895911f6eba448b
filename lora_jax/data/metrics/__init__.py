"""Metrics: pure functions of predictions and references."""

from __future__ import annotations

from lora_jax.data.metrics.matching import edit_distance, exact_match, phoneme_error_rate

__all__ = ["edit_distance", "exact_match", "phoneme_error_rate"]
