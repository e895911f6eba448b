"""The fields that a sweep varied, as columns of its table: which vary together, and settings.

A setting is one value of every varied field; its members differ in seeds, which are repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

RATE, RANK, ALPHA, TARGETS = (
    "optimizer.learning_rate", "method.rank", "method.alpha", "method.targets",
)  # fmt: skip


def is_seed(key: str) -> bool:
    return key.rsplit(".", 1)[-1].endswith("seed")


def finished(frame: pd.DataFrame, keys: Sequence[str], metric: str) -> pd.DataFrame:
    """The members that finished and have a finite metric, with fields that group and sort.

    A field that is None in some members (no clipping, no quantisation) is one of words: None has
    to be a value like the others, and neither NaN nor None groups or sorts with them.
    """
    done = frame[frame["status"] == "finished"] if "status" in frame else frame
    done = done[np.isfinite(done[metric].astype(float))] if metric in done else done[:0]
    numeric = pd.api.types.is_numeric_dtype
    words = [k for k in keys if k in done and (not numeric(done[k]) or done[k].isna().any())]
    return done.assign(**{k: done[k].map(_word) for k in words})


def _word(value: Any) -> str:
    if isinstance(value, float):
        return "None" if math.isnan(value) else f"{value:g}"
    return str(value)


def varied(frame: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """The fields that take more than one value."""
    there = [k for k in keys if k in frame and not is_seed(k)]
    return [k for k in there if frame[k].nunique(dropna=False) > 1]


def follows(frame: pd.DataFrame, key: str, leader: str) -> bool:
    """Whether the value of one field says that of another, as a rank does where alpha = 2·rank."""
    return bool(frame.groupby(leader, dropna=False)[key].nunique(dropna=False).max() == 1)


def tied(frame: pd.DataFrame, one: str, other: str) -> bool:
    """Whether each follows from the other: no two rows differ in one of them alone."""
    return follows(frame, one, other) and follows(frame, other, one)


def groups(frame: pd.DataFrame, fields: Sequence[str]) -> dict[str, list[str]]:
    """The fields that always vary together, under one of them: the rank if it is among them."""
    found: dict[str, list[str]] = {}
    for key in sorted(fields, key=lambda k: k != RANK):
        for leader, others in found.items():
            if tied(frame, key, leader):
                others.append(key)
                break
        else:
            found[key] = [key]
    return found


def others(frame: pd.DataFrame, keys: Sequence[str], key: str) -> list[str]:
    """The fields to hold while `key` is changed: all but those that are tied to it."""
    return [k for k in keys if k != key and (is_seed(k) or not tied(frame, k, key))]


def settings(frame: pd.DataFrame, fields: Sequence[str], metric: str, higher: bool) -> pd.DataFrame:
    """A row a setting, best first: its fields, the metric's `mean` and `std` (n - 1), `members`."""
    columns = {"mean": (metric, "mean"), "std": (metric, "std"), "members": (metric, "size")}
    if not fields:
        one = frame[metric]
        return pd.DataFrame([{"mean": one.mean(), "std": one.std(), "members": len(one)}])
    found = frame.groupby(list(fields), dropna=False).agg(**columns).reset_index()
    return found.sort_values("mean", ascending=not higher, kind="stable", ignore_index=True)


def best_over_others(table: pd.DataFrame, kept: Sequence[str]) -> pd.DataFrame:
    """Of `settings`, the best row for each combination of some fields, in their order."""
    return table.drop_duplicates(list(kept)).sort_values(list(kept), ignore_index=True)


def label(keys: Sequence[str], row: Any) -> str:
    """The values of some fields in a row: `rank=4, learning_rate=0.002`."""
    return ", ".join(f"{k.rsplit('.', 1)[-1]}={short(row[k])}" for k in keys)


def short(value: Any) -> str:
    """A value in a plot, where two `$`, as of regexes, would have mathematics between them."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("$", r"\$")
