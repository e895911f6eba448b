"""What training made of each weight of a sweep's members: the lines of their `spectra.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from lora_jax.inside.places import located
from lora_jax.runs import RESULT
from lora_jax.sweeps.grid import Member
from lora_jax.training.reports import SPECTRA_FILE, read_metrics

CSV = "updates.csv"
NUMBERS = ("scale", "norm", "relative_norm", "stable_rank", "effective_rank")


def updates(members: Iterable[Member], folder: Path) -> pd.DataFrame:
    """A row a matrix of each member with a result, at the evaluation that its adapter is of.

    Columns: member, step, path, layer, module, rank, `NUMBERS`, singular_values (a list); see
    `training.spectra`. Empty where no member has a low-rank update.
    """
    parts = [part for member in members if (part := _of_member(folder / member.name)) is not None]
    if not parts:
        return pd.DataFrame()
    frame = pd.concat(parts, ignore_index=True)
    places = dict(zip(paths := list(frame["path"].unique()), located(paths), strict=True))
    layers, modules = zip(*(places[p] for p in frame["path"]), strict=True)
    frame.insert(3, "layer", pd.array(layers, dtype="Int64"))
    frame.insert(4, "module", list(modules))
    return frame


def _of_member(folder: Path) -> pd.DataFrame | None:
    if not (folder / RESULT).exists() or not (folder / SPECTRA_FILE).exists():
        return None
    result = json.loads((folder / RESULT).read_text())
    lines = {line["step"]: line["matrices"] for line in read_metrics(folder / SPECTRA_FILE)}
    best = result["config"]["training"]["keep"] == "best" and result.get("best_step")
    step = best if best in lines else max(lines)
    frame = pd.DataFrame(lines[step])
    frame.insert(0, "member", folder.name)
    frame.insert(1, "step", step)
    return frame


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a member: the means over its matrices of `NUMBERS`, to join to the sweep's table."""
    return frame.groupby("member")[list(NUMBERS)].mean().add_prefix("update.").reset_index()
