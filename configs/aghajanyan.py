"""Fine-tuning in a random subspace of few dimensions (Aghajanyan et al. 2020, arXiv:2012.13255).

    lora-jax run configs/aghajanyan.py:dimension=896 --workdir runs/said_mrpc
    lora-jax run configs/aghajanyan.py:task=qqp,model=FacebookAI/roberta-large --workdir runs/qqp
    lora-jax run configs/aghajanyan.py:model=minilm-l6,task=cola,method=did --workdir runs/did_cola

`method`: did shares one vector of d coordinates among all tensors, each with a Fastfood projection
of its own; said has a trained scale a layer besides, of which each counts as one of the d. `full`
trains all weights, `head` the head alone, `lora` factors of `dimension` as their rank, and the
head. The new head lies in the subspace as everything else does. `random`: the same shape, with all
weights drawn by `seed`. `embeddings=False` leaves them out of the subspace: on a CPU their
transforms are most of a step's time. A run ends when `patience` epochs in a row were no better.
"""

from typing import Any

import ml_collections

from lora_jax.config import parse_arg

# Training examples, for epochs in steps (GLUE as TFDS 2.0.0 has it).
SIZES = {"cola": 8551, "sst2": 67349, "mrpc": 3668, "qqp": 363849, "rte": 2490}
METHODS = {
    "did": {"kind": "subspace", "scope": "tensor"},
    "said": {"kind": "subspace", "scope": "tensor", "scales": "layer"},
    "full": {"kind": "full"},
    "head": {"kind": "head_only"},
    "lora": {"kind": "lora", "targets": "attention/(query|value)$", "train": ("head/",)},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(
        arg, task="mrpc", model="FacebookAI/roberta-base", method="said", dimension=1000,
        epochs=20, patience=3, batch=32, rate=0.01, examples=0, length=128, random=False,
        embeddings=True, projection="fastfood", seed=0, data_dir="",
    )  # fmt: skip
    examples = args.examples or SIZES[args.task]
    epoch = examples // args.batch
    config = ml_collections.ConfigDict()
    config.model = {"source": args.model, "head_seed": args.seed}
    if args.random:
        config.model.init_seed = args.seed
    config.method = _method(args)
    config.data = {
        "source": {
            "kind": "tfds",
            "name": f"glue/{args.task}",
            "split": f"train[:{args.examples}]" if args.examples else "train",
            "data_dir": args.data_dir or None,
        },
        "task": {"kind": "glue", "name": args.task, "max_length": args.length},
        "validation": "validation",
        "batch_size": args.batch,
        "length": args.length,
        "packing": False,
        "buckets": tuple(n for n in (16, 32, 64) if n < args.length),
        "seed": args.seed,
    }
    config.optimizer = {"name": "adam", "learning_rate": args.rate, "schedule": "constant"}
    config.training = {
        "steps": args.epochs * epoch,
        "eval_every": epoch,
        "patience": args.patience,
        "keep": "best",
    }
    config.evaluation = {"batch_size": 64}
    config.seed = args.seed
    return config


def _method(args: Any) -> dict[str, Any]:
    method: dict[str, Any] = dict(METHODS[args.method])
    if method["kind"] == "subspace":
        method |= {
            "dimension": args.dimension,
            "projection": args.projection,
            "projection_seed": args.seed,
        }
        if not args.embeddings:
            method["targets"] = ("layers/", "head/")
    if method["kind"] == "lora":
        method |= {"rank": args.dimension, "alpha": float(args.dimension)}
    return method
