"""GLUE's nine tasks (Wang et al. 2018, arXiv:1804.07461), over TFDS's records of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lora_jax.data.examples import Record, field
from lora_jax.data.metrics import labels
from lora_jax.data.tasks.encoder import Labelled, class_index, texts_of
from lora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Set:
    """fields: of the text or texts in TFDS's records. metrics: the one LoRA's paper prints first
    (its Table 2), then GLUE's others. num_labels: 1 for values in place of classes."""

    fields: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    num_labels: int = 2


_SETS = {
    "cola": _Set(("sentence",), ("matthews",)),
    "sst2": _Set(("sentence",)),
    "mrpc": _Set(("sentence1", "sentence2"), ("accuracy", "f1")),
    "stsb": _Set(("sentence1", "sentence2"), ("pearson", "spearman"), num_labels=1),
    "qqp": _Set(("question1", "question2"), ("accuracy", "f1")),
    "mnli": _Set(("premise", "hypothesis"), num_labels=3),
    "qnli": _Set(("question", "sentence")),
    "rte": _Set(("sentence1", "sentence2")),
    "wnli": _Set(("sentence1", "sentence2")),
}
_METRICS = {
    "accuracy": labels.accuracy,
    "f1": labels.f1,
    "matthews": labels.matthews,
    "pearson": labels.pearson,
    "spearman": labels.spearman,
}


@dataclasses.dataclass(frozen=True)
class Glue(Labelled):
    """One of GLUE's tasks; the source is TFDS("glue/<name>").

    MNLI has two validation sets. `validation: "validation_matched"` evaluates on one of them,
    `"validation_matched+validation_mismatched"` on both, each with its own metric.

    Attributes:
      name: of the task.
      max_length: tokens, special ones included; the longer text of a pair is cut first.
    """

    name: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    max_length: int = 128

    def __post_init__(self) -> None:
        if self.name not in _SETS:
            raise UserError(f"GLUE has no task {self.name!r}. Its tasks: {', '.join(_SETS)}.")

    @property
    def head(self) -> Literal["classification", "regression"]:
        """ "regression" for stsb (0 to 5), else "classification"."""
        return "classification" if self.num_labels > 1 else "regression"

    @property
    def num_labels(self) -> int:
        """Classes; 1 for stsb."""
        return _SETS[self.name].num_labels

    @property
    def principal(self) -> str:
        """The metric LoRA's Table 2 prints."""
        return _SETS[self.name].metrics[0]

    @property
    def higher_is_better(self) -> bool:
        """True for all of GLUE's metrics."""
        return True

    def texts(self, record: Record) -> tuple[str, ...]:
        """The sentence, or the two."""
        return texts_of(record, *_SETS[self.name].fields)

    def value(self, record: Record) -> int | float:
        """The class, or stsb's value; -1 in test sets."""
        label = field(record, "label")
        return float(label) if self.num_labels == 1 else class_index(label, self.num_labels)

    def metrics(self, predictions: np.ndarray, records: Sequence[Record]) -> dict[str, float]:
        """GLUE's metrics; of two also their mean as `average`, which is GLUE's score of the task.

        predictions: float32 [N, num_labels]. Where the records are of several splits (their field
        `split`), metrics of all but the first are named after it: `accuracy_mismatched`.
        """
        guess = np.asarray(predictions)
        guess = guess[:, 0] if self.num_labels == 1 else guess.argmax(1)
        true = self.values(guess, records)
        splits = np.asarray([str(record.get("split", "")) for record in records])
        found: dict[str, float] = {}
        for split in dict.fromkeys(splits.tolist()):
            suffix = f"_{split.split('_')[-1]}" if found else ""
            part = splits == split
            scores = {n: _METRICS[n](guess[part], true[part]) for n in _SETS[self.name].metrics}
            if len(scores) > 1:
                scores["average"] = sum(scores.values()) / len(scores)
            found |= {n + suffix: value for n, value in scores.items()}
        return found


TASK = Glue
