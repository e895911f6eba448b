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

MiniLM-L6 on 1,000 sentences of SST-2: 0.9 of full fine-tuning's 0.798 takes d = 161 [96, 795] by
said, over 2 seeds (experiments/aghajanyan_table1.py); a run takes some four minutes on one CPU
core. The larger models are for a GPU.
"""

from typing import Any

import glue
import ml_collections

from lora_jax.config import parse_arg
from lora_jax.errors import UserError, nearest

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
    config = glue.get_config(
        f"task={args.task},model={args.model},batch={args.batch},length={args.length},"
        f"epochs={args.epochs},examples={args.examples},seed={args.seed},data_dir={args.data_dir}"
    )
    epoch = config.training.steps // args.epochs
    config.model.head_seed = args.seed
    if args.random:
        config.model.init_seed = args.seed
    config.method = _method(args)
    config.data.seed = args.seed
    config.optimizer = {"name": "adam", "learning_rate": args.rate, "schedule": "constant"}
    # Whole epochs of whole batches, so that an evaluation is at the end of one.
    config.training = {
        "steps": args.epochs * epoch,
        "eval_every": epoch,
        "patience": args.patience,
        "keep": "best",
    }
    return config


def _method(args: Any) -> dict[str, Any]:
    if args.method not in METHODS:
        raise UserError(f"there is no method {args.method!r} here; {nearest(args.method, METHODS)}")
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
