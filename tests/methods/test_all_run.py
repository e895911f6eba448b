"""Every registered method from a config to a result and back: what no file of its own shows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lora_jax import runs
from lora_jax.errors import UserError
from lora_jax.experiment import from_dict
from lora_jax.methods import METHODS
from lora_jax.plan import plan_config
from lora_jax.sweeps.sweep import sweep

# What a method needs beside its defaults on a two-layer Llama of width 16.
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "bitfit": {},
    "head_only": {},
    "ft_top": {"layers": 1},
    **{name: {"size": 3} for name in ("adapter_h", "adapter_l", "adapter_p")},
    "adapter_d": {"size": 3, "drop": 1},
    "prefix_tuning": {"length": 2, "hidden": 3},
    "p_tuning_v2": {"length": 2, "train": ()},
    "prompt_tuning": {"length": 2},
    "prefix_embedding": {"prefix": 2, "infix": 1},
    "prefix_layer": {"prefix": 2, "infix": 1},
    "lora_prefix_embedding": {"rank": 2, "prefix": 2, "infix": 1},
    "lora_prefix_layer": {"rank": 2, "prefix": 2, "infix": 1},
    "ia3": {},
    "galore": {"rank": 2},
    "subspace": {"dimension": 20},
    "vera": {"rank": 4},
    "adalora": {"rank": 3, "target_rank": 2},
    "lora_ga": {"rank": 2},
    "eva": {"rank": 2, "batches": 2},
    **{
        name: {"rank": 2}
        for name in (
            "lora", "lora_plus", "dora", "lora_fa", "pissa", "olora", "loha", "lokr", "lora_xs",
            "relora",
        )
    },
}  # fmt: skip
REFUSED = {"bitfit": "this model has none", "head_only": "no head of its own"}
# Whole runs and plans take seconds each: one for each hook that no other test's run has.
RUN = ("galore", "relora")
PLANNED = ("bitfit", "head_only", "pissa", "eva", "prefix_embedding", "adapter_d", "adalora")


def test_every_method_is_here() -> None:
    assert set(SETTINGS) == set(METHODS)


@pytest.mark.parametrize("name", RUN)
def test_a_run_and_back(name: str, tiny_config: Any, tmp_path: Any) -> None:
    config = {**tiny_config(), "method": {"kind": name, **SETTINGS[name]}}
    experiment = from_dict(config)
    result = runs.run(experiment, tmp_path / "run", progress=False)
    bench, method, trainable = runs.load_run(tmp_path / "run")
    metrics, _ = bench.evaluate(method.combine(bench.params, trainable))
    assert metrics == {n: result["metrics"][n] for n in metrics}


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan(name: str, tiny_config: Any) -> None:
    experiment = from_dict({**tiny_config(), "method": {"kind": name, **SETTINGS[name]}})
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            plan_config(experiment)
        return
    plan = plan_config(experiment)
    assert plan.trainable_total > 0


def test_members_of_methods_that_look_at_data_or_change_the_base(
    tiny_config: Any, tmp_path: Any
) -> None:
    """Members of a sweep: each as its own run, on a base of its own where it needs one."""
    path = tmp_path / "config.py"
    base = {**tiny_config(training={"steps": 2}), "method": {"kind": "lora_ga", "rank": 2}}
    path.write_text(
        f"""
def get_config():
    return {base!r}

def sweep_method():
    yield {{"method": {{"kind": "lora_ga", "rank": 2}}}}
    yield {{"method": {{"kind": "ft_top", "layers": 1}}}}
    yield {{"method": {{"kind": "lora_prefix_layer", "rank": 2, "prefix": 2, "infix": 1}}}}
"""
    )
    sweep(str(path), tmp_path / "s", progress=False)
    members = sorted((tmp_path / "s" / "members").iterdir())
    assert len(members) == 3
    for member in members:
        found = json.loads((member / "result.json").read_text())
        alone = runs.run(from_dict(found["config"]), tmp_path / member.name, progress=False)
        for name, value in alone["metrics"].items():
            np.testing.assert_allclose(found["metrics"][name], value, rtol=1e-4)
