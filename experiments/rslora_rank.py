"""rsLoRA (Kalajdzievski 2023): what a higher rank gives, with alpha/r and with alpha/sqrt(r).

    lora-jax table experiments/rslora_rank.py --scale small --workdir runs/rslora_rank

The paper's curves are figures (Llama-2 on OpenOrca); what is printed is the author's MT-Bench after
DPO of OpenChat 3.5, which is not a task of the project. `small`: MiniLM-L6 (extra `minilm`) on
SST-2, alpha 16 at every rank.
"""

import minilm

from lora_jax.tables import Table
from lora_jax.tables.quoted import quoted

RANKS = (4, 32, 128)
SMALL: dict[str, minilm.Method] = {
    f"{name} r={r}": ("lora", {"rank": r, "alpha": 16.0, "scaling": scaling}, (5e-4, 2e-3))
    for r in RANKS
    for name, scaling in (("LoRA", "standard"), ("rsLoRA", "rslora"))
}


def table(scale: str) -> Table:
    if scale == "paper":
        columns = ("MTBench_turn1", "MTBench_turn2", "MTBench_avg")
        reason = "preference training and MT-Bench are not in the project"
        rows = quoted("rslora_mtbench", ("model",), columns, reason)
        return Table("rsLoRA: OpenChat 3.5 after DPO", tuple(rows), seeds=1)
    return Table(
        f"rsLoRA, the curve over the rank, {scale}", minilm.rows(SMALL, scale),
        seeds=minilm.seeds(scale), notes=(minilm.NOTE,), cost=minilm.cost(SMALL),
        claims=minilm.claims(scale, *[(f"rsLoRA r={r}", f"LoRA r={r}") for r in RANKS]),
    )  # fmt: skip
