"""LoRA on the E2E NLG Challenge with GPT-2, as in the LoRA paper's Table 3 and its scripts.

    lora-jax run configs/e2e.py:folder=e2e-dataset --workdir runs/e2e

`folder` holds the original challenge's trainset.csv and testset_w_refs.csv (columns mr, ref);
left out, the cleaned data of TFDS is used. Settings are those of the paper's Table 11: rank 4,
alpha 32, AdamW at 2e-4
with weight decay 0.01, 500 steps of warm-up, batch 8, 5 epochs, label smoothing 0.1, beams of 10,
length penalty 0.9, no repeated 4-grams. The metrics need the extra `metrics`.
"""

import ml_collections

from lora_jax.config import parse_arg

TRAINING_PAIRS = 42061  # of the original data
BATCH, EPOCHS = 8, 5


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    args = parse_arg(
        arg, model="gpt2-medium", folder="", steps=EPOCHS * TRAINING_PAIRS // BATCH, seed=0
    )
    config = ml_collections.ConfigDict()
    config.model = {"source": args.model}
    config.method = {
        "kind": "lora",
        "rank": 4,
        "alpha": 32.0,
        "targets": "attention/(query|value)$",
        "dropout": 0.1,
    }
    original = {"kind": "files", "path": f"{args.folder}/{{split}}.csv", "split": "trainset"}
    cleaned = {"kind": "tfds", "name": "e2e_cleaned", "split": "train"}
    config.data = {
        "source": original if args.folder else cleaned,
        "task": {"kind": "e2e"},
        "validation": "testset_w_refs" if args.folder else "test",
        "batch_size": BATCH,
        "length": 512,
        "packing": False,
        "loss": "completion",
    }
    config.optimizer = {"learning_rate": 2e-4, "weight_decay": 0.01, "warmup_steps": 500}
    config.training = {"steps": args.steps, "label_smoothing": 0.1, "save_every": 1000}
    config.evaluation = {
        "max_new_tokens": 64,
        "num_beams": 10,
        "length_penalty": 0.9,
        "no_repeat_ngram_size": 4,
        "batch_size": 16,
    }
    config.seed = args.seed
    return config
