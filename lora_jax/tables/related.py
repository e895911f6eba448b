"""Cells that follow from others of the table: means, and whether one column foretells another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import statistics
from lora_jax.errors import UserError
from lora_jax.statistics import Summary
from lora_jax.tables.table import Filled, Line, Row
from lora_jax.tables.work import Measured


@dataclasses.dataclass(frozen=True)
class Correlated:
    """Spearman's ρ between two cells of each of several rows, with its interval over the rows.

    A footnote states the outcome, whichever it is. What is missing of the cells is measured; rows
    without a number are left out, but a threshold that lies beyond what was run (`Searched`) counts
    as the least or the greatest of all.

    Args:
      pairs: (what foretells, what is foretold), rows of the same table.
      there: cells that are measured already, by the row's name: see `given`.
    """

    pairs: Sequence[tuple[Row, Row]]
    there: Mapping[str, Measured] = dataclasses.field(default_factory=dict)

    def given(self, there: Mapping[str, Measured]) -> Correlated:
        return dataclasses.replace(self, there=there)

    def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
        found = [
            (x, y)
            for one, other in self.pairs
            for x, y in [
                [
                    number(_cell(row, self.there, folder.parent, seeds, progress))
                    for row in (one, other)
                ]
            ]
            if x is not None and y is not None
        ]
        beyond = sum(not 0 < y < math.inf for _, y in found if isinstance(y, float))
        rho = statistics.rank_correlation([x for x, _ in found], [y for _, y in found])
        if rho is None:
            reason = f"{len(found)} rows have both numbers: too few, or all alike in one of them"
            return Measured({}, reason=reason)
        note = f"{rho.n} rows: {outcome(rho)}"
        if beyond:
            note += f"; {beyond} of the thresholds lie beyond what was run, and tie there"
        return Measured({}, summary=rho, notes=(note,))


@dataclasses.dataclass(frozen=True)
class Averaged:
    """The mean of several cells, seed by seed, as a table's column of averages.

    What is missing of them is measured; there is no number before all have one of a common seed.

    Args:
      rows: of the same table.
      there: see `Correlated`.
    """

    rows: Sequence[Row]
    there: Mapping[str, Measured] = dataclasses.field(default_factory=dict)

    def given(self, there: Mapping[str, Measured]) -> Averaged:
        return dataclasses.replace(self, there=there)

    def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
        cells = [_cell(row, self.there, folder.parent, seeds, progress) for row in self.rows]
        lacking = [row.metric for row, x in zip(self.rows, cells, strict=True) if not x.values]
        common = set(seeds).intersection(*(cell.values for cell in cells))
        if not common:
            return Measured({}, reason=f"no mean without {', '.join(lacking) or 'a common seed'}")
        means = {s: float(np.mean([c.values[s] for c in cells])) for s in sorted(common)}
        return Measured(means, cells[0].trainable_params)


def _cell(
    row: Row, there: Mapping[str, Measured], folder: Path, seeds: Sequence[int], progress: bool
) -> Measured:
    """What is there of a row or is measured now; nothing where that fails: the row says why."""
    if row.name in there:
        return there[row.name]
    try:
        return row.work.measure(folder / row.folder, seeds, progress)
    except UserError:
        return Measured({})


def outcome(rho: Summary) -> str:
    """What the interval of a rank correlation says."""
    if rho.low > 0:
        return "it foretells the order"
    if rho.high < 0:
        return "it foretells the reverse of the order"
    return "undecided, the interval holds 0"


def number(measured: Measured) -> float | None:
    """A cell's number, or None; of a threshold beyond what was run 0 or infinity."""
    if measured.beyond is not None:
        return measured.beyond[1]
    if measured.summary is not None:
        return measured.summary.value
    return float(np.mean(list(measured.values.values()))) if measured.values else None


_MARKS = "osDP*X"


def scatter(filled: Filled, path: Path, *, multiples: Sequence[float] = ()) -> Sequence[Path]:
    """A panel for each `Correlated` line so far: its cells with their intervals, a colour a row.

    Both axes are logarithmic. An arrow at the edge stands for a threshold beyond what was run. No
    file without such lines.

    Args:
      multiples: dotted lines at so many times what foretells.
    """
    from lora_jax.sweeps.plots import legend_below, narrow_ticks, new_figure, shades

    lines = {(x.row.row, x.row.metric): x for x in filled.lines}
    panels = [x for x in filled.lines if isinstance(x.row.work, Correlated)]
    if not panels:
        return []
    figure, all_axes = new_figure(height=4.5, width=3.2 * len(panels), panels=len(panels))
    for axes, panel in zip(np.atleast_1d(all_axes), panels, strict=True):
        work = panel.row.work
        assert isinstance(work, Correlated)
        shade = shades((len(work.pairs) + len(_MARKS) - 1) // len(_MARKS))
        for i, (x, y) in enumerate(work.pairs):  # few colours can be told apart: with shapes, more
            _point(axes, lines, x, y, shade[i // len(_MARKS)], _MARKS[i % len(_MARKS)])
        x, y = work.pairs[0]
        rho = panel.summary
        title = "no ρ" if rho is None else f"ρ {rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]"
        axes.set(xlabel=x.metric, ylabel=y.metric)
        axes.set_title(f"{panel.row.row}\n{title}", fontsize="small")
        axes.set(xscale="log", yscale="log")
        ends = np.array(axes.get_xlim())
        for factor in multiples:
            label = f"y = {factor:g}·x"
            style = ":" if factor == multiples[0] else "--"
            axes.plot(
                ends, factor * ends, color="grey", linestyle=style, linewidth=0.8, label=label
            )
        if ends[1] < 100 * ends[0]:
            narrow_ticks(axes.xaxis)
    legend_below(figure, list(np.atleast_1d(all_axes)))
    figure.savefig(path, dpi=120)
    return [path]


def _point(
    axes: Any, lines: Mapping[tuple[str, str], Line], one: Row, other: Row, colour: Any, mark: str
) -> None:
    """One row's two cells; nothing where a number is missing."""
    x, y = (lines.get((row.row, row.metric)) for row in (one, other))
    if x is None or y is None:
        return
    at, height = number(x.measured), number(y.measured)
    if at is None or height is None:
        return
    if y.measured.beyond:
        edge, arrow = y.measured.beyond[0], "^" if height else "v"
        axes.plot(at, edge, arrow, color=colour, label=one.row)
        return
    errors = [_error(line.summary) for line in (x, y)]
    axes.errorbar(at, height, xerr=errors[0], yerr=errors[1], fmt=mark, color=colour,
                  elinewidth=0.8, label=one.row)  # fmt: skip


def _error(summary: Summary | None) -> list[list[float]] | None:
    """Lengths of the bars below and above; none where an end is unknown or infinite."""
    if summary is None or not math.isfinite(summary.low + summary.high):
        return None
    return [[max(0.0, summary.value - summary.low)], [max(0.0, summary.high - summary.value)]]
