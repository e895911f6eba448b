"""GPT-3 175B's shape with LoRA r=8 on query and value: what a step would need (Hu et al. 2021).

    lora-jax plan configs/gpt3_175b.py --topology v5e:8x8          # fits 64 v5e chips
    lora-jax plan configs/gpt3_175b.py:full --topology v5e:8x8     # full fine-tuning does not

37,748,736 trainable parameters (table 4 of the paper: 37.7M). Sizes are of table 2.1 in Brown et
al. 2020 (arXiv:2005.14165), training is read from the LoRA paper's table 12, as transcribed, for
SAMSum. The weights are not public: this config is for planning only. LoRA needs 9.28 GiB of a
chip's 15.75, a plan made in 31 s on two CPU cores; full fine-tuning asks for at least 28.8.
"""

import math

import ml_collections

from lora_jax.config import parse_arg
from lora_jax.tables import presets

DIALOGUES = 14732  # of SAMSum, for training


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    method = "FT" if parse_arg(arg, full=False, rows=0, length=0).full else "LoRA"
    paper = presets.row("lora_t12_hparams_gpt3", method=method)
    args = parse_arg(arg, full=False, rows=paper["batch_size"], length=paper["seq_len_SAMSum"])
    config = ml_collections.ConfigDict()
    config.model = {
        "shape": {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": 50257,
            "n_positions": 2048,
            "n_embd": 12288,
            "n_layer": 96,
            "n_head": 96,
            "activation_function": "gelu_new",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        "dtype": "bfloat16",  # of the weights; factors and their optimizer state are float32
        "remat": "full",  # keep each layer's input alone
    }
    if args.full:
        config.method = {"kind": "full"}
    else:
        config.method = {
            "kind": "lora",
            "rank": 8,
            "alpha": 8.0,
            "targets": r"attention/(query|value)$",
        }
    config.data = {
        "source": {"kind": "files", "path": "samsum/{split}.jsonl", "split": "train"},
        "task": {
            "kind": "text_to_text",
            "prompt_template": "{dialogue}",
            "completion_template": "{summary}",
            "separator": "\nTL;DR: ",
        },
        "validation": "validation",
        "batch_size": args.rows,
        "length": args.length,
        "packing": False,
        "too_long": "truncate",
    }
    config.optimizer = {
        "name": "adamw",
        "learning_rate": paper["lr"],
        "schedule": "linear",
        "warmup_steps": math.ceil(paper["warmup_tokens"] / (args.rows * args.length)),
        "weight_decay": paper["weight_decay"],
    }
    config.mesh = {
        "fsdp": 8,
        "tensor": 8,
        # 50257 rows are no multiple of 8: the embedding is cut along its width alone.
        "rules": ((r"embed/embedding$", (None, ("fsdp", "tensor"))),),
    }
    # Eight rows at a time, one for each group of eight chips.
    steps = paper["epochs"] * DIALOGUES // args.rows
    config.training = {"steps": steps, "accumulate": max(1, args.rows // 8)}
    return config
