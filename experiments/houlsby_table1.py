"""Houlsby et al. 2019, Table 1: adapters beside full fine-tuning of BERT-large, on GLUE.

    lora-jax table experiments/houlsby_table1.py --scale small --workdir runs/houlsby_table1

Adapters with the layers' norms trained beside them, as in that paper. `paper`: its search over
learning rate, epochs and size (section 3.2; batch and warm-up: 3.1), chosen on the development
sets, for a GPU and the hub; what it prints is of GLUE's test server. Its row of full fine-tuning is
BERT's own (Devlin et al. 2019, section 4.1), and so is that row's search. The settings and where
each was read: `published/houlsby_hparams.csv`. `small`: MiniLM-L6 (extra `minilm`) on SST-2.
"""

from typing import Any

import minilm

from lora_jax.config import literal, load_module
from lora_jax.tables import Published, Row, Table, Trained
from lora_jax.tables.presets import row

NORMS = (r"^layers/.*_norm/",)
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
    rows = []
    for method in ("BERT-LARGE full FT", "Adapters (8-256)", "Adapters (64)"):
        for column, (task, metric) in COLUMNS.items():
            cited = Published("houlsby_t1_glue", {"method": method}, column, times=0.01)
            rows.append(Row(method, column, _work(method, task, metric), cited))
    return Table(
        "Houlsby et al., Table 1: BERT-large", tuple(rows), seeds=5, statistic="median",
        notes=("published: GLUE's test server, ours: the development sets",
               "the paper takes the best of 5 seeds on the development set; ours is the median, "
               "and the grid is tried on the first seed alone",
               "weight decay, clipping and epsilon are of the authors' code, the paper does not "
               "print them; their Adam has no bias correction, ours has"),
        cost="weeks on one GPU",
    )  # fmt: skip


def _work(method: str, task: str, metric: str) -> Trained:
    printed = row("houlsby_hparams", method=method)
    sizes = load_module(str(minilm.CONFIG)).SIZES
    grid = []
    for epochs in _numbers(printed["epochs"]):
        steps = epochs * sizes[task] // printed["batch_size"]
        for rate in _numbers(printed["lr"]):
            one = {"optimizer.learning_rate": float(rate), "training.steps": steps,
                   "training.eval_every": steps // epochs}  # fmt: skip
            if printed["size"] is None:
                grid.append(one)
            else:
                grid += [{**one, "method.size": size} for size in _numbers(printed["size"])]
    kind, fields = ("full", {}) if printed["size"] is None else ("adapter_h", ADAPTER)
    return minilm.trained(
        (kind, fields, ()), "paper", metric=metric, grid=grid, task=task, examples=0,
        chosen_by={"cola": "matthews", "stsb": "pearson"}.get(task, "accuracy"),
        model="google-bert/bert-large-uncased", batch=printed["batch_size"],
        warmup=printed["warmup_ratio"], decay=printed["weight_decay"],
        more={"optimizer.clip_norm": printed["clip_norm"], "optimizer.eps": printed["adam_eps"]},
    )  # fmt: skip


def _numbers(cell: Any) -> list[Any]:
    """Of a cell that lists several: "3 20"."""
    return [literal(x) for x in str(cell).split()]
