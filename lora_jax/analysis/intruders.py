"""Intruder dimensions (Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning", arXiv:2410.21228)."""

from __future__ import annotations

from lora_jax.analysis.arrays import Array, dot, library, turned


def likeness(base: Array, tuned: Array) -> Array:
    """[..., k]: of each direction of the tuned weight, the largest |cosine| with any of the base's.

    Near 1 for a direction that training kept (whatever its place among the others), small for one
    that it put in.

    Args:
      base: [..., n, p], all singular vectors of W on one side, as orthonormal columns.
      tuned: [..., n, k], of W + ΔW on the same side. The paper takes the left ones of PyTorch's
        (out, in) weights: the output side, our right ones.
    """
    xp = library(base, tuned)
    return xp.max(xp.abs(dot(turned(base), tuned)), axis=-2)


def count_intruders(base: Array, tuned: Array, *, k: int = 10, epsilon: float = 0.5) -> Array:
    """How many of the first k directions of the tuned weight are like none of the base's.

    Args:
      base, tuned: as of `likeness`, in order of falling singular values.
      k: directions looked at.
      epsilon: an intruder's `likeness` is below.
    """
    xp = library(base, tuned)
    return xp.sum(likeness(base, tuned[..., :k]) < epsilon, axis=-1)
