"""Members that differ in d and in the projection's seed share a program, each as its own run."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from test_exactness import members_of, program_of, single_losses

from lora_jax.sweeps import padding, planner


def test_packed_is_single_in_float64(tiny_config: Any) -> None:
    """The first has fewer coordinates: its others must not move, nor count in the clipped norm."""
    overrides = [
        {"method.dimension": 28},
        {"method.dimension": 50, "method.projection_seed": 9, "optimizer.learning_rate": 3e-3},
    ]
    with jax.enable_x64(True):
        config = tiny_config(
            model={"dtype": "float64"},
            optimizer={"clip_norm": 1e-3, "learning_rate": 1e-2, "weight_decay": 0.1},
            training={"steps": 5},
        )
        config["method"] = {"kind": "subspace", "scales": "layer", "cached": False}
        members = members_of(config, overrides)
        plans = planner.plan(
            members,
            lambda m: {"x": jax.ShapeDtypeStruct((m.experiment.method.dimension,), np.float32)},
            flops_per_second=1e12,
            compile_seconds=1e9,
        )
        assert len(plans) == 1, "these differ in numbers only: one program"
        program, starts = program_of(members, 2)
        states = program.empty()
        for i, start in enumerate(starts):
            states = program.put(states, i, padding.pad(start.state, program.shape.state))
        data, packed = program.bench.batches(0), []
        for _ in range(5):
            batches = {n: np.stack([x] * 2) for n, x in next(data).items()}
            states, metrics = program.compiled(program.frozen, states, batches, np.ones(2, bool))
            packed.append(np.asarray(metrics["loss"]))
        own = np.asarray(states.trainable["subspace"]["vector"])
        length = starts[0].state.trainable["subspace"]["vector"].shape[0]
        np.testing.assert_array_equal(own[0, length:], 0.0)
        assert np.abs(own[0, :length]).min() > 0
        for i, member in enumerate(members):
            alone = single_losses(program.bench, member)
            np.testing.assert_allclose(np.array(packed)[:, i], alone, rtol=1e-10)
            assert len(set(alone)) == 5
