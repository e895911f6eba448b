"""Rank, learning rate and targets of LoRA on the quickstart's task, swept as one program.

    lora-jax sweep configs/sweep.py --workdir runs/sweep

Twelve members (3 ranks x 2 rates x 2 choices of targets). `--dry` prints the packs, their memory
and the expected time first; `configs/sweep.py:steps=10` is a short one.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from lora_jax.config import parse_arg

Overrides = Iterator[dict[str, Any]]


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(arg, steps=60, examples=32)
    config = ml_collections.ConfigDict()
    config.model = {"source": "smollm2-135m"}
    config.method = {"kind": "lora", "rank": 8, "alpha": 16.0, "targets": "all-linear"}
    config.data = {
        "source": {"kind": "tfds", "name": "cmudict_g2p", "split": "train[:20000]"},
        "task": {"kind": "g2p", "spell": True},
        "validation": f"validation[:{args.examples}]",
        "batch_size": 2,
        "length": 128,
    }
    config.optimizer = {"name": "adamw", "schedule": "linear", "warmup_steps": args.steps // 15}
    config.training = {"steps": args.steps, "save_every": 20, "chunk": 128}
    config.evaluation = {"max_new_tokens": 32, "batch_size": 32, "show": 0}
    return config


def sweep_rank() -> Overrides:
    for rank in (1, 4, 16):
        yield {"method.rank": rank, "method.alpha": 2.0 * rank}


def sweep_rate() -> Overrides:
    for rate in (5e-4, 2e-3):
        yield {"optimizer.learning_rate": rate}


def sweep_targets() -> Overrides:
    for targets in ("all-linear", "attention/(query|value)$"):
        yield {"method.targets": targets}
