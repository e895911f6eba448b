"""PiSSA (Meng et al. 2024): Tables 2 (language models) and 3 (GLUE).

    lora-jax table experiments/pissa_table.py --scale small --workdir runs/pissa_table

`paper`: as published, not run. `small`: PiSSA beside LoRA from either start and full fine-tuning,
at rank 8, MiniLM-L6 (extra `minilm`) on SST-2.
"""

import minilm
import missing

from lora_jax.tables import Table
from lora_jax.tables.quoted import quoted

RATES = (5e-4, 2e-3)
R8 = {"rank": 8, "alpha": 8.0}
SMALL: dict[str, minilm.Method] = {
    "PiSSA": ("pissa", R8, RATES), "LoRA (kaiming)": ("lora", R8, RATES),
    "LoRA (gaussian)": ("lora", {**R8, "start": "gaussian"}, RATES),
    "full FT": ("full", {}, minilm.FULL_RATES),
}  # fmt: skip


def table(scale: str) -> Table:
    if scale == "paper":
        tests = ("GSM8K", "MATH", "HumanEval", "MBPP", "MT-Bench")
        tasks = ("MNLI", "SST2", "MRPC", "CoLA", "QNLI", "QQP", "RTE", "STSB", "ALL")
        reason = "MetaMathQA and the tests that score answers are not in the project"
        rows = quoted("pissa_t2_nlg", ("model", "strategy"), tests, reason)
        reason = missing.DEBERTA
        rows += quoted("pissa_t3_glue", ("method",), tasks, reason)
        return Table("PiSSA, Tables 2 and 3", tuple(rows), seeds=1)
    return Table(
        f"PiSSA, Table 3, {scale}", minilm.rows(SMALL, scale), seeds=minilm.seeds(scale),
        claims=minilm.claims(scale, *[("PiSSA", x) for x in SMALL if x != "PiSSA"]),
        notes=(minilm.NOTE,), cost=minilm.cost(SMALL),
    )  # fmt: skip
