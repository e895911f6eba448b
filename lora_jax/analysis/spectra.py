"""Singular values of an update, from its factors, and what they say about its rank."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lora_jax.analysis.arrays import Array, dot, library, ratio, turned


class SVD(NamedTuple):
    """M = U·diag(s)·Vᵀ, thin.

    Attributes:
      u: [..., in, k], directions in the space of inputs (orthonormal columns).
      s: [..., k], falling.
      vt: [..., k, out], directions in the space of outputs (orthonormal rows).
    """

    u: Array
    s: Array
    vt: Array


def svd(m: Array) -> SVD:
    """Of a dense matrix [..., in, out]: k = min(in, out)."""
    return SVD(*library(m).linalg.svd(m, full_matrices=False))


def leading(m: Array, k: int) -> SVD:
    """The first k of `svd(m)`, ten times faster: from the smaller of M·Mᵀ and Mᵀ·M.

    For large singular values: below about √eps of the first (1e-8 with NumPy, which computes
    this in float64) nothing is accurate.
    """
    xp = library(m)
    m = m.astype(np.float64) if xp is np else m
    if m.shape[-2] > m.shape[-1]:
        vt, s, ut = leading(turned(m), k)
        return SVD(turned(ut), s, turned(vt))
    n = m.shape[-2]
    k = min(k, n)
    gram = dot(m, turned(m))
    if xp is np and m.ndim == 2:
        import scipy.linalg  # here: a training run, which needs no part of it, starts sooner

        squares, u = scipy.linalg.eigh(gram, subset_by_index=(n - k, n - 1))
    else:
        squares, u = xp.linalg.eigh(gram)
    s = xp.sqrt(xp.maximum(squares[..., ::-1][..., :k], 0.0))
    u = u[..., ::-1][..., :k]
    return SVD(u, s, ratio(dot(turned(u), m), s[..., None]))


def factored_svd(a: Array, b: Array) -> SVD:
    """Of A·B without forming it: A = Qa·Ra, Bᵀ = Qb·Rb, and the SVD of the small Ra·Rbᵀ.

    O((in + out)·r²). Columns of u and rows of vt beside a singular value of 0 are orthonormal
    and otherwise arbitrary: cut them off at `numerical_rank`.

    Args:
      a: [..., in, r]; b: [..., r, out]. A scale goes into either.
    """
    xp = library(a, b)
    qa, ra = xp.linalg.qr(a)
    qb, rb = xp.linalg.qr(turned(b))
    u, s, vt = xp.linalg.svd(dot(ra, turned(rb)), full_matrices=False)
    return SVD(dot(qa, u), s, dot(vt, turned(qb)))


def singular_values(a: Array, b: Array) -> Array:
    """[..., k] of A·B, falling; as `factored_svd`, without the directions."""
    xp = library(a, b)
    ra, rb = xp.linalg.qr(a, mode="r"), xp.linalg.qr(turned(b), mode="r")
    return xp.linalg.svd(dot(ra, turned(rb)), compute_uv=False)


# Of a spectrum s [..., k], falling. All are 0 where s is.


def norm(s: Array) -> Array:
    """‖M‖_F."""
    xp = library(s)
    return xp.sqrt(xp.sum(s * s, axis=-1))


def numerical_rank(s: Array, tolerance: float = 1e-6) -> Array:
    """How many singular values are above `tolerance` times the first."""
    return library(s).sum(s > tolerance * s[..., :1], axis=-1)


def stable_rank(s: Array) -> Array:
    """‖M‖_F² / ‖M‖₂² (Rudelson and Vershynin 2007): 1 to k; the first direction's dominance."""
    return ratio(library(s).sum(s * s, axis=-1), s[..., 0] ** 2)


def effective_rank(s: Array) -> Array:
    """exp(H(p)) with p = s / Σs, H in nats (Roy and Vetterli 2007, definition 1): 1 to k."""
    return _spread(s)


def entropy_rank(s: Array) -> Array:
    """exp(H(q)) with q = s² / Σs²: the same of the shares of energy.

    q are the eigenvalues of MᵀM over their sum, so H is its von Neumann entropy; never above
    `effective_rank`, since squaring sharpens the shares.
    """
    return _spread(s * s)


def _spread(x: Array) -> Array:
    xp = library(x)
    total = xp.sum(x, axis=-1, keepdims=True)
    p = ratio(x, total)
    entropy = -xp.sum(p * xp.log(xp.where(p > 0, p, 1.0)), axis=-1)
    return xp.where(total[..., 0] > 0, xp.exp(entropy), 0.0)


def energy(s: Array) -> Array:
    """[..., k]: share of ‖M‖_F² in the best approximation of rank 1, 2, …, k (Eckart–Young)."""
    xp = library(s)
    squares = s * s
    return ratio(xp.cumsum(squares, axis=-1), xp.sum(squares, axis=-1, keepdims=True))


def rank_of_energy(s: Array, share: float = 0.9) -> Array:
    """The smallest rank whose best approximation has this share of ‖M‖_F²."""
    xp = library(s)
    rank = xp.sum(energy(s) < share, axis=-1) + 1
    return xp.where(s[..., 0] > 0, xp.minimum(rank, s.shape[-1]), 0)
