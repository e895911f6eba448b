"""A search runs what is missing and no more, saves what it found, and is drawn beside others."""

from __future__ import annotations

import itertools
import json
import math
import types
from pathlib import Path
from typing import Any

import pytest

from lora_jax.errors import UserError
from lora_jax.sweeps import smallest, smallest_plots
from lora_jax.sweeps.ladder import Ladder
from lora_jax.sweeps.smallest import Found, Smallest
from lora_jax.sweeps.sweep import Options
from lora_jax.sweeps.threshold import Run, Target, Threshold


class FakeSweep:
    """Members whose metric is log10(d) / 4 + a little for the seed: 0.9 at d = 10^3.6."""

    trained: list[int] = []  # noqa: RUF012
    broken: dict[int, dict[str, Any]] = {}  # noqa: RUF012
    sweeps = 0

    def __init__(self, base: Any, sweeps: Any, folder: Path, *_: Any):
        self.folder, self.task = folder, types.SimpleNamespace(principal="accuracy")
        pairs = itertools.product(sweeps["size"], sweeps["seed"])
        self.grid = [
            types.SimpleNamespace(name=f"{a['d']}-{b['seed']}", d=a["d"], seed=b["seed"])
            for a, b in pairs
        ]

    @property
    def waiting(self) -> list[Any]:
        return [m for m in self.grid if smallest.search.result(self.folder, m) is None]

    def run(self) -> None:
        FakeSweep.sweeps += 1
        for member in self.grid:
            path = self.folder / member.name / "result.json"
            if path.exists():
                continue
            self.trained.append(member.d)
            path.parent.mkdir(parents=True)
            result = {"status": "finished",
                      "metrics": {"accuracy": math.log10(member.d) / 4 + 0.001 * member.seed},
                      "trainable_params": member.d + 10, "converged": member.seed == 0}  # fmt: skip
            path.write_text(json.dumps(self.broken.get(member.d, result)))


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Smallest:
    monkeypatch.setattr(smallest, "Sweep", FakeSweep)
    FakeSweep.trained, FakeSweep.broken, FakeSweep.sweeps = [], {}, 0
    ladder = Ladder(1000, 10_000, points=3, parts=4, ratio=1.4)
    return Smallest({}, "d", ladder, [{"seed": 0}, {"seed": 1}])


def test_rounds_close_in_and_nothing_runs_twice(search: Smallest, tmp_path: Path) -> None:
    found = search.run(Target((1.0,)), tmp_path)
    assert found.threshold.status == "reached"
    assert found.threshold.size == pytest.approx(10 ** (4 * (0.9 - 0.0005)), rel=1e-3)
    # Three of the grid, then three between the two around it; each with both seeds.
    assert len(set(FakeSweep.trained)) == 6 and len(FakeSweep.trained) == 12
    assert found.converged == 0.5 and found.parameters[1000] == 1010
    again = search.run(Target((1.0,)), tmp_path)
    assert again == found and len(FakeSweep.trained) == 12 and FakeSweep.sweeps == 2
    search.run(Target((0.9,)), tmp_path)  # the grid is there: only what is around 10^3.24 is run
    assert len(FakeSweep.trained) == 18


def test_saved_and_read_again(search: Smallest, tmp_path: Path) -> None:
    reached = search.run(Target((1.0,), (0.5,)), tmp_path)
    beyond = search.run(Target((2.0,)), tmp_path)
    assert (beyond.threshold.size, beyond.threshold.high) == (None, math.inf)
    for number, found in enumerate((reached, beyond)):
        path = tmp_path / f"{number}.json"
        found.save(path)
        assert smallest.load(path) == found
        assert "Infinity" not in path.read_text().replace('"Infinity"', "")


def test_parameters_between_sizes_that_were_run(search: Smallest, tmp_path: Path) -> None:
    found = search.run(Target((1.0,)), tmp_path)
    assert found.parameters_at(1000) == 1010 and found.parameters_at(1500) == pytest.approx(1510)
    assert found.parameters_at(0.0) == 0.0 and math.isinf(found.parameters_at(math.inf))


def test_runs_without_a_metric(search: Smallest, tmp_path: Path) -> None:
    FakeSweep.broken = {1000: {"status": "diverged: step 3", "metrics": {}}}
    with pytest.raises(UserError, match="d=1000, seed 0, diverged"):
        search.run(Target((1.0,)), tmp_path)
    counted = smallest.dataclasses.replace(search, diverged=0.1)
    assert {r.metric for r in counted.run(Target((1.0,)), tmp_path).runs if r.size == 1000} == {0.1}
    FakeSweep.broken = {}
    named = smallest.dataclasses.replace(search, metric="accurracy")
    with pytest.raises(UserError, match="no metric 'accurracy'; they have accuracy"):
        named.run(Target((1.0,)), tmp_path / "other")


@pytest.mark.parametrize("options", [{"random": 9}, {"halving": (1, 2)}, {"dry": True}])
def test_a_search_leaves_no_member_out(
    search: Smallest, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=f"no {next(iter(options))}"):
        search.run(Target((1.0,)), tmp_path, Options(**options))


def found(name: str, size: float | None, low: float, high: float) -> Found:
    status = "reached" if size else "not reached"
    runs = tuple(Run(s, 0, m) for s, m in ((10, 0.5), (100, 0.95)))
    threshold = Threshold(0.9, status, size, size, low, high, 1.0)
    return Found(name, "d", Target((1.0,)), runs, threshold, {10: 1000, 100: 10_000}, 1.0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are written."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def savefig(figure: Any, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_the_figure_fits_what_the_search_did(tmp_path: Path, drawn: list[Any]) -> None:
    """The best of a size's seeds where the threshold is of the best, not their mean."""
    runs = tuple(Run(s, i, m + 0.1 * i) for s, m in ((10, 0.5), (100, 0.8)) for i in (0, 1))
    best = smallest.dataclasses.replace(found("d90", 50.0, 20.0, 90.0), runs=runs, statistic="best")
    smallest_plots.compare({"subspace": best}, tmp_path / "x.png")
    (fit,) = (x for x in drawn[0].axes[0].lines if x.get_label() == "subspace")
    assert list(fit.get_ydata()) == pytest.approx([0.6, 0.9])


def test_thresholds_side_by_side(tmp_path: Path, drawn: list[Any]) -> None:
    some = {"subspace": found("d90", 50.0, 20.0, math.inf), "LoRA": found("r90", None, 0.0, 1.0)}
    path = smallest_plots.compare(some, tmp_path / "new" / "x.png", "accuracy")
    assert path.stat().st_size > 5000
    above, below = drawn[0].axes
    assert [t.get_text() for t in above.get_legend().get_texts()] == ["subspace", "LoRA"]
    assert [t.get_text() for t in below.texts] == ["d90 = 50", "r90 > 100"]
    at = {t.get_text(): t.xy[0] for t in below.texts}
    assert at["d90 = 50"] == pytest.approx(1000 + 9000 * 40 / 90)
    assert at["r90 > 100"] == 10_000
    arrows = [line.get_marker() for line in below.lines]
    assert arrows.count(">") == 2  # the interval of one, and the other itself
    with pytest.raises(UserError, match="no thresholds"):
        smallest_plots.compare({}, path)
