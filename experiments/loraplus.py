"""LoRA+ (Hayou et al. 2024): a higher learning rate for B than for A.

    lora-jax table experiments/loraplus.py --scale small --workdir runs/loraplus

The accuracies are heat maps in the paper; its text prints the best ratios, quoted in the notes.
`paper`: RoBERTa-base with its GLUE setup (Adam's betas 0.9 and 0.99) and what it does not print of
ours: a grid of rates, warm-up and weight decay; for a GPU and the hub. `small`: MiniLM-L6 (extra
`minilm`) on SST-2.
"""

import minilm

from lora_jax.tables import Row, Table, Trained, published

RATIOS = (1, 2, 4, 8, 16)
RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
BETAS = {"optimizer.b1": 0.9, "optimizer.b2": 0.99}
OURS = "warm-up and weight decay are not printed: none here"
EPOCHS = {"mnli": 3, "qqp": 3, "qnli": 3, "sst2": 10}
SMALL: dict[str, minilm.Method] = {
    f"ratio {n}": ("lora_plus", {"rank": 8, "alpha": 8.0, "lr_ratio": float(n)}, (5e-4, 2e-3, 4e-3))
    for n in RATIOS
}


def printed() -> tuple[str, ...]:
    """What the paper's text says, with its source."""
    frame, about = published.frame("loraplus_claims"), published.index().loc["loraplus_claims"]
    said = [f"{x.item}: {x.value}" for x in frame.itertuples()]
    return tuple(f"{text} ({about['paper']}, {about['status']})" for text in said)


def table(scale: str) -> Table:
    if scale == "paper":
        rows = [
            Row(f"RoBERTa-base ratio {n}", task, _paper(task, n)) for task in EPOCHS for n in RATIOS
        ]
        return Table("LoRA+: RoBERTa-base on GLUE", tuple(rows), seeds=3,
                     notes=(OURS, *printed()), cost="weeks on one GPU")  # fmt: skip
    return Table(
        f"LoRA+, the ratio of rates, {scale}", minilm.rows(SMALL, scale), seeds=minilm.seeds(scale),
        claims=minilm.claims(scale, *[(f"ratio {n}", "ratio 1") for n in RATIOS[1:]]),
        notes=(minilm.NOTE, *printed()), cost=minilm.cost(SMALL),
    )  # fmt: skip


def _paper(task: str, ratio: int) -> Trained:
    fields = {"rank": 8, "alpha": 8.0, "lr_ratio": float(ratio)}
    return minilm.trained(
        ("lora_plus", fields, RATES), "paper", task=task, epochs=EPOCHS[task], examples=0,
        model="FacebookAI/roberta-base", more=BETAS, warmup=0.0, decay=0.0,
    )  # fmt: skip
