"""Networks on MNIST from a random start, whole or in a random subspace (Li et al. 2018).

    lora-jax run configs/mnist.py --workdir runs/mnist
    lora-jax run configs/mnist.py:net=lenet,dimension=290,projection=dense --workdir runs/lenet

`net` is fc (784-200-200-10, 199,210 parameters) or lenet (44,426). `dimension` is d, 0 trains all
parameters. A run ends when `patience` evaluations in a row, one every 200 updates, were no better
than the best before them, and at the latest after `steps`; the best evaluated state is kept. MNIST
is TFDS's, downloaded and prepared on first use (`data_dir`: where, or where a copy lies).
`shuffle` permutes the pixels. `seed` is of the weights, the subspace and the order of the data.

Accuracy 0.9 takes d = 702 [605, 756] of fc and 276 [158, 307] of lenet (Fastfood, 3 seeds:
experiments/li_table1.py). As members of a packed search 30 runs of lenet took 17 minutes on 2 CPU
cores.
"""

import ml_collections

from lora_jax.config import parse_arg
from lora_jax.errors import UserError, nearest

# The shapes, as config.json would have them.
NETS = {
    "fc": {"model_type": "mlp", "image_shape": (28, 28, 1), "widths": (200, 200), "num_labels": 10},
    "lenet": {"model_type": "lenet", "image_shape": (28, 28, 1), "num_labels": 10},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(
        arg, net="fc", dimension=750, projection="fastfood", rate=0.0, steps=4000, patience=4,
        shuffle=False, seed=0, data_dir="",
    )  # fmt: skip
    if args.net not in NETS:
        raise UserError(f"there is no net {args.net!r} here; {nearest(args.net, NETS)}")
    config = ml_collections.ConfigDict()
    config.model = {"shape": NETS[args.net], "init_seed": args.seed}
    if args.dimension:
        config.method = {
            "kind": "subspace",
            "dimension": args.dimension,
            "projection": args.projection,
            "projection_seed": args.seed,
        }
    else:
        config.method = {"kind": "full"}
    config.data = {
        "source": {"kind": "tfds", "name": "mnist", "data_dir": args.data_dir or None},
        "task": {"kind": "image_classification", "shuffle_pixels": 0 if args.shuffle else None},
        "validation": "test",  # as published: the accuracy is that on the test set
        "batch_size": 128,
        "length": 1,  # an image is one position
        "packing": False,
        "seed": args.seed,
    }
    # Columns of P have norm 1: a coordinate moves all parameters, each by 1 / sqrt(D) of it.
    config.optimizer = {
        "name": "adam",
        "learning_rate": args.rate or (0.05 if args.dimension else 1e-3),
        "schedule": "constant",
    }
    config.training = {
        "steps": args.steps,
        "eval_every": 200,
        "patience": args.patience,
        "keep": "best",
        "log_every": 200,
    }
    config.evaluation = {"batch_size": 2000}
    config.seed = args.seed
    return config
