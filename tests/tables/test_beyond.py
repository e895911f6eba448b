"""The experiments beyond the papers at smoke scale, on a tiny MNIST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_jax import tables
from lora_jax.sweeps import smallest
from lora_jax.tables import render


@pytest.fixture
def smoke(smoke_on_mnist: Any, tmp_path: Path) -> Any:
    def run(name: str) -> tables.table.Filled:
        filled = smoke_on_mnist(name)
        assert not [x.measured.reason for x in filled.lines if "size run" not in x.measured.reason
                    and x.measured.reason]  # fmt: skip
        figure = render.write(filled, tmp_path / "out", name)[-1]
        assert figure.suffix == ".png" and figure.stat().st_size > 3000
        return filled

    return run


def test_forward_mode_is_the_difference_of_two_trainings(smoke: Any) -> None:
    found = smoke("beyond_sensitivities").frame().set_index("metric")["measured"]
    for side in ("learning rate", "scale"):
        exact, near = (found[f"by log {side}, {how}"] for how in ("forward mode", "difference"))
        assert exact == pytest.approx(near, rel=1e-3) and abs(exact) > 1e-4


def test_thresholds_over_width(smoke: Any) -> None:
    lines = smoke("beyond_width").lines
    assert [x.row.row for x in lines] == ["784-4-4-10", "784-8-8-10"]
    found = [smallest.load(Path(x.measured.place)) for x in lines]
    assert [one.target.value for one in found] == [0.9, 0.9]
    assert {r.size for one in found for r in one.runs} == {20, 200}
