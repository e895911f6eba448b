"""The report of a sweep: paired differences with known answers, and a page that needs no file."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pandas as pd
import pytest

from lora_jax.sweeps import plots, report

RANK, RATE, TARGETS, SEED = "method.rank", "optimizer.learning_rate", "method.targets", "seed"
KEYS = [RANK, RATE, SEED, TARGETS]


def frame() -> pd.DataFrame:
    """Error = effect of the rank + effect of the rate + a seed's own: differences are exact."""
    rows = []
    for rank, rate, targets, seed in itertools.product((1, 4), (1e-3, 1e-2), ("q", "all"), (0, 1)):
        error = {1: 0.5, 4: 0.3}[rank] + {1e-3: 0.1, 1e-2: 0.0}[rate] + 0.2 * seed
        row = {"member": f"{rank}{rate}{targets}{seed}", RANK: rank, RATE: rate, TARGETS: targets}
        rows.append(
            {**row, SEED: seed, "status": "finished", "error": error + 0.01 * (targets == "q"),
             "trainable_params": rank * (2 if targets == "all" else 1), "seconds": 1.0}
        )  # fmt: skip
    lost = {**rows[0], "member": "lost", "status": "diverged", "error": float("nan")}
    return pd.DataFrame([*rows, lost])


def test_paired_differences_do_not_see_what_seeds_and_other_fields_do() -> None:
    gaps = report.differences(frame(), KEYS, "error", higher_is_better=False).set_index("field")
    assert set(gaps.index) == {RANK, RATE, TARGETS}  # seeds are repetitions
    assert gaps.loc[RANK, "against"] == 4 and gaps.loc[RANK, "value"] == 1
    for field, gap in ((RANK, 0.2), (RATE, 0.1), (TARGETS, 0.01)):
        found = gaps.loc[field]
        assert found["pairs"] == 8
        assert found[["difference", "low", "high"]].tolist() == pytest.approx([gap] * 3)
    other = report.differences(frame(), KEYS, "error", higher_is_better=True).set_index("field")
    assert other.loc[RANK, "against"] == 1


def test_the_page_holds_its_plots(tmp_path: Path) -> None:
    images = plots.draw(frame(), KEYS, "error", False, tmp_path)
    assert {p.stem for p in images} == {
        "error_over_method_rank", "error_over_optimizer_learning_rate", "error_over_method_targets",
        "best_rate_per_rank", "targets_ranked", "error_over_parameters",
    }  # fmt: skip
    gaps = report.differences(frame(), KEYS, "error", False)
    report.write_html(frame(), gaps, images, {"members": "<17>"}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(images) and "&lt;17&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)


def test_none_is_a_value_among_words(tmp_path: Path) -> None:
    rows = [{"model.quantize": q, "error": e, "status": "finished"} for q, e in
            ((None, 0.1), ("nf4", 0.3), ("int8", 0.2))]  # fmt: skip
    assert plots.draw(pd.DataFrame(rows), ["model.quantize"], "error", False, tmp_path)


def test_a_sweep_without_the_metric_draws_nothing(tmp_path: Path) -> None:
    nothing = frame().drop(columns="error")
    assert plots.draw(nothing, KEYS, "error", False, tmp_path) == []
