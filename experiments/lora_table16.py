"""LoRA paper, Tables 16 and 17: low data, by method and number of examples.

    lora-jax table experiments/lora_table16.py --scale small --workdir runs/lora_table16

The paper trains GPT-3, whose weights are not public, on MNLI-n. `small`: MiniLM-L6 (extra `minilm`)
on the first n sentences of SST-2, with Table 17's batches and prefix lengths, and its epochs where
they take a CPU minutes; learning rates are the better of two on seed 0. `GLUE_DIR` names a folder
with TFDS's glue. `smoke`: two steps.
"""

import missing
from minilm import HEAD, trained

from lora_jax.tables import Claim, NotRun, Published, Row, Table
from lora_jax.tables.presets import row
from lora_jax.tables.quoted import quoted

# The paper's name of n, its column in Table 16, and the epochs here.
SIZES = {100: ("MNLI-100", "MNLI(m)-100", 40), 1_000: ("MNLI-1k", "MNLI(m)-1k", 5),
         10_000: ("MNLI-10K", "MNLI(m)-10k", 1)}  # fmt: skip
METHODS = {
    "Fine-Tune": ("full", (1e-4, 2e-4)), "PrefixEmbed": ("prefix_embedding", (1e-2, 5e-2)),
    "PrefixLayer": ("prefix_layer", (3e-3, 1e-2)), "LoRA": ("lora", (2e-3, 4e-3)),
}  # fmt: skip
NOTES = (
    "published: GPT-3 on MNLI-n; ours: MiniLM-L6 on SST-2's first n: only the order of methods and "
    "what n does to it can be compared",
    "Table 17 trains 40 epochs of 100 and of 1,000 examples and 4 of 10,000; here 40, 5 and 1",
    "an encoder has no place between prompt and completion: no infix tokens (8 in Table 17)",
    "all but full fine-tuning train the new head whole besides",
)


def fields(method: str, n: int) -> dict[str, object]:
    """Of the method, from Table 17's row of n."""
    paper = row("lora_t17_hparams_low_data", n=SIZES[n][0])
    if method.startswith("Prefix"):
        return {"prefix": paper[f"{method}_lp"], "train": HEAD}
    if method == "LoRA":
        return {"rank": paper["lora_r_q"], "alpha": float(paper["lora_r_q"]), "train": HEAD}
    return {}


def table(scale: str) -> Table:
    rows = []
    for n, (name, column, epochs) in SIZES.items():
        for method, (kind, rates) in METHODS.items():
            cited = Published("lora_t16_low_data", {"method": method}, column, times=0.01)
            if scale == "paper":
                work = NotRun(missing.GPT3)
                rows.append(Row(f"GPT-3 {method}", f"n={n}", work, cited))
                continue
            batch = row("lora_t17_hparams_low_data", n=name)["batch_size"]
            work = trained(
                (kind, fields(method, n), rates), scale,
                task="sst2", examples=n, epochs=epochs, batch=batch,
            )  # fmt: skip
            rows.append(Row(f"MiniLM-L6 {method}", f"n={n}", work, cited))
    if scale == "paper":
        reason = missing.GPT3
        rows += quoted("lora_t16_low_data", ("method",), ("MNLI(m)-392K",), reason, times=0.01)
    if scale == "smoke":
        rows = rows[2:3]
    claims = [
        Claim("MiniLM-L6 LoRA", f"MiniLM-L6 {m}", f"n={n}")
        for n in SIZES for m in METHODS if m != "LoRA" and scale == "small"
    ]  # fmt: skip
    return Table(
        f"LoRA paper, Table 16 (low data), {scale}", tuple(rows),
        seeds=1 if scale == "smoke" else 3, claims=tuple(claims), notes=NOTES,
        cost="about 55 minutes on 2 CPU cores",
    )  # fmt: skip
