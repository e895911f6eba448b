"""Whether one column foretells another: the correlation, what it says, and thresholds beyond."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lora_jax import tables
from lora_jax.errors import UserError
from lora_jax.statistics import rank_correlation
from lora_jax.sweeps.threshold import Run, Target, threshold
from lora_jax.tables import NotRun, Row, Table, kept, render
from lora_jax.tables.related import Averaged, Correlated, scatter
from lora_jax.tables.work import Measured


def test_spearmans_rho_by_hand_and_with_ties() -> None:
    found = rank_correlation([1, 2, 3, 4, 5], [10, 30, 20, 50, 40])
    assert found is not None and found.value == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert found.low < found.value < found.high <= 1 and found.n == 5
    beyond = rank_correlation([1, 2, 3, 4], [0.0, 0.0, 5.0, math.inf])
    assert beyond is not None and beyond.value == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    lacking = rank_correlation([1, 2, 9, 3, 4, 5], [10, 30, math.nan, 20, 50, 40])
    assert lacking == found


def test_perfect_order_of_few_is_no_certainty() -> None:
    few, many = (rank_correlation(range(n), range(n)) for n in (4, 12))
    assert few is not None and many is not None and few.value == many.value == few.high == 1.0
    assert few.low < 0 < many.low < 1


@pytest.mark.parametrize(("x", "y"), [([1, 2, 3], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4])])
def test_too_few_or_all_alike_say_nothing(x: list[float], y: list[float]) -> None:
    assert rank_correlation(x, y) is None


def test_the_interval_covers() -> None:
    """Normal pairs of ρ_s = 0.58 (r = 0.6): near 95 % of the intervals from 12 pairs hold it."""
    rng, held = np.random.default_rng(0), 0
    true = 6 / math.pi * math.asin(0.6 / 2)
    for _ in range(600):
        x = rng.normal(size=12)
        y = 0.6 * x + 0.8 * rng.normal(size=12)
        found = rank_correlation(list(x), list(y))
        assert found is not None
        held += found.low <= true <= found.high
    assert 0.92 <= held / 600 <= 0.98


class Given:
    """A cell that is known, or cannot be measured."""

    def __init__(self, *values: float):
        self.values = values

    def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
        if not self.values:
            raise UserError("not here")
        return Measured(dict(enumerate(self.values)))


class Searching:
    """A search that ended with this metric at sizes 1 and 8; the target is 0.9."""

    def __init__(self, *metrics: float):
        self.runs = [Run(size, 0, x) for size, x in zip((1, 8), metrics, strict=True)]

    def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
        found = threshold(self.runs, Target((1.0,)))
        if found.size is None:
            beyond = (8.0, math.inf) if found.status == "not reached" else (1.0, 0.0)
            return Measured({}, reason=found.status, beyond=beyond)
        return Measured({0: found.size})


def filled(
    works: Sequence[tuple[tables.work.Work, tables.work.Work]], folder: Path
) -> tables.table.Filled:
    pairs = [
        (tables.Row(f"case {i}", "rank", x), tables.Row(f"case {i}", "r90", y))
        for i, (x, y) in enumerate(works)
    ]
    related = tables.Row("all", "rank with r90", Correlated(pairs))
    table = tables.Table("t", (*(row for pair in pairs for row in pair), related), seeds=1)
    return tables.run(table, "smoke", folder, progress=False)


SEARCHES = (Searching(0.95, 0.99), Searching(0.85, 0.95), Searching(0.7, 0.95), Searching(0.1, 0.2))


def test_thresholds_beyond_what_was_run_count_as_ends(tmp_path: Path) -> None:
    """One is reached by the smallest, one not at all: with the two between, in perfect order."""
    ranks = (Given(1.0), Given(2.0, 3.0), Given(4.0), Given(5.0))
    found = filled([*zip(ranks, SEARCHES, strict=True), (Given(), SEARCHES[0])], tmp_path)
    last = found.lines[-1]
    assert last.summary.value == 1.0 and last.summary.n == 4
    assert "undecided" in last.measured.notes[0] and "2 of the thresholds" in last.measured.notes[0]
    files = scatter(found, tmp_path / "x.png", multiples=(1.0,))
    assert files[0].stat().st_size > 5000
    # Another machine's file says so too.
    render.write(found, tmp_path, "t")
    known = kept.read([tmp_path / "t.json"], found.table, "smoke")
    assert [known[f"case {i} / r90"].beyond for i in (0, 3)] == [(1.0, 0.0), (8.0, math.inf)]
    again = tables.run(found.table, "smoke", tmp_path / "x", progress=False, known=known)
    assert again.lines[-1].summary == last.summary
    assert again.lines[7].measured.reason == "not reached"


@pytest.mark.parametrize(("sign", "said"), [(1, "foretells the order"), (-1, "the reverse")])
def test_the_outcome_is_stated_either_way(tmp_path: Path, sign: int, said: str) -> None:
    works = [(Given(float(i)), Given(float(sign * i))) for i in range(1, 9)]
    last = filled(works, tmp_path).lines[-1]
    assert said in last.measured.notes[0] and last.summary.value == sign


def test_too_few_rows_say_so(tmp_path: Path) -> None:
    last = filled([(Given(1.0), Given(2.0)), (Given(), Given(1.0))], tmp_path).lines[-1]
    assert last.summary is None and "1 rows have both numbers" in last.measured.reason


def test_a_mean_of_cells_is_taken_seed_by_seed(tmp_path: Path) -> None:
    """Over the seeds that all have; one that is left out or fails is named."""
    cells = {"a": {0: 1.0, 1: 2.0}, "b": {0: 3.0, 1: 5.0, 2: 9.0}}

    class Cell:
        def __init__(self, values: dict[int, float]):
            self.values = values

        def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
            return Measured(self.values, 7)

    rows = [Row("r", name, Cell(values)) for name, values in cells.items()]
    table = Table("t", (*rows, Row("r", "Avg", Averaged(tuple(rows)))))
    line = tables.run(table, "small", tmp_path, progress=False).lines[-1]
    assert line.measured.values == {0: 2.0, 1: 3.5} and line.measured.trainable_params == 7
    rows.append(Row("r", "c", NotRun("why")))
    table = Table("t", (*rows, Row("r", "Avg", Averaged(tuple(rows)))))
    line = tables.run(table, "small", tmp_path, progress=False).lines[-1]
    assert line.measured.reason == "no mean without c" and not line.measured.failed
