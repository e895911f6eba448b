"""Plots of a sweep's table: the metric over each field, rates per rank, targets, parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lora_jax.sweeps import fields as of
from lora_jax.sweeps.fields import RANK, RATE, TARGETS

LINES = 8
"""More lines than this in one plot cannot be told apart."""
BARS = "bars: standard deviation over seeds"


@dataclasses.dataclass(frozen=True)
class Plot:
    """A PNG file, and what it shows."""

    path: Path
    caption: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A sweep's finished members and what was varied among them.

    Attributes:
      frame: of `report.table`, the rows of `fields.finished`.
      keys: fields that the sweep set.
      metric: the column that is compared.
    """

    frame: pd.DataFrame
    keys: Sequence[str]
    metric: str
    higher: bool

    @classmethod
    def of(cls, frame: pd.DataFrame, keys: Sequence[str], metric: str, higher: bool) -> Table:
        return cls(of.finished(frame, keys, metric), keys, metric, higher)

    @property
    def fields(self) -> list[str]:
        return of.varied(self.frame, self.keys)

    @property
    def free(self) -> list[str]:
        """One of each group of fields that vary together."""
        return list(of.groups(self.frame, self.fields))

    def settings(self, fields: Sequence[str] | None = None) -> pd.DataFrame:
        chosen = self.free if fields is None else fields
        return of.settings(self.frame, chosen, self.metric, self.higher)


def draw(table: Table, folder: Path) -> list[Plot]:
    """PNG files of the members that finished; none where there are none."""
    if table.frame.empty:
        return []
    found = [_over(table, key, folder) for key in table.fields]
    if {RANK, RATE} <= set(table.free) and all(positive(table.frame[k]) for k in (RANK, RATE)):
        found.append(_best_rate(table, folder))
    if TARGETS in table.fields:
        found.append(_ranked(table, folder))
    if "trainable_params" in table.frame and table.frame["trainable_params"].nunique() > 1:
        found.append(_parameters(table, folder))
    return found


def _over(table: Table, key: str, folder: Path) -> Plot:
    """The metric over one field, a line for each combination of those that do not follow from it.

    Where these are too many lines, only the field that matters most beside `key` is told apart.
    """
    rest = of.others(table.frame, [k for k in table.free if k != key], key)
    stats, kept = table.settings([key, *rest]), rest
    if rest and len(stats[rest].drop_duplicates()) > LINES:
        first = (RANK, TARGETS) if key == RATE else (RATE, RANK, TARGETS)
        kept = next(([k] for k in first if k in rest), [])
        if kept and len(stats[kept].drop_duplicates()) > LINES:
            kept = []
    stats = of.best_over_others(stats, [*kept, key])
    figure, axes = new_figure()
    words = not pd.api.types.is_numeric_dtype(stats[key])
    places = {value: at for at, value in enumerate(sorted(stats[key].unique()))}
    colours = shades(len(stats[kept].drop_duplicates()) if kept else 1)
    lines = stats.groupby(kept, sort=True) if kept else [((), stats)]
    for colour, (_, line) in zip(colours, lines, strict=True):
        axes.errorbar(
            line[key].map(places) if words else line[key], line["mean"], line["std"].fillna(0.0),
            label=of.label(kept, line.iloc[0]), marker="o", capsize=3, color=colour,
        )  # fmt: skip
    if words:
        axes.set_xticks(range(len(places)), [_cut(x) for x in places], rotation=20, ha="right")
    elif positive(stats[key]):
        log_axis(axes, stats[key])
    axes.set(xlabel=key, ylabel=table.metric)
    if kept:
        legend_below(figure, [axes])
    left = [k for k in rest if k not in kept]
    caption = f"{table.metric} over {key}; {BARS}"
    if left:
        caption += f"; each point at the best {' and '.join(left)}"
    return save(figure, folder, f"{table.metric}_over_{key.replace('.', '_')}", caption)


def _best_rate(table: Table, folder: Path) -> Plot:
    """The learning rate that is best at each rank, in the mean over seeds and for each seed."""
    figure, axes = new_figure()
    best = of.best_over_others(table.settings(), [RANK])
    seeds = [k for k in table.keys if of.is_seed(k) and table.frame[k].nunique() > 1]
    parts = [part for _, part in table.frame.groupby(seeds)] if seeds else []
    for at, part in enumerate(parts):
        own = dataclasses.replace(table, frame=part).settings(table.free)
        one = of.best_over_others(own, [RANK])
        x = one[RANK] * 1.06 ** (at - (len(parts) - 1) / 2)  # beside each other
        axes.scatter(x, one[RATE], s=14, color="grey", label="each seed" if at == 0 else None)
    axes.plot(best[RANK], best[RATE], marker="o", label="mean over seeds")
    axes.set(xlabel=RANK, ylabel=f"best {RATE}")
    log_axis(axes, best[RANK])
    axes.set_yscale("log")
    ticks_at(axes.yaxis, table.frame[RATE])
    axes.set_ylim(table.frame[RATE].min() / 1.5, table.frame[RATE].max() * 1.5)
    if seeds:
        axes.legend(fontsize="x-small")
    caption = f"the {RATE} with the best {table.metric} at each rank, other fields at their best"
    return save(figure, folder, "best_rate_per_rank", caption)


