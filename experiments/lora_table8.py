"""LoRA paper, Table 8: few examples in the prompt, beside fine-tuning.

    lora-jax table experiments/lora_table8.py --scale small --workdir runs/lora_table8

GPT-3's weights are not public. `small`: SmolLM2-135M (extra `quickstart`) pronounces 128 words,
with 0, 4 or 16 examples in its prompt (the best is taken), and after 90 steps of LoRA or of full
fine-tuning. `smoke`: a step, and no or four examples.
"""

import functools
import json
from pathlib import Path
from typing import Any

import missing
from given_folders import CONFIGS

from lora_jax.tables import Claim, Computed, Row, Table
from lora_jax.tables.quoted import quoted

CONFIG = str(CONFIGS / "quickstart.py")
FULL = {"method.kind": "full", "optimizer.learning_rate": 5e-5}
METRIC = "phoneme error rate"


def fitted(
    run: str, overrides: dict[str, Any], which: str, folder: Path, seed: int
) -> dict[str, Any]:
    """A metric of a run, which is trained if it is missing; data and examples by the seed."""
    from lora_jax import runs
    from lora_jax.sweeps.grid import configured

    seeds = {"seed": seed, "data.seed": seed, "training.dropout_seed": seed}
    workdir = folder.parent / "runs" / f"{run}-seed{seed}"
    if not (workdir / runs.RESULT).exists():
        runs.run(configured(CONFIG, {**overrides, **seeds}), workdir, progress=False)
    result = json.loads((workdir / runs.RESULT).read_text())
    cell = {"value": result["metrics"][which]}
    if which.startswith("base_"):  # nothing was trained for it
        return cell
    return {**cell, "trainable_params": result["trainable_params"]}


def table(scale: str) -> Table:
    if scale == "paper":
        reason = missing.GPT3
        rows = quoted("lora_t08_fewshot", ("method",), ("MNLI_m_acc", "RTE_acc"), reason, 0.01)
        return Table("LoRA paper, Table 8: few-shot and fine-tuned GPT-3", tuple(rows), seeds=1)
    short: dict[str, Any] = {}
    if scale == "smoke":
        short = {"training.steps": 1, "optimizer.warmup_steps": 0,
                 "data.validation": "validation[:2]",
                 "evaluation.base_shots": (0, 4), "evaluation.max_new_tokens": 4}  # fmt: skip
    # The run that LoRA trains measures the base with examples in its prompt, too.
    arms = {
        "few-shot": ("lora", {}, "base_phoneme_error_rate"),
        "LoRA": ("lora", {}, "phoneme_error_rate"),
        "fine-tuned": ("full", {**FULL, "evaluation.base_shots": ()}, "phoneme_error_rate"),
    }
    rows = []
    for name, (run, overrides, which) in arms.items():
        function = functools.partial(fitted, run, {**overrides, **short}, which)
        rows.append(Row(name, METRIC, Computed(function, seeded=True, name=which)))
    if scale == "smoke":
        rows = rows[:2]
    return Table(
        f"LoRA paper, Table 8 (few-shot and fine-tuned), {scale}", tuple(rows),
        seeds=1 if scale == "smoke" else 3,
        claims=(Claim("LoRA", "few-shot", METRIC),),
        notes=("an error rate: lower is better", "another model and task than the paper's"),
        cost="about 40 minutes on 2 CPU cores",
    )  # fmt: skip
