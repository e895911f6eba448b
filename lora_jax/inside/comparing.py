"""Two adapters side by side, or one beside its base: do they change the same directions?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from lora_jax import analysis
from lora_jax.errors import UserError
from lora_jax.inside.frames import frame_of, place
from lora_jax.inside.update import SIDES, Side, Update


def compare(one: Iterable[Update], other: Iterable[Update]) -> pd.DataFrame:
    """A row a matrix that both change.

    Columns:
      layer, module, path, rank, rank_other.
      For each side (a, b, in, out; see `Update.directions`): `{side}_first` φ(1, 1), `{side}_all`
        φ(r, r') of all directions of both, and `{side}_random`, what φ(r, r') is on average of
        random ones (LoRA paper, section 7.2, eq. 4). a and b where both have factors.
      captured: the share of the other's ‖ΔW‖_F² inside the directions of this one; best: the
        largest that its rank could capture; captured_random: on average, of random directions.
        With a model trained whole as the other: how much of that this adapter could be.

    Raises:
      UserError: they have no matrix of equal name and size in common.
    """
    return of_pairs(pairs(one, other))


def of_pairs(both: Iterable[tuple[Update, Update]]) -> pd.DataFrame:
    """`compare` of what `pairs` found, taken one after the other."""
    return frame_of([_row(mine, theirs) for mine, theirs in both])


def pairs(one: Iterable[Update], other: Iterable[Update]) -> list[tuple[Update, Update]]:
    """The updates of the same matrix, in the order of the first."""
    one, by_path = list(one), {x.path: x for x in other}
    both = [(x, by_path[x.path]) for x in one if x.path in by_path]
    if both and all(x.shape != y.shape for x, y in both):
        x, y = both[0]
        raise UserError(
            f"{x.path} is {list(x.shape)} in one and {list(y.shape)} in the other, and no matrix "
            "is of equal size in both: these are adapters of bases of different shapes; compare "
            "two of the same base"
        )
    both = [(x, y) for x, y in both if x.shape == y.shape]
    if not both:
        mine, theirs = (x[0].path if x else "nothing" for x in (one, list(by_path.values())))
        raise UserError(
            f"no matrix in common: one changes {mine}, …, the other {theirs}, …. Names agree where "
            "both are read on the same base (--base), or both without one"
        )
    return both


def similarity(
    one: Iterable[Update], other: Iterable[Update], side: Side = "a", most: int = 64
) -> pd.DataFrame:
    """φ(i, j) of the first i and j directions, each up to `most`, of every matrix.

    A heat map each: Figures 3, 4, 6 and 7 of the LoRA paper.

    Columns: layer, module, path, i and j from 1, phi.
    """
    found = [
        _grid(mine, mine.directions(side)[:, :most], theirs.directions(side)[:, :most])
        for mine, theirs in pairs(one, other)
    ]
    return frame_of(found)


def similarity_to_base(found: Iterable[Update], side: Side = "a", most: int = 64) -> pd.DataFrame:
    """As `similarity`, between the base's W (i) and the update (j): Figure 8.

    Sides a and in are compared with W's singular vectors on the side of inputs, b and out with
    those on the side of outputs.
    """
    parts = []
    for update in found:
        if update.weight is None:
            raise UserError("no base is at hand: give one")
        of_w = analysis.svd(update.weight())
        theirs = of_w.u if side in ("a", "in") else of_w.vt.T
        parts.append(_grid(update, theirs[:, :most], update.directions(side)[:, :most]))
    return frame_of(parts)


def _row(mine: Update, theirs: Update) -> dict[str, Any]:
    row: dict[str, Any] = {**place(mine), "rank": mine.rank, "rank_other": theirs.rank}
    ours, others = mine.svd(), theirs.svd()
    factored = mine.factors is not None and theirs.factors is not None
    for side in SIDES if factored else ("in", "out"):
        u, v = mine.directions(side, ours), theirs.directions(side, others)
        row |= _similarity_row(side, u, v)
    n = int(analysis.numerical_rank(ours.s))
    core = theirs.core(ours.u[:, :n], ours.vt[:n])
    best = analysis.energy(others.s)
    return row | {
        "captured": float(analysis.captured_energy(core, analysis.norm(others.s))),
        "best": float(best[min(n, len(best)) - 1]) if n else 0.0,
        "captured_random": n * n / (mine.shape[0] * mine.shape[1]),
    }


def _similarity_row(side: str, u: np.ndarray, v: np.ndarray) -> dict[str, float]:
    i, j = u.shape[1], v.shape[1]
    names = (f"{side}_first", f"{side}_all", f"{side}_random")
    if not i or not j:
        return dict.fromkeys(names, np.nan)
    values = (
        analysis.similarity(u, v, 1, 1),
        analysis.similarity(u, v, i, j),
        analysis.random_similarity(len(u), i, j),
    )
    return {name: float(x) for name, x in zip(names, values, strict=True)}


def _grid(update: Update, u: np.ndarray, v: np.ndarray) -> pd.DataFrame:
    phi = analysis.similarities(u, v)
    i, j = np.indices(phi.shape) + 1
    return pd.DataFrame({**place(update), "i": i.ravel(), "j": j.ravel(), "phi": phi.ravel()})
