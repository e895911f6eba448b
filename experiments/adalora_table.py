"""AdaLoRA (Zhang et al. 2023): Table 1 (GLUE).

    lora-jax table experiments/adalora_table.py --scale small --workdir runs/adalora_table

`paper`: as published, not run: DeBERTaV3 is not in the project. `small`: AdaLoRA beside LoRA, both
adapters, BitFit and full fine-tuning at about equal budgets, on all six matrices of a layer as
there, MiniLM-L6 (extra `minilm`) on SST-2, with the shares of warm-up and of final updates and the
penalty of the authors' script for CoLA.
"""

import minilm
import missing

from lora_jax.config import load_module
from lora_jax.tables import Table
from lora_jax.tables.presets import row
from lora_jax.tables.quoted import quoted

TASKS = ("MNLI_m", "MNLI_mm", "SST-2", "CoLA", "QQP_acc", "QQP_F1", "QNLI", "RTE", "MRPC", "STS-B",
         "Avg")  # fmt: skip
ALL = {"targets": "all-linear"}
STEPS = {"small": minilm.EPOCHS * minilm.EXAMPLES // minilm.BATCH, "smoke": 2}


def scheduled(steps: int) -> dict[str, object]:
    """AdaLoRA's fields from the authors' script for CoLA, its updates as shares of the run. The
    final rank is 2, not the script's 1: what it is compared with has 2."""
    script = row("adalora_script_hparams", task="CoLA")
    updates = (
        script["epochs"] * load_module(str(minilm.CONFIG)).SIZES["cola"] // script["batch_size"]
    )
    return {
        "rank": script["lora_r_init"], "target_rank": 2, "alpha": float(script["lora_alpha"]),
        "initial_steps": script["init_warmup"] * steps // updates,
        "final_steps": script["final_warmup"] * steps // updates,
        "every": script["mask_interval"] * steps // updates or 1,
        "orthogonality": script["reg_orth_coef"],
        "beta1": script["beta1"], "beta2": script["beta2"],
    }  # fmt: skip


def methods_at(scale: str) -> dict[str, minilm.Method]:
    return {
        "AdaLoRA r=2": ("adalora", {**ALL, **scheduled(STEPS[scale])}, minilm.ADALORA_RATES),
        "LoRA r=2": ("lora", {**ALL, "rank": 2, "alpha": 2.0}, minilm.LORA_RATES),
        "HAdapter": ("adapter_h", {"size": 8}, (1e-3, 4e-3)),
        "PAdapter": ("adapter_p", {"size": 16}, (1e-3, 4e-3)),
        "BitFit": ("bitfit", {"train": (r"(^|/)bias$", *minilm.HEAD)}, (1e-3, 4e-3)),
        "full FT": ("full", {}, minilm.FULL_RATES),
    }


def table(scale: str) -> Table:
    if scale == "paper":
        reason = missing.DEBERTA
        rows = quoted("adalora_t1_glue", ("method", "params"), TASKS, reason)
        return Table("AdaLoRA, Table 1: DeBERTaV3-base on GLUE", tuple(rows), seeds=1)
    methods = methods_at(scale)
    return Table(
        f"AdaLoRA, Table 1, {scale}", minilm.rows(methods, scale), seeds=minilm.seeds(scale),
        claims=minilm.claims(scale, *[("AdaLoRA r=2", x) for x in methods if "Ada" not in x]),
        notes=(minilm.NOTE,), cost=minilm.cost(methods),
    )  # fmt: skip
