"""Presets: hyperparameters as the papers and their authors' scripts print them, for configs.

They are read where they were transcribed, the CSVs in `published/`, and stand nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax import config as configs
from lora_jax.errors import UserError, nearest
from lora_jax.tables import published

_PAPER, _SCRIPTS = "lora_t09_hparams_roberta", "lora_script_hparams"
_LARGE = "FacebookAI/roberta-large"


@dataclasses.dataclass(frozen=True)
class Glue:
    """Where a preset for GLUE stands: a row a task.

    Attributes:
      table: name of the CSV.
      where: the columns that choose its rows, besides the task's.
      model: the base, on the hub.
      kind: of the method.
    """

    table: str
    where: Mapping[str, str]
    model: str
    kind: str = "lora"


GLUE: Mapping[str, Glue] = {
    "roberta-base": Glue(_PAPER, {"config": "RoBERTa-base LoRA"}, "FacebookAI/roberta-base"),
    "roberta-base-scripts": Glue(_SCRIPTS, {"model": "roberta-base"}, "FacebookAI/roberta-base"),
    "roberta-large": Glue(_PAPER, {"config": "RoBERTa-large LoRA"}, _LARGE),
    "roberta-large-scripts": Glue(_SCRIPTS, {"model": "roberta-large", "lora_r": "8"}, _LARGE),
    "roberta-large-dagger": Glue(_PAPER, {"config": "RoBERTa-large LoRA dagger"}, _LARGE),
    **{
        f"roberta-large-{name}-{size}": Glue(
            _PAPER, {"config": f"RoBERTa-large {printed}({size}) dagger"}, _LARGE, kind
        )
        for name, printed, kind in (
            ("adapter_p", "AdptP", "adapter_p"),
            ("adapter_h", "AdptH", "adapter_h"),
        )
        for size in (("3M", "0.8M") if name == "adapter_p" else ("6M", "0.8M"))
    },
    "deberta-xxl": Glue(
        "lora_t10_hparams_deberta", {"config": "DeBERTa-XXL LoRA"}, "microsoft/deberta-v2-xxlarge"
    ),
    "deberta-xxl-scripts": Glue(
        _SCRIPTS, {"model": "microsoft/deberta-v2-xxlarge"}, "microsoft/deberta-v2-xxlarge"
    ),
}
_TASKS = {
    "mnli": "MNLI", "sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "qnli": "QNLI", "qqp": "QQP",
    "rte": "RTE", "stsb": "STS-B",
}  # fmt: skip


def row(table: str, **where: Any) -> dict[str, Any]:
    """One row of a published table, its cells as Python values; None where nothing is printed.

    Args:
      where: values of columns that choose the row, compared as text.

    Raises UserError for an unknown table or column, or where not exactly one row fits.
    """
    found = published.row(table, where)
    return {str(k): configs.literal(v) if v else None for k, v in found.items()}


def glue(name: str, task: str) -> dict[str, Any]:
    """A preset of `GLUE` for a task, as the arguments of configs/glue.py.

    The batch is the paper's "batch size", which is one device's, or of the scripts' rows that of
    all their devices together. Where the paper prints no weight decay, the scripts' 0.1 holds.

    Raises UserError for an unknown preset or task, or one with dropout before the classifier,
    which configs cannot set.
    """
    if name not in GLUE:
        raise UserError(f"no preset {name!r} for GLUE; {nearest(name, GLUE)}")
    if task not in _TASKS:
        raise UserError(f"preset {name!r} has no task {task!r}; {nearest(task, _TASKS)}")
    preset = GLUE[name]
    scripts = preset.table == _SCRIPTS
    where = {**preset.where, "task": task if scripts else _TASKS[task]}
    if scripts and "deberta" in name:
        where["script"] = f"deberta_v2_xxlarge_{task}.sh"
    found = row(preset.table, **where)
    if found.get("cls_dropout"):
        raise UserError(
            f"preset {name!r} has dropout {found['cls_dropout']} before the classifier, which "
            "model.* cannot set"
        )
    if found.get("warmup_steps"):
        raise UserError(
            f"preset {name!r} warms up for {found['warmup_steps']} steps in {task}, which is no "
            "fraction: set optimizer.warmup_steps in a config of your own"
        )
    rank = found["lora_r" if scripts else "lora_r_q"]
    decay = found.get("weight_decay")
    return {
        "model": preset.model,
        "method": preset.kind,
        "batch": found["effective_batch" if scripts else "batch_size"],
        "epochs": found["epochs"],
        "rate": float(found["lr"]),
        "length": found["max_seq_len"],
        "warmup": float(found["warmup_ratio"] or 0.0),
        "decay": 0.1 if decay is None else float(decay),
        "rank": found["bottleneck_r"] if rank is None else rank,
        "alpha": float(found["lora_alpha"] or 0.0),
    }
