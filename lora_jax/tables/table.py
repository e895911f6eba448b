"""A table: rows of published numbers beside our own, measured with seeds.

An experiment file defines `table(scale)`; `run` measures what is missing and renders the rest.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import pandas as pd

from lora_jax import config as configs
from lora_jax import statistics
from lora_jax.errors import UserError, nearest
from lora_jax.runs import software
from lora_jax.tables.published import Cited, Published
from lora_jax.tables.work import Computed, Counted, Following, Measured, NotRun, Work, fullest

Scale = Literal["smoke", "small", "paper"]
SCALES: tuple[Scale, ...] = ("smoke", "small", "paper")
COLUMNS = (
    "row", "metric", "published", "status", "measured", "low", "high", "seeds", "trainable_params",
)  # fmt: skip
_SPECIAL = re.compile(r"[][\\.^$*+?{}|()]")  # of a regex; re.escape changes spaces and more, too


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of a table.

    Args:
      row: its label: model and method.
      metric: the column it stands in.
      work: how ours is measured.
      published: where the paper's stands, or None.
      formula: trainable parameters by the paper's formula, to show beside what was counted.
      notes: footnotes of this row alone.
      runs: names the folder of its runs; "": `row`. Rows of the same configs that stand under
        several labels give the same name, and train them once.
    """

    row: str
    metric: str
    work: Work
    published: Published | None = None
    formula: int | None = None
    notes: tuple[str, ...] = ()
    runs: str = ""

    @property
    def name(self) -> str:
        """Its label and metric, as `--rows` finds it."""
        return f"{self.row} / {self.metric}"

    @property
    def folder(self) -> str:
        """Where its runs are: the row's columns share a folder."""
        return re.sub(r"[^A-Za-z0-9.=-]+", "_", self.runs or self.row).strip("_")


@dataclasses.dataclass(frozen=True)
class Claim:
    """ "`better` beats `worse`" in one metric: shown as a paired difference with its interval."""

    better: str
    worse: str
    metric: str


@dataclasses.dataclass(frozen=True)
class Table:
    """What an experiment file's `table(scale)` returns.

    Args:
      title: paper and table.
      statistic: over seeds, as in the paper: "mean" or "median".
      seeds: how many, unless the command says.
      claims: differences to show.
      notes: footnotes of the whole table: where sources disagree, what differs from the paper.
      cost: time on a stated machine, of small and paper scale; see `declared_cost`.
      figures: draws figures of what is filled so far into a folder, and returns their files.
    """

    title: str
    rows: tuple[Row, ...]
    statistic: statistics.Statistic = "mean"
    seeds: int = 3
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()
    cost: str = ""
    figures: Callable[[Filled, Path], Sequence[Path]] | None = None

    def __post_init__(self) -> None:
        names = [(row.row, row.metric) for row in self.rows]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise UserError(f"two rows of {self.title!r} are called {' / '.join(twice[0])}")
        files: dict[tuple[str, str], Row] = {}
        for one in self.rows:
            if not isinstance(one.work, Computed):
                continue  # runs lie in folders named by what they are told
            other = files.setdefault((one.folder, one.work.file), one)
            if not _same_runs(one, other):
                raise UserError(
                    f"the rows {other.row!r} and {one.row!r} of {self.title!r} would share "
                    f"{one.folder}/{one.work.file}: let their labels differ in letters or digits, "
                    "or their functions have different names"
                )
        known = set(names)
        for claim in self.claims:
            for row in (claim.better, claim.worse):
                if (row, claim.metric) not in known:
                    raise UserError(f"a claim names {row!r} with {claim.metric!r}: no such row")

    def declared_cost(self, scale: Scale) -> str:
        """`cost`, but where it follows from the scale, or from rows that train nothing."""
        kinds = {type(row.work) for row in self.rows}
        if kinds <= {NotRun}:
            return "nothing is run"
        if kinds <= {NotRun, Counted}:
            return "a minute at most: shapes alone are counted"
        return "a minute at most" if scale == "smoke" else self.cost


