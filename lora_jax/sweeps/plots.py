"""Plots of a sweep's table: the metric over each field, rates per rank, targets, parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

RATE, RANK, TARGETS = "optimizer.learning_rate", "method.rank", "method.targets"


def varied(frame: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """The fields that take more than one value; seeds are repetitions, not fields."""
    return [
        k
        for k in keys
        if not k.rsplit(".", 1)[-1].endswith("seed") and frame[k].nunique(dropna=False) > 1
    ]


def draw(
    frame: pd.DataFrame, keys: Sequence[str], metric: str, higher_is_better: bool, folder: Path
) -> list[Path]:
    """PNG files of the members that finished; none where the metric is not there."""
    import matplotlib

    matplotlib.use("Agg")
    if metric not in frame or frame[metric].dropna().empty:
        return []
    done = frame[frame["status"] == "finished"] if "status" in frame else frame
    fields = varied(done, keys)
    # None among words (no quantisation, "nf4") is a word too: it has to sort with them.
    words = [k for k in fields if not pd.api.types.is_numeric_dtype(done[k])]
    done = done.assign(**{k: done[k].map(str) for k in words})
    paths = [_over(done, key, fields, metric, folder) for key in fields]
    numbers = [k for k in (RANK, RATE) if k in fields and _positive(done[k])]
    if numbers == [RANK, RATE]:
        paths.append(_best_rate(done, metric, higher_is_better, folder))
    if TARGETS in fields:
        paths.append(_ranked(done, metric, higher_is_better, folder))
    if "trainable_params" in done and done["trainable_params"].nunique() > 1:
        paths.append(_parameters(done, fields, metric, folder))
    return paths


def _over(frame: pd.DataFrame, key: str, fields: Sequence[str], metric: str, folder: Path) -> Path:
    """The metric over one field, a line for each combination of the others."""
    figure, axes = _figure()
    others = [k for k in fields if k != key]
    groups = frame.groupby(others, dropna=False, sort=True) if others else [((), frame)]
    for name, part in groups:
        stats = part.groupby(key, sort=True, dropna=False)[metric].agg(["mean", "std"])
        words = not pd.api.types.is_numeric_dtype(stats.index)
        axes.errorbar(
            range(len(stats)) if words else stats.index,
            stats["mean"], stats["std"].fillna(0.0), label=_label(others, name), marker="o",
            capsize=3,
        )  # fmt: skip
        if words:
            axes.set_xticks(range(len(stats)), [str(x) for x in stats.index], rotation=20)
    if _positive(frame[key]):
        axes.set_xscale("log")
    axes.set(xlabel=key, ylabel=metric)
    if others:
        axes.legend(fontsize="x-small")
    return _save(figure, folder, f"{metric}_over_{key.replace('.', '_')}")


def _best_rate(frame: pd.DataFrame, metric: str, higher: bool, folder: Path) -> Path:
    """The learning rate that is best at each rank, all else averaged."""
    figure, axes = _figure()
    means = frame.groupby([RANK, RATE])[metric].mean().unstack()
    best = means.idxmax(axis=1) if higher else means.idxmin(axis=1)
    axes.plot(best.index, best.to_numpy(), marker="o")
    axes.set(xlabel=RANK, ylabel=f"best {RATE}", xscale="log", yscale="log")
    axes.set_ylim(frame[RATE].min() / 1.5, frame[RATE].max() * 1.5)
    return _save(figure, folder, "best_rate_per_rank")


def _ranked(frame: pd.DataFrame, metric: str, higher: bool, folder: Path) -> Path:
    """Targets in order: the best number that each reaches at any setting, seeds averaged."""
    figure, axes = _figure()
    settings = [k for k in frame.columns if k in (RANK, RATE, "method.alpha", TARGETS)]
    means = frame.groupby(settings, dropna=False)[metric].mean().reset_index()
    best = means.groupby(TARGETS)[metric]
    order = (best.max() if higher else best.min()).sort_values(ascending=higher)
    axes.barh([str(x) for x in order.index], order.to_numpy())
    low, high = order.min(), order.max()
    if high > low:
        axes.set_xlim(low - 0.3 * (high - low), high + 0.1 * (high - low))
    axes.set(xlabel=f"best {metric}")
    return _save(figure, folder, "targets_ranked")


def _parameters(frame: pd.DataFrame, fields: Sequence[str], metric: str, folder: Path) -> Path:
    figure, axes = _figure()
    groups = [k for k in ("method.kind", TARGETS) if k in fields]
    parts = frame.groupby(groups) if groups else [((), frame)]
    for name, part in parts:
        axes.scatter(part["trainable_params"], part[metric], label=_label(groups, name), s=18)
    axes.set(xlabel="trainable parameters", ylabel=metric, xscale="log")
    if groups:
        axes.legend(fontsize="x-small")
    return _save(figure, folder, f"{metric}_over_parameters")


def _positive(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and bool(column.min() > 0)


def _label(keys: Sequence[str], name: Any) -> str | None:
    values = name if isinstance(name, tuple) else (name,)
    return ", ".join(f"{k.split('.')[-1]}={v}" for k, v in zip(keys, values, strict=True)) or None


def _figure() -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(6, 4), layout="constrained")


def _save(figure: Any, folder: Path, name: str) -> Path:
    from matplotlib import pyplot

    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
