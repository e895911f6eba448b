"""DataFrames of updates: a row a matrix, and a row a singular value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lora_jax import analysis
from lora_jax.inside.of_method import updates
from lora_jax.inside.update import Update


def adapter(
    method: Any,
    trainable: Mapping[str, Any],
    params: Any,
    *,
    dense: bool = False,
    modules: str | None = None,
    layouts: Sequence[tuple[str, str]] = (),
    **options: Any,
) -> pd.DataFrame:
    """`matrices` of what is in memory: of any method and its trainable tree, on its base.

    `dense`, `modules` and `layouts` are of `updates`, the other options of `matrices`.
    """
    found = updates(method, trainable, params, dense=dense, modules=modules, layouts=layouts)
    return matrices(found, **options)


def matrices(
    found: Iterable[Update],
    *,
    weights: bool = True,
    directions: int | None = None,
    k: int = 10,
    epsilon: float = 0.5,
) -> pd.DataFrame:
    """A row a layer and module.

    Columns:
      layer, module, path, d_in, d_out, rank.
      norm ‖ΔW‖_F, spectral_norm ‖ΔW‖₂.
      stable_rank, effective_rank (exp of the entropy of s/Σs), entropy_rank (of s²/Σs²), rank_90
        (what holds 0.9 of ‖ΔW‖_F²): see `lora_jax.analysis`. 0 where ΔW is 0.
      And where the base is at hand, of its W (Hu et al. 2021, Table 7), with U and V the first n
      singular vectors of ΔW (n is its numerical rank, at most `directions`):
      directions, n.
      norm_w ‖W‖_F.
      w_along_delta ‖Uᵀ·W·V‖_F; w_along_w, the same with W's own first n; w_along_random, the root
        mean square over random ones.
      amplification: the norm of ΔW's first n singular values / w_along_delta; without a limit on
        n, ‖ΔW‖_F / w_along_delta (section 7.3). NaN where ΔW is 0.
      similarity_to_w: φ(n, n) of ΔW's and W's first n directions on the side of inputs, beside
        similarity_to_random.
      intruders: of the first k directions of W + ΔW, those whose cosines with all of W's are
        below epsilon (Shuttleworth et al. 2024), on the side of outputs.

    Args:
      weights: False leaves out what needs W: a decomposition as large as it, and part of another.
      directions: at most so many of ΔW's to look for in W; an update of full rank needs a limit,
        since all directions together span whatever W does.
      k, epsilon: of intruders.
    """
    rows = []
    for update in found:
        delta = update.svd()
        row = _spectrum_row(update, delta.s)
        if weights and update.weight is not None:
            row |= _weight_row(update, delta, directions, k, epsilon)
        rows.append(row)
    return frame_of(rows)


def spectra(found: Iterable[Update]) -> pd.DataFrame:
    """A row a singular value of each ΔW: layer, module, path, index from 1, singular_value, energy.

    `energy` is the share of ‖ΔW‖_F² in the best approximation of rank `index`: of a model trained
    whole, how much of its change a rank could hold.
    """
    parts = []
    for update in found:
        s = update.singular_values()
        part = {
            "index": np.arange(1, len(s) + 1),
            "singular_value": s,
            "energy": analysis.energy(s),
        }
        parts.append(pd.DataFrame({**place(update), **part}))
    return frame_of(parts)


def layer_map(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column as a table of modules by layers; matrices outside of layers are left out."""
    inside = frame[frame["layer"].notna()]
    table = inside.pivot(index="module", columns="layer", values=column)
    return table.loc[list(dict.fromkeys(inside["module"]))]


def place(update: Update) -> dict[str, Any]:
    """The columns that say which matrix a row is of."""
    return {"layer": update.layer, "module": update.module, "path": update.path}


def frame_of(rows: Sequence[Mapping[str, Any]] | Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One frame of rows, or of frames, with layers as integers that may be missing."""
    if isinstance(rows[0], pd.DataFrame):
        frame = pd.concat(rows, ignore_index=True)
    else:
        frame = pd.DataFrame(rows)
    return frame.assign(layer=frame["layer"].astype("Int64"))


def _spectrum_row(update: Update, s: np.ndarray) -> dict[str, Any]:
    return {
        **place(update),
        "d_in": update.shape[0],
        "d_out": update.shape[1],
        "rank": update.rank,
        "norm": float(analysis.norm(s)),
        "spectral_norm": float(s[0]),
        "stable_rank": float(analysis.stable_rank(s)),
        "effective_rank": float(analysis.effective_rank(s)),
        "entropy_rank": float(analysis.entropy_rank(s)),
        "rank_90": int(analysis.rank_of_energy(s, 0.9)),
    }


def _weight_row(
    update: Update, delta: analysis.SVD, directions: int | None, k: int, epsilon: float
) -> dict[str, Any]:
    assert update.weight is not None
    w = update.weight()
    of_w, tuned = analysis.svd(w), _first(update.tuned(w), k)
    n = int(analysis.numerical_rank(delta.s))
    n = n if directions is None else min(n, directions)
    norm_w = float(analysis.norm(of_w.s))
    row = {
        "directions": n,
        "norm_w": norm_w,
        "w_along_delta": np.nan,
        "w_along_w": float(analysis.norm(of_w.s[:n])) if n else np.nan,
        "w_along_random": analysis.random_projected_norm(norm_w, *update.shape, n) if n else np.nan,
        "amplification": np.nan,
        "similarity_to_w": np.nan,
        "similarity_to_random": np.nan,
        "intruders": int(analysis.count_intruders(of_w.vt.T, tuned, k=k, epsilon=epsilon)),
    }
    if n:
        u, vt = delta.u[:, :n], delta.vt[:n]
        along = float(analysis.projected_norm(w, u, vt))
        norm = analysis.norm(delta.s[:n])  # of what `along` is along
        row |= {
            "w_along_delta": along,
            "amplification": float(analysis.amplification(norm, along)),
            "similarity_to_w": float(analysis.similarity(of_w.u, u, n, n)),
            "similarity_to_random": analysis.random_similarity(update.shape[0], n, n),
        }
    return row


def _first(m: np.ndarray, k: int) -> np.ndarray:
    """[out, at most k]: the first directions of outputs, none beside a singular value of 0."""
    found = analysis.leading(m, k)
    return found.vt[: int(analysis.numerical_rank(found.s))].T
