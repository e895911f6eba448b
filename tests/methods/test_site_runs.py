"""Whole runs of methods that act on activations, from a config to a result and back."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import runs
from lora_jax.experiment import from_dict
from lora_jax.methods.adapters import AdapterH
from lora_jax.methods.prefix import PrefixTuning

L, D = 2, 16  # of the tiny base, with two key/value heads of width 4
C = 2 * 4


@pytest.mark.parametrize(
    ("method", "parameters", "kept"),
    [
        (
            {"kind": "adapter_h", "size": 4},
            2 * L * (2 * D * 4 + 4 + D),
            AdapterH(size=4),
        ),
        (
            {"kind": "prefix_tuning", "length": 3, "hidden": 4},
            3 * C + (C + 1) * 4 + L * 2 * (4 + 1) * C,
            PrefixTuning(length=3, hidden=0),  # the MLP is dropped
        ),
    ],
    ids=["adapter_h", "prefix_tuning"],
)
def test_a_run_and_back(
    tiny_config: Any, tmp_path: Any, method: dict, parameters: int, kept: lj.LoRA
) -> None:
    config = tiny_config(
        optimizer={"learning_rate": 1e-2}, evaluation={"max_new_tokens": 2, "show": 0}
    )
    result = runs.run(from_dict({**config, "method": method}), tmp_path / "run", progress=False)
    assert result["trainable_params"] == parameters
    bench, again, trainable = runs.load_run(tmp_path / "run")
    assert again == kept
    start = kept.init(jax.random.key(0), bench.params)
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(trainable), jax.tree.leaves(start), strict=True
    ):
        assert new.shape == old.shape and not np.allclose(new, old), path
    metrics, _ = bench.evaluate(again.combine(bench.params, trainable))
    assert metrics == {name: result["metrics"][name] for name in metrics}
