"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout.

Scalings: "linear" (positions divided by a factor) and "llama3" (Llama 3.1: low frequencies divided
by the factor, high ones kept, a linear blend in between).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.text_config import optional


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are rescaled for longer contexts.

    Attributes:
      kind: "linear" or "llama3".
      factor: by how much the context grows.
      low_freq_factor: llama3: wavelengths above original_max_positions / this are fully scaled.
      high_freq_factor: llama3: wavelengths below original_max_positions / this are kept.
      original_max_positions: llama3: context length before the scaling, in tokens.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Angular frequencies, radians a position: float32 [head_dim // 2]."""
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return plain.astype(np.float32)
    if scaling.kind == "linear":
        return (plain / scaling.factor).astype(np.float32)
    turns = scaling.original_max_positions * plain / (2 * math.pi)  # turns in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (plain * (keep + (1.0 - keep) / scaling.factor)).astype(np.float32)


def tables(positions_BT: jax.Array, frequencies_F: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, head_dim // 2]."""
    angles_BTF = positions_BT[:, :, None].astype(jnp.float32) * frequencies_F[None, None, :]
    return jnp.cos(angles_BTF), jnp.sin(angles_BTF)


def rotate(x_BTNH: jax.Array, cos_BTF: jax.Array, sin_BTF: jax.Array) -> jax.Array:
    """Rotates each pair (x[i], x[i + H/2]); computed in float32 or wider, returned in x's dtype."""
    cos, sin = cos_BTF[:, :, None, :], sin_BTF[:, :, None, :]
    wide = x_BTNH.astype(jnp.promote_types(x_BTNH.dtype, jnp.float32))
    first, second = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def scaling_from_hf(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None, list[str]]:
    """(theta, scaling, unsupported options) from rope_parameters (transformers 5) or the older
    rope_theta and rope_scaling."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(optional(rope, "rope_theta", optional(hf, "rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    problems = []
    if optional(rope, "partial_rotary_factor", optional(hf, "partial_rotary_factor", 1.0)) != 1.0:
        problems.append("partial_rotary_factor other than 1")
    if kind == "default":
        return theta, None, problems
    needed = {
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if kind not in needed:
        return theta, None, [*problems, f"rope type {kind!r} (only default, linear, llama3)"]
    absent = [key for key in needed[kind] if rope.get(key) is None]
    if absent:
        return theta, None, [*problems, f"rope type {kind!r} without {', '.join(absent)}"]
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"])), problems
    return (
        theta,
        RopeScaling(
            "llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=int(rope["original_max_position_embeddings"]),
        ),
        problems,
    )


def scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
