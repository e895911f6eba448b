"""What an update has to do with the weight it stands beside (Hu et al. 2021, section 7.3)."""

from __future__ import annotations

import math

from lora_jax.analysis.arrays import Array, dot, library, turned


def projected_norm(w: Array, u: Array, vt: Array) -> Array:
    """‖Uᵀ·W·V‖_F: how much of W lies along the directions U and V (Table 7).

    U and V are ΔW's singular vectors, W's own first ones (it is then the norm of W's first
    singular values) or random.

    Args:
      w: [..., in, out]. u: [..., in, r] and vt: [..., r, out], orthonormal.
    """
    xp = library(w, u, vt)
    core = dot(dot(turned(u), w), turned(vt))
    return xp.sqrt(xp.sum(core * core, axis=(-2, -1)))


def random_projected_norm(norm_w: float, n_in: int, n_out: int, r: int) -> float:
    """The root mean square of `projected_norm` over random U and V: r·‖W‖_F / √(in·out)."""
    return r * norm_w / math.sqrt(n_in * n_out)


def amplification(norm_delta: Array, projected: Array) -> Array:
    """‖ΔW‖_F / ‖Uᵀ·W·V‖_F with ΔW's own U and V: by how much it scales what W has there.

    Section 7.3: 6.91 / 0.32 = 21.5 for GPT-3's W_q at rank 4. Infinite where W has nothing there.
    """
    xp = library(norm_delta, projected)
    safe = xp.where(projected == 0, 1.0, projected)
    return xp.where(projected == 0, xp.inf, norm_delta / safe)
