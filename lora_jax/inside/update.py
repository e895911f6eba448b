"""What training did to one matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from lora_jax import analysis, partition
from lora_jax.errors import UserError, nearest
from lora_jax.inside.places import located

Side = Literal["a", "b", "in", "out"]
SIDES: tuple[Side, ...] = ("a", "b", "in", "out")


@dataclasses.dataclass(frozen=True)
class Update:
    """ΔW [in, out] of one matrix, y = x·(W + ΔW), on the host.

    Attributes:
      path: of the module, such as `layers/3/attention/query`, or as a file names it.
      layer, module: `path` taken apart: (3, "attention/query"); the layer is None where there
        are no layers.
      factors: (A [in, r], B [r, out]) with ΔW = A·B, any scale in B; None where ΔW is dense.
      difference: gives ΔW, float32; None where there are factors.
      weight: gives the base's W, float32; None where no base is at hand.
    """

    path: str
    layer: int | None
    module: str
    shape: tuple[int, int]
    factors: tuple[np.ndarray, np.ndarray] | None = None
    difference: Callable[[], np.ndarray] | None = None
    weight: Callable[[], np.ndarray] | None = None

    @property
    def rank(self) -> int:
        """r of the factors (columns that are zero do not count), or the most that ΔW can have."""
        return self.factors[0].shape[1] if self.factors else min(self.shape)

    def svd(self) -> analysis.SVD:
        """Of ΔW; through its factors, in float64, where it has them.

        Raises UserError where ΔW holds NaN or infinity, as do the other methods.
        """
        if self.factors is not None:
            a, b = self._wide()
            found = analysis.factored_svd(a, b)
            return found._replace(s=_above_rounding(found.s, a, b))
        return analysis.svd(self._difference())

    def singular_values(self) -> np.ndarray:
        """[k], falling."""
        if self.factors is not None:
            a, b = self._wide()
            return _above_rounding(analysis.singular_values(a, b), a, b)
        return np.linalg.svd(self._difference(), compute_uv=False)

    def directions(self, side: Side, svd: analysis.SVD | None = None) -> np.ndarray:
        """[in or out, k]: singular vectors beside singular values that are not 0.

        Args:
          side: "a" of A, the paper's choice for Figures 3, 4 and 8; "b" of B; "in" and "out" of
            ΔW, in the space of its inputs and of its outputs.
          svd: that of ΔW, where it is at hand.
        """
        if side in ("a", "b") and self.factors is None:
            raise UserError(
                f"{self.path!r} has no factors, so no side {side!r}: take 'in' or 'out'"
            )
        if side == "a":
            found = analysis.svd(self._wide()[0])
        elif side == "b":
            found = analysis.svd(self._wide()[1])
        else:
            found = svd or self.svd()
        k = int(analysis.numerical_rank(found.s))
        return found.u[:, :k] if side in ("a", "in") else found.vt[:k].T

    def core(self, u: np.ndarray, vt: np.ndarray) -> np.ndarray:
        """Uᵀ·ΔW·V of u [in, i] and vt [j, out]: [i, j]."""
        if self.factors is not None:
            a, b = self._wide()
            return (u.T @ a) @ (b @ vt.T)
        return u.T @ self._difference() @ vt.T

    def tuned(self, w: np.ndarray) -> np.ndarray:
        """W + ΔW, which is as large as W."""
        if self.factors is not None:
            return w + self.factors[0] @ self.factors[1]
        return w + self._difference()

    def _wide(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.factors is not None
        a, b = self.factors
        self._check_finite(a, b)
        return a.astype(np.float64), b.astype(np.float64)

    def _difference(self) -> np.ndarray:
        assert self.difference is not None
        delta = self.difference()
        self._check_finite(delta)
        return delta

    def _check_finite(self, *arrays: np.ndarray) -> None:
        if not all(np.isfinite(x).all() for x in arrays):
            raise UserError(
                f"the update of {self.path!r} holds NaN or infinity: its training diverged, or the "
                "file is damaged. Analyse another adapter, or only modules (a regex) without it"
            )


def _above_rounding(s: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """s of A·B, and exactly 0 where it is no more than what rounding leaves of such factors.

    A start taken off again, [A, A0]·[B; −B0], is 0 and would else have a rank of noise.
    """
    largest = float(np.linalg.norm(a) * np.linalg.norm(b))
    return np.where(s > max(*a.shape, *b.shape) * np.finfo(s.dtype).eps * largest, s, 0.0)


def placed(found: Sequence[Update], modules: str | None) -> list[Update]:
    """The updates whose paths match, with layer and module told from all the paths."""
    places = located([x.path for x in found])
    found = [
        dataclasses.replace(x, layer=layer, module=module)
        for x, (layer, module) in zip(found, places, strict=True)
    ]
    if modules is None:
        return found
    pattern = partition.compiled(modules)
    chosen = [x for x in found if pattern.search(x.path)]
    if not chosen:
        raise UserError(
            f"modules: {modules!r} matches nothing; {nearest(modules, {x.path for x in found})}"
        )
    return chosen


def live_columns(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Without the columns that add nothing to A·B; before training, without empty ones alone."""
    of_a, of_b = np.any(a != 0, axis=0), np.any(b != 0, axis=1)
    live = of_a & of_b if np.any(of_a & of_b) else of_a | of_b
    return (a[:, live], b[live]) if np.any(live) else None
