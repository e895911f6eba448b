"""The largest eigenvalue of a Hessian, without the Hessian: Lanczos on Hessian-vector products.

In the coordinates that a method trains, such as LoRA's factors: gradient descent with a rate η is
stable along an eigenvector only while η·λ < 2, so λ_max says which rates can be used at all.

LoRA at its start, B = 0, is special. Per target, with y = x·(W + s·A·B), G = ∂L/∂W:

- the A–A block is exactly 0: without B, A changes nothing;
- the A–B block is of first order: d²L[dA, dB] = s·⟨dA·dB, G⟩, so its singular values are s times
  those of G, each r times. Between two targets it is 0;
- the B–B block is the Hessian of W seen through A: s²·d²L/dW²[A·dB, A·dB'], and not 0 for A ≠ 0.

With 0 as its first block H is indefinite wherever G ≠ 0, and where the B–B block is positive
semidefinite λ_max ≥ s·‖G‖₂: the start's curvature is partly a gradient's size, which training takes
away. So measure again after some steps. The Ritz values are of either sign here; `Top` has both
ends, and convergence is judged by the end that is asked for, the greatest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lora_jax.analysis.arrays import dot
from lora_jax.errors import UserError

Tree = Any
_FAILS = 1.648  # the constant of Kuczyński and Woźniakowski's bound


class Top(NamedTuple):
    """What Lanczos found.

    Attributes:
      value: the greatest Ritz value, vᵀ·H·v of a unit v: λ_max is not below it (up to rounding).
      least: the least Ritz value: λ_min is not above it.
      vector: v, as a tree.
      residual: ‖H·v − value·v‖ by a product of its own, so with all rounding in it: some eigenvalue
        lies within so much of `value`.
      upper: λ_max is not above it, but for a probability (`doubt`) over the random start; infinite
        where the steps were too few to say anything. It knows of no gap in the spectrum, and so is
        far wider than the residual.
      steps: products that were taken, besides that of the residual.
      converged: whether the residual is within the tolerance.
    """

    value: float
    least: float
    vector: Tree
    residual: float
    upper: float
    steps: int
    converged: bool


def hessian_product(loss: Callable[..., jax.Array]) -> Callable[..., Tree]:
    """(at, v, *args) -> H·v of `loss(at, *args)` at `at`, forward over reverse.

    A tree like `at`, for about the price of four losses; pure, so it can be jitted and summed over
    batches. `args` are held fixed.
    """
    gradient = jax.grad(loss)

    def product(at: Tree, v: Tree, *args: Any) -> Tree:
        return jax.jvp(lambda x: gradient(x, *args), (at,), (v,))[1]

    return product


def random_direction(key: jax.Array, like: Tree) -> Tree:
    """A tree of normal numbers: its direction is uniform, as `top_eigenvalue` wants it."""

    @jax.jit
    def drawn(key: jax.Array, like: Tree) -> Tree:
        flat, unravel = ravel_pytree(like)
        return unravel(jax.random.normal(key, flat.shape, flat.dtype))

    return drawn(key, like)


def top_eigenvalue(
    product: Callable[[Tree], Tree],
    start: Tree,
    *,
    least: int = 1,
    steps: int = 50,
    tolerance: float = 1e-3,
    doubt: float = 0.01,
) -> Top:
    """λ_max of a symmetric operator on trees, by Lanczos with full reorthogonalisation.

    Each new direction is made orthogonal to all before it, twice: without that rounding brings
    back directions that have converged, as copies of their eigenvalues. Memory: `steps` + 1 trees.
    In the dtype of `start`; the small tridiagonal problem always in float64.

    Args:
      product: v -> H·v.
      start: any direction that is not orthogonal to the eigenvector sought; for `upper` to hold, a
        random one (`random_direction`).
      least, steps: products at least and at most. `upper` wants some 40 for a million dimensions,
        where the residual is often small after ten.
      tolerance: it ends when the residual is within this times |value|.
      doubt: probability that `upper` may fail.

    `upper` is from Kuczyński and Woźniakowski 1992 (SIAM J. Matrix Anal. Appl. 13(4)): after k
    products from a start uniform on the sphere, λ_max − value > ε·(λ_max − λ_min) with probability
    at most 1.648·√n·exp(−√ε·(2k − 1)), for both ends of the spectrum, and for any of the steps at
    which it might have ended.

    Raises UserError for a start of zeros and for a product that is not finite.
    """
    flat, unravel = ravel_pytree(start)
    steps = min(steps, flat.size)
    if steps < 1 or not float(jnp.linalg.norm(flat)) > 0:
        raise UserError("Lanczos needs at least one step, and a start that is not zero")
    basis = jnp.zeros((steps + 1, flat.size), flat.dtype).at[0].set(flat / jnp.linalg.norm(flat))

    # One program each, not one for every shape of leaf.
    parted, joined = jax.jit(unravel), jax.jit(lambda tree: ravel_pytree(tree)[0])

    def applied(v: jax.Array) -> jax.Array:
        return joined(product(parted(v)))

    diagonal: list[float] = []
    beside: list[float] = []
    ritz, weights = np.zeros(1), np.ones((1, 1))
    invariant = False
    for k in range(steps):
        basis, a, b = _extended(basis, jnp.asarray(k), applied(basis[k]))
        diagonal.append(float(a))
        beside.append(float(b))
        if not math.isfinite(diagonal[-1] + beside[-1]):
            raise UserError(
                "the product H·v is not finite: the loss has diverged, or has no second "
                "derivative here"
            )
        ritz, weights = np.linalg.eigh(_tridiagonal(diagonal, beside[:-1]))
        largest = float(np.abs(ritz).max())
        # The span of the basis is then H's own: nothing is left that the start could show.
        invariant = beside[-1] <= 10 * float(jnp.finfo(flat.dtype).eps) * largest
        converged = abs(beside[-1] * weights[-1, -1]) <= tolerance * abs(ritz[-1])
        if invariant or (converged and k + 1 >= least):
            break
    taken = len(diagonal)
    v = dot(jnp.asarray(weights[:, -1], flat.dtype), basis[:taken])
    v = v / jnp.linalg.norm(v)
    residual = float(jnp.linalg.norm(applied(v) - ritz[-1] * v))
    value, lowest = float(ritz[-1]), float(ritz[0])
    error = 0.0 if invariant else _error(flat.size, taken, doubt / (2 * steps), value - lowest)
    return Top(
        value, lowest, parted(v), residual, value + max(error, residual), taken,
        residual <= tolerance * abs(value),
    )  # fmt: skip


@jax.jit
def _extended(
    basis: jax.Array, k: jax.Array, w: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(basis [m, n] with row k + 1, T's entries (k, k) and (k, k + 1)) from w = H·(row k).

    Rows beyond k are zero, and so take no part.
    """
    along = dot(basis, w)
    w = w - dot(along, basis)
    w = w - dot(dot(basis, w), basis)
    size = jnp.linalg.norm(w)
    return basis.at[k + 1].set(w / jnp.where(size > 0, size, 1.0)), along[k], size


def _tridiagonal(diagonal: list[float], beside: list[float]) -> np.ndarray:
    return np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)


def _error(n: int, k: int, doubt: float, spread: float) -> float:
    """By how much the greatest eigenvalue may be above the Ritz value, after k products.

    `spread` is of the Ritz values: that of the eigenvalues is at most spread / (1 − 2·ε).
    """
    epsilon = (max(0.0, math.log(_FAILS * math.sqrt(n) / doubt)) / (2 * k - 1)) ** 2
    return epsilon / (1 - 2 * epsilon) * spread if epsilon < 0.5 else math.inf