def _ranked(table: Table, folder: Path) -> Plot:
    """Targets in order: the best that each reaches at any setting."""
    fields = [TARGETS, *(k for k in table.free if k != TARGETS)]
    best = of.best_over_others(table.settings(fields), [TARGETS])
    best = best.sort_values("mean", ascending=table.higher)
    figure, axes = new_figure()
    places = range(len(best))  # not the names: they may be alike as far as they are shown
    axes.barh(places, best["mean"], xerr=best["std"].fillna(0.0), capsize=3)
    axes.set_yticks(places, [_cut(x) for x in best[TARGETS]])
    low, high = best["mean"].min(), best["mean"].max()
    if high > low:
        axes.set_xlim(low - 0.3 * (high - low), high + 0.3 * (high - low))
    axes.set(xlabel=f"best {table.metric}")
    caption = f"targets in order of the best {table.metric} that they reach; {BARS}"
    return save(figure, folder, "targets_ranked", caption)


def _parameters(table: Table, folder: Path) -> Plot:
    figure, axes = new_figure()
    split = next((k for k in ("method.kind", TARGETS, RATE) if k in table.fields), None)
    parts = list(table.frame.groupby(split)) if split else [("", table.frame)]
    for colour, (name, part) in zip(shades(len(parts)), parts, strict=True):
        axes.scatter(
            part["trainable_params"], part[table.metric], label=_cut(name), s=18,
            color=colour,
        )  # fmt: skip
    axes.set(xlabel="trainable parameters", ylabel=table.metric, xscale="log")
    if split:
        axes.legend(fontsize="x-small", title=split, title_fontsize="x-small")
    caption = f"{table.metric} over trainable parameters, a point a member"
    return save(figure, folder, f"{table.metric}_over_parameters", caption)


def differences(gaps: pd.DataFrame, metric: str, folder: Path) -> list[Plot]:
    """Paired differences (`report.differences`) with their intervals; none without any."""
    if gaps.empty:
        return []
    figure, axes = new_figure(height=1.2 + 0.32 * len(gaps), width=7.0)
    names = [
        f"{_last(row['field'])}: {_cut(row['value'])} − {_cut(row['against'])}"
        for _, row in gaps.iterrows()
    ]
    places = list(range(len(gaps)))[::-1]
    errors = [gaps["difference"] - gaps["low"], gaps["high"] - gaps["difference"]]
    errors = [side.fillna(0.0) for side in errors]
    axes.errorbar(gaps["difference"], places, xerr=errors, fmt="o", capsize=3)
    axes.axvline(0.0, color="grey", lw=0.8)
    axes.set_yticks(places, names, fontsize="small")
    axes.set(xlabel=f"difference of {metric}")
    caption = "paired differences from the best value of each field, with 95 % intervals"
    return [save(figure, folder, "paired_differences", caption)]


def _last(field: str) -> str:
    """Names without what is in front of their last dot."""
    return ", ".join(name.rsplit(".", 1)[-1] for name in field.split(", "))


# What all plots of a sweep share.


def positive(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and bool(column.min() > 0)


def log_axis(axes: Any, values: pd.Series) -> None:
    """A logarithmic x axis with a tick at each value."""
    axes.set_xscale("log")
    ticks_at(axes.xaxis, values)


def ticks_at(axis: Any, values: pd.Series) -> None:
    """Ticks of a logarithmic axis at the values themselves, where they are few."""
    few = sorted(set(values))
    if len(few) <= 10:
        axis.set_ticks(few, [_in_digits(x) for x in few], minor=False)
        axis.set_ticks([], minor=True)


def narrow_ticks(axis: Any) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, for a logarithmic axis of two decades or fewer: its
    own labels overlap."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: _in_digits(x)))
    axis.set_minor_locator(ticker.NullLocator())


def _in_digits(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def legend_below(figure: Any, panels: Sequence[Any]) -> None:
    """What lines are, below the figure, where it hides none of them; in as many columns as fit."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    room = int(13 * figure.get_figwidth())  # characters of this size, with a symbol before each
    ncols = max(1, min(len(found), room // (8 + max(map(len, found)))))
    figure.legend(
        found.values(), found, loc="outside lower center", ncols=ncols, fontsize="x-small"
    )


def shades(count: int) -> list[Any]:
    """Colours in order, from dark to light."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * at / max(count - 1, 1)) for at in range(count)]


def _cut(value: Any, width: int = 34) -> str:
    text = of.short(value)
    return text if len(text) <= width else text[: width - 1].rstrip("\\") + "…"


def new_figure(height: float = 4.0, width: float = 6.0, panels: int = 1) -> Any:
    """(figure, axes), or with several panels side by side (figure, [axes])."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True)
    return figure, axes


def save(figure: Any, folder: Path, name: str, caption: str) -> Plot:
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120)
    return Plot(path, caption)
