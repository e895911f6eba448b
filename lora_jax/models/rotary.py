"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout.

Scalings: "linear" (positions divided by a factor) and "llama3" (Llama 3.1: low frequencies divided
by the factor, high ones kept, a linear blend in between).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


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