@dataclasses.dataclass(frozen=True)
class Line:
    """A row after it was measured."""

    row: Row
    cited: Cited | None
    measured: Measured
    summary: statistics.Summary | None

    @property
    def standing(self) -> str:
        """One of "measured", "failed", "no number" (of runs that gave none) and "not run"."""
        if self.summary is not None or self.measured.beyond is not None:
            return "measured"
        if self.measured.failed:
            return "failed"
        return "no number" if self.measured.seconds > 0 else "not run"


@dataclasses.dataclass(frozen=True)
class Filled:
    """A table with its numbers."""

    table: Table
    scale: Scale
    lines: tuple[Line, ...]

    def frame(self) -> pd.DataFrame:
        """`COLUMNS`, a row a line; empty cells where there is nothing."""
        cells = pd.DataFrame([_cells(line) for line in self.lines], columns=list(COLUMNS))
        return cells.astype({"trainable_params": "Int64"})  # whole beside empty cells

    @property
    def failed(self) -> tuple[Line, ...]:
        """Lines whose number was to be there, and is not."""
        return tuple(line for line in self.lines if line.measured.failed)

    def differences(self) -> list[tuple[Claim, statistics.Summary | None]]:
        """Each claim with the paired difference better - worse over common seeds."""
        return [
            (c, statistics.paired(*(x.measured.values if x else {} for x in self.of(c))))
            for c in self.table.claims
        ]

    def of(self, claim: Claim) -> list[Line | None]:
        """The lines of a claim, the better first; None for one that is yet to come."""
        lines = {(x.row.row, x.row.metric): x for x in self.lines}
        return [lines.get((name, claim.metric)) for name in (claim.better, claim.worse)]


def _cells(line: Line) -> dict[str, object]:
    summary, cited = line.summary, line.cited
    if summary is None and line.measured.beyond is not None:  # of one seed
        low, high = sorted(line.measured.beyond)
        summary = statistics.Summary(math.nan, low, high, math.nan, len(line.measured.seeds))
    return {
        "row": line.row.row,
        "metric": line.row.metric,
        "published": None if cited is None else cited.value,
        "status": line.standing if cited is None else cited.status,
        "measured": None if summary is None or math.isnan(summary.value) else summary.value,
        "low": None if summary is None or math.isnan(summary.low) else summary.low,
        "high": None if summary is None or math.isnan(summary.high) else summary.high,
        "seeds": 0 if summary is None else summary.n,
        "trainable_params": line.measured.trainable_params,
    }


def _same_runs(one: Row, other: Row) -> bool:
    """Of two rows whose functions keep what they gave in one file: whether they are meant to."""
    if one.row == other.row:
        return True
    calls = [row.work.function for row in (one, other) if isinstance(row.work, Computed)]
    return one.runs == other.runs != "" and calls[0] is calls[1]


def load(spec: str, scale: str) -> Table:
    """The table of an experiment file, `path.py`, at a scale.

    Raises UserError for a file without `table(scale)` or an unknown scale.
    """
    if scale not in SCALES:
        raise UserError(f"--scale is {scale!r}; it must be one of {', '.join(SCALES)}")
    module = configs.load_module(spec)
    if not hasattr(module, "table"):
        raise UserError(f"{spec} defines no table(scale)")
    return module.table(scale)


