"""Plots of what training made of the weights: sizes and spectra of a sweep's updates.

Rank, alpha and learning rate act together on the size of ΔW = s·A·B: over it, curves that lie apart
over each of them may fall together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from lora_jax.sweeps import fields as of
from lora_jax.sweeps import plots
from lora_jax.sweeps.fields import RANK, RATE
from lora_jax.sweeps.plots import Plot, Table
from lora_jax.sweeps.updates import means

SHOWN = 3
"""Best settings whose layers are shown."""


def draw(table: Table, updates: pd.DataFrame, folder: Path) -> list[Plot]:
    """PNG files; none where no member that finished has low-rank updates.

    Args:
      updates: of `updates.updates`.
    """
    if updates.empty or table.frame.empty:
        return []
    own = updates[updates["member"].isin(set(table.frame["member"]))]
    if own.empty:
        return []
    found = [_against_metric(table, own, folder)]
    if RANK in table.fields and plots.positive(table.frame[RANK]):
        found.append(_ranks(table, own, folder))
    best = _best(table, own)
    return [*found, _layers(table, own, best, folder), _spectra(table, own, best, folder)]


def _joined(table: Table, updates: pd.DataFrame) -> pd.DataFrame:
    """The table's members with the means of their updates beside them."""
    return table.frame.merge(means(updates), on="member")


def _split(table: Table) -> str | None:
    """The field that tells points apart by colour."""
    return next((k for k in (RATE, RANK, *table.free) if k in table.free), None)


def _against_metric(table: Table, updates: pd.DataFrame, folder: Path) -> Plot:
    frame = _joined(table, updates)
    figure, (left, right) = plots.new_figure(width=8.5, panels=2)
    split = _split(table)
    parts = list(frame.groupby(split)) if split else [("", frame)]
    for colour, (name, part) in zip(plots.shades(len(parts)), parts, strict=True):
        for axes, column in ((left, "update.scale"), (right, "update.relative_norm")):
            axes.scatter(part[column], part[table.metric], s=18, color=colour, label=of.short(name))
    left.set(xlabel="effective scale s", ylabel=table.metric)
    plots.log_axis(left, frame["update.scale"])
    right.set(xlabel="‖s·A·B‖ / ‖W‖, mean over matrices")
    if (frame["update.relative_norm"] > 0).any():  # NaN where a W is zero
        right.set(xscale="log")
        plots.narrow_ticks(right.xaxis)
    if split:
        right.legend(fontsize="small", title=split, title_fontsize="small")
    caption = f"{table.metric} over the effective scale and over the size of the update it led to"
    return plots.save(figure, folder, "update_size", caption)


def _ranks(table: Table, updates: pd.DataFrame, folder: Path) -> Plot:
    frame = _joined(table, updates)
    figure, (left, right) = plots.new_figure(width=9.0, panels=2)
    parts = list(frame.groupby(RATE)) if RATE in table.free else [("", frame)]
    for colour, (name, part) in zip(plots.shades(len(parts)), parts, strict=True):
        for axes, column in ((left, "update.effective_rank"), (right, "update.stable_rank")):
            line = part.groupby(RANK)[column].mean()
            axes.plot(line.index, line, marker="o", color=colour, label=of.short(name))
    for axes, name in ((left, "effective rank"), (right, "stable rank")):
        ranks = sorted(set(frame[RANK]))
        axes.plot(ranks, ranks, color="grey", lw=0.8, ls=":")
        plots.log_axis(axes, frame[RANK])
        axes.set(xlabel=RANK, title=name, yscale="log")
    left.set_ylabel("of ΔW, mean over matrices")
    if RATE in table.free:
        left.legend(fontsize="small", title=RATE, title_fontsize="small")
    caption = "how many of the directions that it has an update uses; dotted: all of them"
    return plots.save(figure, folder, "rank_used", caption)


def _best(table: Table, updates: pd.DataFrame) -> pd.DataFrame:
    """The best member of each of the best settings."""
    have = table.frame[table.frame["member"].isin(set(updates["member"]))]
    order = have.sort_values(table.metric, ascending=not table.higher, kind="stable")
    return (order.drop_duplicates(table.free) if table.free else order).head(SHOWN)


def _panels(table: Table, best: pd.DataFrame) -> tuple[Any, list[tuple[Any, Any]]]:
    """(figure, [(axes, member)]), titled with what the members are."""
    figure, found = plots.new_figure(width=1.0 + 3.0 * len(best), height=3.8, panels=len(best))
    pairs = list(zip([found] if len(best) == 1 else found, best.to_dict("records"), strict=True))
    for axes, row in pairs:
        lines = [of.label([k], row) for k in table.free]
        title = "\n".join([*lines, f"{table.metric} {row[table.metric]:.4g}"])
        axes.set_title(title, fontsize="small", loc="left")
    return figure, pairs


def _modules(pairs: list[tuple[Any, Any]], updates: pd.DataFrame) -> Iterator[Any]:
    """(axes, colour, module, its rows): a module has one colour in all panels."""
    shown = updates[updates["member"].isin([row["member"] for _, row in pairs])]
    modules = list(dict.fromkeys(shown["module"]))
    colours = dict(zip(modules, plots.shades(len(modules)), strict=True))
    for axes, row in pairs:
        for module, part in shown[shown["member"] == row["member"]].groupby("module", sort=False):
            yield axes, colours[module], module, part


def _finish(figure: Any, pairs: list[tuple[Any, Any]], xlabel: str, ylabel: str) -> None:
    for axes, _ in pairs:
        axes.set(xlabel=xlabel, yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
    pairs[0][0].set_ylabel(ylabel)
    plots.legend_below(figure, [axes for axes, _ in pairs])


def _layers(table: Table, updates: pd.DataFrame, best: pd.DataFrame, folder: Path) -> Plot:
    figure, pairs = _panels(table, best)
    for axes, colour, module, part in _modules(pairs, updates):
        layer = part["layer"].fillna(-1).astype(int)
        axes.plot(layer, part["relative_norm"], marker="o", ms=3, color=colour, label=module)
    _finish(figure, pairs, "layer", "‖s·A·B‖ / ‖W‖")
    caption = "the size of the update of each layer, in the best members of the best settings"
    return plots.save(figure, folder, "update_size_per_layer", caption)


def _spectra(table: Table, updates: pd.DataFrame, best: pd.DataFrame, folder: Path) -> Plot:
    figure, pairs = _panels(table, best)
    for axes, colour, module, part in _modules(pairs, updates):
        values = pd.DataFrame(list(part["singular_values"]))
        index = values.columns + 1
        axes.plot(index, values.median(), marker=".", color=colour, label=module)
        axes.fill_between(index, values.min(), values.max(), color=colour, alpha=0.15, lw=0)
    _finish(figure, pairs, "index", "singular values of s·A·B")
    caption = "spectra of the same members' updates: the median layer, and the range of all layers"
    return plots.save(figure, folder, "update_spectra", caption)
