"""Cells that are thresholds: baselines, two kinds of target, shared runs, one interval."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lora_jax import tables
from lora_jax.sweeps import grid, smallest
from lora_jax.sweeps.ladder import Ladder
from lora_jax.tables import Baseline, Searched, kept, render


@pytest.fixture
def config(tiny_images: Any, tmp_path: Path) -> str:
    sections = tiny_images(
        method={"train": ("^head/",)},
        training={"steps": 30, "eval_every": 10, "patience": 2},
    )
    path = tmp_path / "images.py"
    path.write_text(
        f"import json\ndef get_config(arg=''):\n    return json.loads({json.dumps(sections)!r})\n"
    )
    return str(path)


def test_a_table_of_thresholds(config: str, tmp_path: Path) -> None:
    ladder = Ladder(1, 300, points=2, ratio=1e9)
    full = Baseline({"method.kind": "full", "optimizer.learning_rate": 0.03}, vary=("data.seed",))
    head = Baseline(
        {"method.kind": "head_only", "optimizer.learning_rate": 0.003}, vary=("data.seed",)
    )
    vary = ("data.seed", "method.projection_seed")
    absolute = Searched(config, ladder, 1, fraction=0.45, vary=vary)  # as 0.9 of 0.5
    gain = Searched(config, ladder, full, head_only=head, fraction=0.5, vary=vary)
    drawn: list[Path] = []

    def figures(filled: Any, folder: Path) -> list[Path]:
        found = {x.row.metric: smallest.load(Path(x.measured.place)) for x in filled.lines}
        drawn.append(smallest_path := folder / "x.txt")
        smallest_path.write_text(", ".join(found))
        return drawn[-1:]

    rows = (tables.Row("MLP", "absolute", absolute), tables.Row("MLP", "gain", gain))
    table = tables.Table("Thresholds", rows, seeds=2, figures=figures)
    began = time.perf_counter()
    filled = tables.run(table, "small", tmp_path / "t", progress=False)
    one, two = (line.measured for line in filled.lines)
    # The second has the first's runs, and counts its baselines alone.
    assert 0 < one.seconds + two.seconds < time.perf_counter() - began
    assert not one.reason or "by the smallest" in one.reason, one.reason
    # The same runs, another target.
    assert Path(one.place).parent == Path(two.place).parent, two.reason
    members = list((tmp_path / "t").rglob("members/*/result.json"))
    assert len(members) == 2 * 2 + 2 + 2  # sizes x seeds, and the two baselines
    targets = [smallest.load(Path(m.place)).target for m in (one, two)]
    assert targets[0].value == 0.45 and len(targets[1].full) == len(targets[1].head_only) == 2
    for line in filled.lines:
        if line.summary is not None:
            assert line.summary.n == 2
            assert line.measured.beyond or line.summary.low <= line.summary.value
            closed = line.summary.low > 0 and line.summary.high < math.inf
            assert closed != ("beyond the sizes" in line.measured.notes[0])
    assert "2 evaluations, one each 10 updates" in one.notes[0] and "the gain from" in two.notes[0]
    assert all("^head/ trained whole, and no part of d" in m.notes for m in (one, two))
    again = tables.run(table, "small", tmp_path / "t", progress=False)
    assert [x.measured.seconds for x in again.lines] == [one.seconds, two.seconds]
    paths = render.write(filled, tmp_path / "out", "thresholds")
    assert paths[-1] == drawn[-1] and "1 of" not in drawn[-1].read_text()
    text = (tmp_path / "out" / "thresholds.md").read_text()
    assert "has converged after 2 evaluations" in text


def test_thresholds_of_the_same_runs_do_not_overwrite_each_other() -> None:
    """Each is a file beside the runs, which a table's figure reads once all rows are there."""
    work = Searched("c.py", Ladder(1, 8), Baseline({}), head_only=Baseline({}))
    others = [
        dataclasses.replace(work, **change)
        for change in (
            {"metric": "f1"}, {"statistic": "best"}, {"ladder": Ladder(1, 9)}, {"name": "d75"},
            {"full": Baseline({}, grid=[{"a": 1}])}, {"full": 1.0}, {"head_only": None},
            {"diverged": 0.0},
        )
    ]  # fmt: skip
    assert len({x._place() for x in (work, *others)}) == 1
    # Nor has a clone, or the data, in another folder a name of its own; another argument has.
    moved = [Searched(f"{c}:task=a,data_dir=/{d}", Ladder(1, 8), 1.0)._place()
             for c, d in (("/one/c.py", "x"), ("two/c.py", "y"))]  # fmt: skip
    assert len({*moved, Searched("c.py:task=a", Ladder(1, 8), 1.0)._place()}) == 1
    assert Searched("c.py:task=b", Ladder(1, 8), 1.0)._place() not in moved
    assert len({x._target() for x in (work, *others)}) == 1 + len(others)


