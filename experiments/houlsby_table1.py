"""Houlsby et al. 2019, Table 1: adapters beside full fine-tuning of BERT-large, on GLUE.

    lora-jax table experiments/houlsby_table1.py --scale small --workdir runs/houlsby_table1

Adapters with the layers' norms trained beside them, as in that paper. `paper`: its search over
learning rate, epochs and size (section 3.1), on the development sets, for a GPU and the hub; what
it prints is of GLUE's test server. `small`: MiniLM-L6 (extra `minilm`) on CoLA.
"""

import minilm

from lora_jax.config import load_module
from lora_jax.tables import Published, Row, Table

NORMS = (r"^layers/.*_norm/",)
RATES, EPOCHS, SIZES = (3e-5, 3e-4, 3e-3), (3, 20), (8, 64, 256)
COLUMNS = {
    "CoLA": ("cola", "matthews"), "SST": ("sst2", "accuracy"), "MRPC": ("mrpc", "f1"),
    "STS-B": ("stsb", "spearman"), "QQP": ("qqp", "f1"), "MNLIm": ("mnli", "accuracy"),
    "MNLImm": ("mnli", "accuracy_mismatched"), "QNLI": ("qnli", "accuracy"),
    "RTE": ("rte", "accuracy"),
}  # fmt: skip
ADAPTER = {"train": (*minilm.HEAD, *NORMS), "start": "normal"}
SMALL: dict[str, minilm.Method] = {
    "Adapters (64)": ("adapter_h", {"size": 64, **ADAPTER}, (3e-4, 3e-3)),
    "Adapters (8)": ("adapter_h", {"size": 8, **ADAPTER}, (3e-4, 3e-3)),
    "full FT": ("full", {}, minilm.FULL_RATES),
}


def table(scale: str) -> Table:
    if scale == "paper":
        return _paper()
    return Table(
        f"Houlsby et al., Table 1, {scale}", minilm.rows(SMALL, scale), seeds=minilm.seeds(scale),
        claims=minilm.claims(scale, ("full FT", "Adapters (64)"), ("full FT", "Adapters (8)")),
        notes=(minilm.NOTE,), cost=minilm.cost(SMALL),
    )  # fmt: skip


def _paper() -> Table:
    sizes = load_module(str(minilm.CONFIG)).SIZES
    rows = []
    for method, tried in (
        ("BERT-LARGE full FT", None), ("Adapters (8-256)", SIZES), ("Adapters (64)", (64,)),
    ):  # fmt: skip
        for column, (task, metric) in COLUMNS.items():
            grid = []
            for epochs in EPOCHS:
                steps = epochs * sizes[task] // 32
                for rate in RATES:
                    one = {"optimizer.learning_rate": rate, "training.steps": steps,
                           "training.eval_every": steps // epochs}  # fmt: skip
                    grid += [{**one, "method.size": n} for n in tried] if tried else [one]
            kind, fields = ("adapter_h", ADAPTER) if tried else ("full", {})
            work = minilm.trained(
                (kind, fields, ()), "paper", metric=metric, grid=grid, task=task, examples=0,
                model="google-bert/bert-large-uncased", warmup=0.1, decay=0.0,
            )  # fmt: skip
            cited = Published("houlsby_t1_glue", {"method": method}, column, times=0.01)
            rows.append(Row(method, column, work, cited))
    return Table(
        "Houlsby et al., Table 1: BERT-large", tuple(rows), seeds=5, statistic="median",
        notes=("published: GLUE's test server, ours: the development sets",
               "the paper takes the best of 5 seeds on the development set; ours is the median"),
        cost="weeks on one GPU",
    )  # fmt: skip
