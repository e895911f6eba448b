"""The experiment on rank, scale and learning rate: known answers, and all of it in miniature."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lora_jax.experiment import from_dict, to_dict
from lora_jax.sweeps import report

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
experiment = importlib.import_module("rank_alpha_lr")
best = importlib.import_module("best_rates")
SMALL = experiment.SCALES["small"]


def made(peaks: dict[str, float], tops: dict[str, float], noise: float = 0.0) -> pd.DataFrame:
    """Parabolas over log10 of the rate, with a peak at a given place and height; a seed adds 0.1
    to all, and `noise` moves its peaks."""
    draw, rows = np.random.default_rng(0), []
    for arm in experiment.arms(SMALL):
        for seed in range(SMALL.seeds):
            peak = peaks.get(arm.name, -3.0) + noise * draw.normal()
            for rate in arm.rates:
                value = tops.get(arm.name, 0.5) + 0.1 * seed - 0.2 * (math.log10(rate) - peak) ** 2
                rows.append({"arm": arm.name, "rate": rate, "seed": seed, "value": value,
                             "trainable_params": 10})  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(frame: pd.DataFrame) -> list[str]:
    return [answer.verdict for answer in experiment.answers(frame, SMALL)]


def test_claims_that_hold() -> None:
    tops = {"mlp r=16": 0.6, "rsLoRA r=64": 0.55}
    frame = made({"full": -4.0}, tops, noise=0.02)
    frame["value"] += 1e-4 * np.random.default_rng(1).normal(size=len(frame))
    assert verdicts(frame) == ["yes", "undecided", "yes", "yes", "yes"]
    moved, _, ratio, targets, _ = (a.summary for a in experiment.answers(frame, SMALL))
    assert abs(moved.value) < 0.1 and ratio.value == pytest.approx(1.0, abs=0.1)
    assert targets.value == pytest.approx(0.1, abs=0.01) and targets.n == 3  # seeds cancel


def test_claims_that_do_not() -> None:
    """The best rate falls by 1.2 decades from rank 1 to 64, between the rates of the grid."""
    peaks = {f"r={r}": -2.4 - 0.2 * math.log2(r) for r in SMALL.ranks}
    frame = made({**peaks, "full": -3.3}, {"mlp r=16": 0.4, "rsLoRA r=64": 0.4}, noise=0.02)
    assert verdicts(frame) == ["no", "something", "no", "no", "no"]
    moved = experiment.answers(frame, SMALL)[0].summary
    assert moved.value == pytest.approx(-1.2, abs=0.1)


def test_a_best_rate_at_an_end_is_only_a_bound() -> None:
    frame = made({"full": -2.0}, {})
    assert best.at_an_end(frame, "full") and not best.at_an_end(frame, "r=1")
    assert best.best_rates(frame, "full")[0] == pytest.approx(-3.0)
    found = experiment.answers(frame, SMALL)
    assert "only a bound: full." in found[0].note
    assert (found[0].verdict, found[2].verdict) == ("yes", "undecided")


def test_no_score_chooses_itself() -> None:
    """A seed that likes another rate than the others is scored at theirs; what diverged is out."""
    rows = [("a", rate, seed, value) for rate, values in
            ((0.1, (9.0, 1.0, 1.0)), (0.2, (2.0, 3.0, 3.0)), (0.3, (math.nan, 5.0, 5.0)))
            for seed, value in enumerate(values)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["arm", "rate", "seed", "value"])
    assert best.scores(frame, "a") == {0: 2.0, 1: 1.0, 2: 1.0}


def test_equal_parameters() -> None:
    attention, mlp = SMALL.equal
    assert 8 * attention == 10 * mlp


def test_in_miniature(tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sweep of the smoke scale on a two-layer Llama; again, nothing is trained."""
    monkeypatch.setattr(report, "write", lambda *_: None)  # pages have tests of their own
    scale = experiment.SCALES["smoke"]
    base = to_dict(from_dict(tiny_config(training={"steps": 2}, evaluation={"spectra": 0})))
    base["data"]["validation"] = "[20:22]"
    frame = experiment.measure(scale, tmp_path, base, "exact_match", mode="serial")
    assert len(frame) == 24 and frame["value"].notna().all()
    counts = frame.groupby("arm")["trainable_params"].first()
    assert counts["r=4"] == 4 * counts["r=1"] and counts["full"] > counts["r=4"]
    text = experiment.write(frame, scale, "smoke", tmp_path)
    assert text.count("\n| ") == 2 + 5 + 2 + 6 and (tmp_path / "rank_alpha_lr.csv").exists()
    results = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/members/*/result.json")}
    again = experiment.measure(scale, tmp_path, base, "exact_match", mode="serial")
    pd.testing.assert_frame_equal(frame, again)
    assert len(results) == 24 and all(p.stat().st_mtime_ns == t for p, t in results.items())
    # Another machine, with a table of some: the rest is run, and the answers are of what is there.
    known = frame[frame["sweep"] != "rslora"]
    some = experiment.measure(
        scale, tmp_path / "b", base, "exact_match", mode="serial", sweeps=["ranks"], known=known
    )
    pd.testing.assert_frame_equal(some, known, check_dtype=False)
    assert not (tmp_path / "b").exists()
    text = experiment.write(some, scale, "smoke", tmp_path / "b")
    assert text.count("\n| ") == 2 + 4 + 2 + 5 and "Not measured yet: rsLoRA r=4." in text
    rest = experiment.measure(
        scale, tmp_path / "b", base, "exact_match", mode="serial", known=known
    )
    pd.testing.assert_frame_equal(rest, frame, check_dtype=False)
    assert len(list(tmp_path.glob("b/*/members/*/result.json"))) == 4
