"""Tables of experiments/ whose cells are computed by code of their own, run at smoke scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lora_jax import tables

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def smoke(tmp_path: Path) -> Any:
    """smoke("lora_table1") -> measured values by (row, metric)."""

    def run(name: str) -> pd.Series:
        table = tables.load(str(EXPERIMENTS / f"{name}.py"), "smoke")
        filled = tables.run(table, "smoke", tmp_path, progress=False)
        return filled.frame().set_index(["row", "metric"])["measured"]

    return run


def test_latency_of_all_arms(smoke: Any) -> None:
    found = smoke("lora_table1")["two layers, 2 x 8"]
    assert set(found.index) == {
        "FT (ms)", "LoRA merged (ms)", "LoRA merged overhead (%)", "LoRA beside (ms)",
        "LoRA beside overhead (%)", "AdapterL (ms)", "AdapterL overhead (%)", "AdapterH (ms)",
        "AdapterH overhead (%)",
    }  # fmt: skip
    assert (found.filter(like="(ms)") > 0).all()  # times themselves are not for a test
