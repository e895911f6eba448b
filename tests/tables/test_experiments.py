"""Tables of experiments/ whose cells are computed by code of their own, run at smoke scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lora_jax import config as configs
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


def test_inside_of_adapters_across_ranks_and_seeds(
    tmp_path: Path, tiny_config: Any, monkeypatch: Any
) -> None:
    """One step of a two-layer model: projections, similarities, and their figures."""
    config = tmp_path / "config.py"
    config.write_text(f"def get_config():\n    return {tiny_config()!r}\n")
    module = configs.load_module(str(EXPERIMENTS / "lora_table7.py"))
    monkeypatch.setattr(module, "CONFIG", str(config))
    monkeypatch.setitem(module.SHORT, "data.validation", "[20:22]")
    table = module.table("smoke")
    filled = tables.run(table, "smoke", tmp_path, progress=False)
    found = filled.frame().set_index(["row", "metric"])["measured"]
    norms = found["Table 7: ‖UᵀWqVᵀ‖, r=4"]
    # W's own directions hold most of it, any others less.
    assert 0 < norms["of ΔWq"] <= norms["of Wq"] <= norms["‖Wq‖"]
    assert norms["amplification"] == pytest.approx(norms["‖ΔWq‖"] / norms["of ΔWq"])
    phi = found["Figure 3: r=8 and r=64"]
    assert phi.between(0, 1).all() and len(phi) == 6
    assert (tmp_path / "smoke" / "figures" / "rank8_rank64.png").stat().st_size > 1000