def test_no_gain_over_the_head_is_an_outcome_and_no_failure(config: str, tmp_path: Path) -> None:
    """A random start may learn nothing; the same command would find the same again."""
    still = Baseline({"method.kind": "full", "optimizer.learning_rate": 0.0}, vary=("data.seed",))
    work = Searched(config, Ladder(1, 2, points=2), still, head_only=still, vary=("data.seed",))
    table = tables.Table("T", (tables.Row("MLP", "d90 of the gain", work),), seeds=1)
    for _ in range(2):
        filled = tables.run(table, "small", tmp_path / "t", progress=False)
        assert not filled.failed
        assert "gains nothing over the head alone" in filled.lines[0].measured.reason
        assert "no number: " in render.markdown(filled)
    assert not list((tmp_path / "t").rglob(f"*{smallest.FILE}"))


def test_what_no_size_reaches_says_so(config: str, tmp_path: Path) -> None:
    rates = [{"optimizer.learning_rate": rate} for rate in (0.0, 0.1)]
    work = Searched(config, Ladder(1, 2, points=2), 5.0, vary=("data.seed",), grid=rates)
    row = tables.Row("MLP", "d90", work)
    filled = tables.run(tables.Table("T", (row,), seeds=1), "small", tmp_path / "t", progress=False)
    cells = filled.frame().iloc[0]
    # An interval without a number: what was run is no row that was not.
    assert (cells["status"], cells["low"], cells["high"]) == ("measured", 2, math.inf)
    assert pd.isna(cells["measured"]) and cells["seeds"] == 1
    text = render.markdown(filled)
    assert "| > 2 |" in text and "not reached: the largest size run is 2" in text
    assert "not run" not in text
    assert filled.lines[0].measured.chosen == rates[1]
    found = smallest.load(Path(filled.lines[0].measured.place))
    assert found.threshold.target == 4.5
    assert filled.lines[0].measured.beyond == (2, math.inf)
    # Of two seeds there is an interval, which need not lie beyond.
    two = tables.run(tables.Table("T", (row,), seeds=2), "small", tmp_path / "t", progress=False)
    render.write(two, tmp_path, "two")
    again = kept.read([tmp_path / "two.json"], two.table, "small")
    for one in (two, tables.run(two.table, "small", tmp_path / "x", progress=False, known=again)):
        assert "| > 2 [inf, inf] |" in render.markdown(one) and one.lines[0].standing == "measured"
        cells = one.frame().iloc[0]
        assert (cells["low"], cells["high"], cells["seeds"]) == (math.inf, math.inf, 2)
        assert pd.isna(cells["measured"])


def test_li_table1_at_smoke_scale(tiny_mnist: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Two values of d, both targets; published numbers and a figure beside them."""
    spec = str(Path(__file__).parents[2] / "experiments" / "li_table1.py")
    monkeypatch.setenv("MNIST_DIR", str(tiny_mnist))
    filled = tables.run(tables.load(spec, "smoke"), "smoke", tmp_path / "t", progress=False)
    frame = filled.frame()
    assert list(frame["row"]) == ["FC, fastfood"] * 2 and frame["published"][0] == 750
    absolute, own = (smallest.load(Path(x.measured.place)).target for x in filled.lines)
    assert absolute.value == 0.9 and own.value == pytest.approx(0.9 * own.full[0])
    paths = render.write(filled, tmp_path / "out", "li")
    assert paths[-1].name == "li_table1_FC.png"
    small = tables.load(spec, "small")
    assert [r.published.look_up().value for r in small.rows if r.published] == [750] * 3 + [290] * 3


def test_aghajanyan_table1_beside_the_published_numbers() -> None:
    spec = str(Path(__file__).parents[2] / "experiments" / "aghajanyan_table1.py")
    rows = {(r.row, r.metric): r for r in tables.load(spec, "paper").rows}
    cited = rows["RoBERTa-Large SAID, MRPC", "d90"].published
    assert cited is not None and cited.look_up().value == 207
    assert rows["RoBERTa-Base DID, QQP", "d90"].published.look_up().value == 1389
    assert rows["RoBERTa-Base DID, QQP", "d90 of the gain"].published is None
    small = {r.row: r.work for r in tables.load(spec, "small").rows}
    assert set(small) == {f"{start}, SST-2" for start in (
        "pretrained SAID", "pretrained DID", "random SAID", "pretrained LoRA")}  # fmt: skip
    for name, work in small.items():
        found = grid.configured(work.config, {**work.overrides, work.size: 100})
        assert (found.model.init_seed is None) == ("random" not in name)
        assert found.data.task.name == "sst2"
        if "LoRA" not in name:
            assert found.method.scope == "tensor" and found.training.patience == 2
            assert found.method.scales == ("layer" if "SAID" in name else "none")
            assert not any("embed" in p for p in found.method.targets)