def run(
    table: Table,
    scale: Scale,
    workdir: Path,
    *,
    rows: str = "",
    seeds: int | None = None,
    progress: bool = True,
    known: Mapping[str, Measured] = MappingProxyType({}),
    earlier: Mapping[str, Measured] = MappingProxyType({}),
    after: Callable[[Filled], object] = lambda _: None,
) -> Filled:
    """Measures what is missing, row by row.

    A row that fails for a reason outside of the program (`UserError`, `OSError`: a download, a
    package that is not here) stands with that reason, and the others are run: see `Filled.failed`.

    Args:
      rows: regex of the rows to measure, over "label / metric"; the others stand as they were
        `earlier`, with the seeds they had, or as not run.
      seeds: in place of the table's own number.
      known: rows that are measured already, by name: see `kept.read`. Those that have all seeds are
        not run, and of those whose runs are a seed's each (`by_seed`) the seeds that are there; one
        that follows from others (`Following`) is made anew from what is there now.
      earlier: what an earlier call gave, by name: see `kept.earlier`.
      after: called with the `Filled` so far after each row: it has what is known or earlier too.

    Raises UserError where `rows` is no regex, or of no row.
    """
    wanted = _pattern(rows, table)
    if seeds is not None and seeds < 1:
        raise UserError(f"--seeds is {seeds}: a number needs one seed or more")
    numbers = list(range(table.seeds if seeds is None else seeds))

    def of(some: Mapping[str, Measured]) -> dict[str, Measured]:
        taken = {name: measured.of(numbers) for name, measured in some.items()}
        return {name: measured for name, measured in taken.items() if measured is not None}

    follow = {row.name for row in table.rows if isinstance(row.work, Following)}
    final = {name: measured for name, measured in of(known).items() if name not in follow}
    # What is not run at all gives its own reason in any case.
    out = {r.name for r in table.rows
           if not wanted.search(r.name) and not isinstance(r.work, NotRun)}  # fmt: skip
    # A row that is left out stands with all seeds it has, and so does one that is yet to be run.
    there = {name: x for name, x in fullest(known, earlier).items() if name not in follow}
    there |= {name: x for name, x in {**of(earlier), **final}.items() if name not in out}
    lines = {r.name: _line(table, r, there[r.name]) for r in table.rows if r.name in there}

    def filled() -> Filled:
        return Filled(table, scale, tuple(lines[r.name] for r in table.rows if r.name in lines))

    for row in table.rows:
        if row.name not in final and row.name not in out:
            work = row.work
            if isinstance(work, Following):
                has = of({n: x.measured for n, x in lines.items() if x.measured.found})
                work = work.given(has)
            had = known.get(row.name) if getattr(work, "by_seed", False) else None
            part = had.of([seed for seed in numbers if seed in had.seeds]) if had else None
            left = [seed for seed in numbers if part is None or seed not in part.seeds]
            measured = _measure(row.name, work, workdir / scale / row.folder, left, progress)
            if part is not None and not measured.failed:
                measured = part.and_more(measured)
            measured = _as_measured_then(measured, earlier.get(row.name))
            lines[row.name] = _line(table, row, measured)
        elif row.name not in lines:
            lines[row.name] = _line(table, row, Measured({}, reason="left out by --rows"))
        after(filled())
    return filled()


def _pattern(rows: str, table: Table) -> re.Pattern[str]:
    try:
        wanted = re.compile(rows)
    except (re.error, OverflowError) as error:
        raise UserError(f"--rows {rows!r} is no regular expression: {error}") from error
    names = [row.name for row in table.rows]
    if not any(wanted.search(name) for name in names):
        raise UserError(f"--rows {rows!r} is of no row of {table.title!r}; {nearest(rows, names)}")
    return wanted


def _measure(name: str, work: Work, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
    if progress:
        print(name, flush=True)
    try:
        found = work.measure(folder, seeds, progress)
        used = (software(),) if found.found else ()
        return dataclasses.replace(found, seeds=tuple(seeds), software=used)
    except (UserError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if progress:
            print(f"failed: {reason}", flush=True)
        return Measured({}, reason=reason, failed=True)


def _as_measured_then(now: Measured, before: Measured | None) -> Measured:
    """With the versions that an earlier call tells of, if it had the same numbers."""
    # As text NaN equals NaN.
    if before and str((before.values, before.summary)) == str((now.values, now.summary)):
        return dataclasses.replace(now, software=before.software)
    return now


def again(failed: Sequence[Line]) -> str:
    """What failed, and how it is run again, in one message."""
    names = [line.row.name for line in failed]
    shown = "; ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    # A row's other metrics, if they are there, are only read.
    labels = dict.fromkeys(_SPECIAL.sub(r"\\\g<0>", line.row.row) for line in failed)
    only = shlex.quote(f"^({'|'.join(labels)}) / ")
    return (
        f"{len(names)} failed: {shown}. The footnotes say why. The same command runs them again, "
        f"with --rows {only} them alone"
    )


def _line(table: Table, row: Row, measured: Measured) -> Line:
    cited = row.published.look_up() if row.published else None
    values = list(measured.values.values())
    summary = measured.summary
    if summary is None and values:
        summary = statistics.summarize(values, table.statistic)
    return Line(row, cited, measured, summary)
