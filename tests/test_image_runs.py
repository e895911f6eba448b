"""A network of images from a random start through whole runs: trained, resumed, packed, planned."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest

from lora_jax import cli, runs
from lora_jax.errors import UserError
from lora_jax.experiment import from_dict
from lora_jax.plan import plan_config
from lora_jax.sweeps.sweep import Options, Sweep
from lora_jax.training.loop import real_tokens


def evaluations(folder: Any) -> list[float]:
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x["eval/accuracy"] for x in lines if "eval/accuracy" in x]


def test_run_and_back(tiny_images: Any, tmp_path: Any) -> None:
    experiment = from_dict(
        tiny_images(method={"dimension": 200}, training={"steps": 40, "eval_every": 10})
    )
    result = runs.run(experiment, tmp_path / "a", progress=False)
    seen = evaluations(tmp_path / "a")
    assert result["metrics"]["accuracy"] == max(seen) > 0.6 > seen[0]
    assert result["trainable_params"] == 200 and result["total_params"] == 785 * 6 + 7 * 10
    assert result["base_sha256"] is None and result["converged"] is False
    bench, method, trainable = runs.load_run(tmp_path / "a")
    metrics, _ = bench.evaluate(method.combine(bench.params, trainable))
    assert metrics == result["metrics"]
    assert cli.main(["merge", str(tmp_path / "a"), str(tmp_path / "merged")]) == 0
    # The merged network is a model to start from, and already as good.
    again = from_dict(tiny_images(model={"source": str(tmp_path / "merged"), "shape": None,
                                         "init_seed": None}, training={"steps": 0}))  # fmt: skip
    start = runs.Workbench(again)
    assert start.evaluate({"params": start.params})[0] == result["metrics"]


def test_members_of_a_pack_are_single_runs(tiny_images: Any, tmp_path: Any) -> None:
    seeds = [{"seed": s, "data.seed": s, "method.projection_seed": s, "method.dimension": 20 + s}
             for s in (0, 1)]  # fmt: skip
    base = tiny_images(training={"steps": 4, "eval_every": 2, "log_every": 1})
    sweep = Sweep(base, {"seed": seeds}, tmp_path / "s", Options(mode="packed"), progress=False)
    assert sweep.run()["packs"] == 1
    for member in sweep.members:
        runs.run(member.experiment, tmp_path / member.name, progress=False)
        lines = [
            [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (sweep.folder / member.name, tmp_path / member.name)
        ]
        losses = [[x["loss"] for x in part if "loss" in x] for part in lines]
        np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
        assert len(set(losses[0])) == 4


@pytest.mark.parametrize("packed", [False, True])
def test_it_ends_once_it_no_longer_gets_better(
    tiny_images: Any, tmp_path: Any, packed: bool
) -> None:
    """At a rate of 0 the first evaluation is the best: it ends two later, whole and kept."""
    config = tiny_images(
        optimizer={"learning_rate": 0.0},
        training={"steps": 40, "eval_every": 3, "patience": 2},
    )
    if packed:
        sweep = Sweep(config, {"s": [{"seed": 0}, {"seed": 1}]}, tmp_path, Options(mode="packed"),
                      progress=False)  # fmt: skip
        sweep.run()
        folder = sweep.folder / sweep.members[1].name
    else:
        folder = tmp_path / "alone"
        runs.run(from_dict(config), folder, progress=False)
    result = json.loads((folder / "result.json").read_text())
    assert result["converged"] is True and result["best_step"] == 3
    assert len(set(evaluations(folder))) == 1 and len(evaluations(folder)) == 3
    steps = [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 9


def test_a_plan_of_images(tiny_images: Any) -> None:
    plan = plan_config(from_dict(tiny_images()))
    assert plan.tokens == 20 and plan.trainable == {"subspace/vector": 30}


def test_what_does_not_fit_together(tiny_images: Any, tiny_config: Any, tmp_path: Any) -> None:
    def begun(config: Any) -> None:
        _ = runs.Workbench(from_dict(config)).params

    with pytest.raises(UserError, match="model.init_seed to draw"):
        begun(tiny_images(model={"init_seed": None}))
    with pytest.raises(UserError, match="gives images and a Llama reads tokens"):
        begun({**tiny_images(), "model": tiny_config()["model"]})
    with pytest.raises(UserError, match="patience needs training.eval_every"):
        runs.run(from_dict(tiny_images(training={"keep": "last", "eval_every": 0, "patience": 1})),
                 tmp_path / "y", progress=False)  # fmt: skip
    assert real_tokens({"images": np.zeros((3, 1)), "weights": np.array([1, 1, 0])}) == 2


def test_a_text_model_may_start_at_random_too(tiny_config: Any, tmp_path: Any) -> None:
    config = tiny_config(training={"steps": 1})
    drawn = {**config, "model": {**config["model"], "init_seed": 3}}
    benches = [runs.Workbench(from_dict(c)) for c in (config, drawn, drawn)]
    kernels = [b.params["layers[0:2]"]["mlp"]["up"]["kernel"] for b in benches]
    np.testing.assert_array_equal(kernels[1], kernels[2])
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
    assert jax.tree.structure(benches[0].params) == jax.tree.structure(benches[1].params)
    result = runs.run(from_dict(drawn), tmp_path / "drawn", progress=False)
    assert result["base_sha256"] is None
    with pytest.raises(UserError, match="has no tokenizer"):
        shape = {"model_type": "llama"}
        _ = runs.Workbench(from_dict({**config, "model": {"shape": shape}})).tokenizer
