"""A small run with checkpoints, started as a process of its own by test_kill.py."""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

import jax
import tiny

from lora_jax.methods import LoRA
from lora_jax.training import (
    Checkpoints,
    OptimizerConfig,
    chunked_loss,
    fit,
    init_state,
    make_optimizer,
    make_step,
)

STEPS = 60
METHOD = LoRA(rank=2, alpha=4, targets=r"attention/query$", dropout=0.2)


class Slow(tiny.Batches):
    """Leaves time to be killed between the steps."""

    pause = 0.02

    def __next__(self):
        time.sleep(self.pause)
        return super().__next__()


def run(folder: Path, pause: float = Slow.pause):
    """The trained State."""
    params, data = tiny.params(), Slow()
    data.pause = pause
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=4), STEPS)
    step = make_step(functools.partial(chunked_loss, tiny.MODEL), METHOD, tx)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return fit(
            step, params, init_state(METHOD, params, tx), data, steps=STEPS, workdir=folder,
            checkpoints=checkpoints, save_every=3, log_every=1, progress=False,
        ).state  # fmt: skip


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")  # as the tests' own process
    run(Path(sys.argv[1]))
