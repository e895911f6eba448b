"""`lora-jax analyze`: tables of an adapter, and of two side by side, printed and as CSV and PNG."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from lora_jax.errors import UserError
from lora_jax.inside import comparing, frames, opening, plots
from lora_jax.inside.update import SIDES, Side, Update
from lora_jax.progress import drawable

T = TypeVar("T")
_SHOWN = (
    "layer", "module", "rank", "norm", "stable_rank", "effective_rank", "entropy_rank", "rank_90",
    "amplification", "similarity_to_w", "similarity_to_random", "intruders",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What to analyse, and against what.

    Attributes:
      against: another path; its adapter is compared with this one, matrix by matrix.
      base: the base of both, where they are not runs; see `open_updates`.
      dense, modules: see `updates`.
      weights: False leaves out what needs decompositions of the base's weights.
      side: of similarities; None: "a", the paper's, or "in" where an update has no factors.
      directions, k, epsilon: see `matrices`.
      progress: a bar where it takes long.
    """

    against: str | None = None
    base: str | None = None
    dense: bool = False
    modules: str | None = None
    weights: bool = True
    side: Side | None = None
    directions: int | None = None
    k: int = 10
    epsilon: float = 0.5
    progress: bool = True

    def __post_init__(self) -> None:
        if self.side is not None and self.side not in SIDES:
            raise UserError(f"side must be one of {', '.join(SIDES)}, not {self.side!r}")
        for name, count in (("--top (k)", self.k), ("--directions", self.directions)):
            if count is not None and count < 1:
                raise UserError(f"{name} is {count}: look at one direction or more")


def analyze(
    path: str | os.PathLike[str], out: str | os.PathLike[str] | None, options: Options
) -> dict[str, pd.DataFrame]:
    """Prints the tables and returns them by name; with `out`, writes each as CSV, and the plots.

    Names: matrices, spectra; with `against`, against (`compare`). With `out` also what only its
    plots need: similarity_to_base (of the layers shown there), where the base is at hand and
    `weights` is set; against_spectra and similarity, with `against`.

    Raises:
      UserError: see `open_updates` and `compare`; `out` is a file.
    """
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"{out} is a file: choose a folder")
    base = options.base
    if base is None:  # of the run that is one of the two
        base = next((b for p in (path, options.against) if p and (b := opening.base_of(p))), None)
    mine = _open(path, base, options)
    tables = {
        "matrices": frames.matrices(
            _shown(mine, "matrices", options), weights=options.weights,
            directions=options.directions, k=options.k, epsilon=options.epsilon,
        ),
        "spectra": frames.spectra(mine),
    }  # fmt: skip
    print(f"{path}: {len(mine)} matrices")
    print(_text(tables["matrices"][[c for c in _SHOWN if c in tables["matrices"]]]))
    theirs: list[Update] = []
    if options.against is not None:
        # Nothing is asked of their base: let go of it.
        theirs = [
            dataclasses.replace(x, weight=None) for x in _open(options.against, base, options)
        ]
        both = comparing.pairs(mine, theirs)
        tables["against"] = comparing.of_pairs(_shown(both, "comparison", options))
        common = len(tables["against"])
        print(
            f"\nagainst {options.against} ({len(theirs)} matrices, {common} of them in common): "
            "similarity φ, and what is captured of its energy"
        )
        print(_text(tables["against"].drop(columns="path")))
    if out is not None:
        _write(Path(out), tables, mine, theirs, options)
        print(f"\ntables and plots are in {out}")
    return tables


def _open(path: str | os.PathLike[str], base: str | None, options: Options) -> list[Update]:
    own = options.base is None and opening.is_run(path)
    return opening.open_updates(
        path, base=None if own else base, dense=options.dense, modules=options.modules
    )


def _write(
    out: Path,
    tables: dict[str, pd.DataFrame],
    mine: list[Update],
    theirs: list[Update],
    options: Options,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"spectra": plots.spectra(tables["spectra"])}
    figures["energy"] = plots.spectra(tables["spectra"], "energy")
    matrices = tables["matrices"]
    if matrices["layer"].notna().any():
        figures["maps"] = plots.maps(matrices)
    if options.weights and all(x.weight is not None for x in mine):
        side, layers = _side(mine, options), set(plots.some_layers(x.layer for x in mine))
        chosen = [x for x in mine if x.layer in layers] if layers else mine
        found = comparing.similarity_to_base(_shown(chosen, "base", options), side)
        tables["similarity_to_base"] = found
        if not found.empty:  # as it is of an adapter that was never trained
            names = (f"i of W ({side})", "j of ΔW")
            figures["similarity_to_base"] = plots.similarities(
                found, _sizes(mine, side), names=names
            )
    if theirs:
        side = _side([*mine, *theirs], options)
        tables["against_spectra"] = frames.spectra(theirs)
        figures["against_energy"] = plots.spectra(tables["against_spectra"], "energy")
        tables["similarity"] = comparing.similarity(mine, theirs, side)
        found, names = tables["similarity"], (f"i of this ({side})", "j of the other")
        if not found.empty:
            figures["similarity"] = plots.similarities(found, _sizes(mine, side), names=names)
        if tables["against"]["layer"].notna().any():
            shown = [f"{side}_first", f"{side}_all", "captured", "best"]
            figures["against_maps"] = plots.maps(tables["against"], shown)
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=120)


def _side(found: Iterable[Update], options: Options) -> Side:
    if options.side is not None:
        return options.side
    return "a" if all(x.factors is not None for x in found) else "in"


def _sizes(found: Iterable[Update], side: Side) -> dict[str, int]:
    """The dimension of each module's space."""
    return {x.module: x.shape[0 if side in ("a", "in") else 1] for x in found}


def _shown(found: list[T], what: str, options: Options) -> Iterable[T]:
    if len(found) < 8 or not drawable(options.progress):
        return found
    from rich.progress import track

    return track(found, what, transient=True)


def _text(frame: pd.DataFrame) -> str:
    return frame.to_string(index=False, float_format=lambda x: f"{x:.3g}", na_rep="-")
