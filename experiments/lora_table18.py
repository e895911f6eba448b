"""LoRA paper, Table 18: which rank, on the E2E NLG Challenge.

    lora-jax table experiments/lora_table18.py --scale small --workdir runs/lora_table18

`paper`: GPT-2 medium from the hub with Table 11's settings, 26,000 steps, for a GPU, on `E2E_DIR`
as in lora_table3.py. `small`: SmolLM2-135M (extra `quickstart`) on 250 pairs, three epochs. The
metrics need the extra `metrics`; METEOR needs Java.
"""

import smollm2_e2e
from given_folders import e2e, e2e_notes

from lora_jax.tables import Claim, NotRun, Published, Row, Table, Trained

PUBLISHED = "lora_t18_rank_e2e"
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SMALL = (1, 4, 64)
# The column in Table 18, and its unit to ours: METEOR and ROUGE-L stand in [0, 1] there.
COLUMNS = {"BLEU": ("BLEU", 0.01), "NIST": ("NIST", 1.0), "MET": ("METEOR", 1.0),
           "ROUGE-L": ("ROUGE_L", 1.0), "CIDEr": ("CIDEr", 1.0)}  # fmt: skip
NOTES = ("alpha is Table 11's 32 at every rank: Table 18 does not print it",)


def table(scale: str) -> Table:
    if scale == "paper":
        return _paper()
    pairs, ranks = (250, SMALL) if scale == "small" else (16, SMALL[:1])
    arms = {f"LoRA r={r}": ({"method.rank": r}, 2e-3) for r in ranks}
    return Table(
        f"LoRA paper, Table 18 (rank, E2E), {scale}: SmolLM2-135M on {pairs} pairs",
        tuple(smollm2_e2e.rows(arms, scale, pairs, ("BLEU", "ROUGE-L"))),
        seeds=3 if scale == "small" else 1,
        claims=tuple(Claim("SmolLM2 LoRA r=4", f"SmolLM2 LoRA r={r}", "BLEU")
                     for r in ranks if r != 4 and scale == "small"),
        notes=(*NOTES, smollm2_e2e.NOTE), cost="about 40 minutes on 2 CPU cores",
    )  # fmt: skip


def _paper() -> Table:
    rows = []
    config = e2e("openai-community/gpt2-medium", steps=26_000)
    for rank in RANKS:
        name, where = f"GPT-2 M LoRA r={rank}", {"rank": rank}
        for metric, (column, times) in COLUMNS.items():
            work = Trained(config, smollm2_e2e.METRICS[metric][0], {"method.rank": rank})
            rows.append(Row(name, metric, work, Published(PUBLISHED, where, column, times)))
        loss = NotRun("a run that decodes measures no loss on the validation texts")
        rows.append(Row(name, "validation loss", loss, Published(PUBLISHED, where, "val_loss")))
    return Table(
        "LoRA paper, Table 18: GPT-2 medium on E2E, by rank", tuple(rows), seeds=3,
        notes=(*NOTES, *e2e_notes()), cost="about 8 hours a row on one GPU",
    )  # fmt: skip
