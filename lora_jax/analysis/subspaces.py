"""How far two subspaces coincide (Hu et al. 2021, section 7.2 and appendix G)."""

from __future__ import annotations

import numpy as np

from lora_jax.analysis.arrays import Array, dot, library, ratio, turned
from lora_jax.errors import UserError


def similarity(u: Array, v: Array, i: int, j: int) -> Array:
    """φ(i, j) = ‖U_iᵀ·V_j‖_F² / min(i, j), between 0 and 1 (eq. 4).

    1 where the smaller of the two spans lies in the larger, 0 where they are orthogonal. It is
    1 − d²/min(i, j) with d the projection metric of Grassmannians.

    Args:
      u: [..., n, p] and v: [..., n, q], orthonormal columns in order of importance, such as the
        singular vectors of two A's. Their first i and j are compared.

    Raises UserError for an i or j that is not among the columns.
    """
    for count, columns in ((i, u.shape[-1]), (j, v.shape[-1])):
        if not 1 <= count <= columns:
            raise UserError(f"φ({i}, {j}) needs as many directions: there are {columns}")
    xp = library(u, v)
    overlap = dot(turned(u[..., :i]), v[..., :j])
    return xp.sum(overlap**2, axis=(-2, -1)) / min(i, j)


def similarities(u: Array, v: Array) -> Array:
    """[..., p, q]: φ(i, j) for i = 1 … p and j = 1 … q at once: a heat map of Figures 3 to 8."""
    xp = library(u, v)
    overlap = dot(turned(u), v) ** 2
    p, q = overlap.shape[-2:]
    smaller = np.minimum(np.arange(1, p + 1)[:, None], np.arange(1, q + 1)[None])
    sums = xp.cumsum(xp.cumsum(overlap, axis=-2), axis=-1)
    return sums / smaller.astype(sums.dtype).reshape((1,) * (sums.ndim - 2) + (p, q))


def random_similarity(n: int, i: int, j: int) -> float:
    """The expectation of φ(i, j) where one of the two is spanned by Gaussian vectors in R^n.

    ‖U_iᵀ·V_j‖_F² is i·j squared cosines of mean 1/n each, so φ is max(i, j)/n on average: a large
    rank looks similar to anything, and a similarity says something only beside this.
    """
    return max(i, j) / n


def gaussian_directions(seed: int, n: int, r: int) -> np.ndarray:
    """[n, r]: the left singular vectors of a Gaussian matrix, the baseline of Figure 4 (right)."""
    drawn = np.random.default_rng(seed).standard_normal((n, r))
    return np.linalg.svd(drawn, full_matrices=False)[0]


def captured_energy(core: Array, total: Array) -> Array:
    """‖Uᵀ·M·V‖_F² / ‖M‖_F²: the share of M inside the spans of U and V, between 0 and 1.

    At most the share of M's own best approximation of that rank (`energy`), and r²/(in·out) on
    average where U and V are random.

    Args:
      core: Uᵀ·M·V, [..., r, r'].
      total: ‖M‖_F, [...].
    """
    xp = library(core, total)
    return ratio(xp.sum(core * core, axis=(-2, -1)), total**2)
