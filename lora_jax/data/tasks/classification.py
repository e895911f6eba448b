"""Classes from the fields of any source: a text or two, and a label."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from lora_jax.data.examples import Record, field
from lora_jax.data.metrics import labels as scores
from lora_jax.data.tasks.encoder import Labelled, class_index, texts_of
from lora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Classification(Labelled):
    """One text, or two, to one of some classes.

    Attributes:
      labels: names of the classes in the order of their indices. Records may hold the name, or the
        index (also as text, as in a CSV, unless it is itself a name).
      text, text_pair: record fields; text_pair None: one text.
      label: record field.
      max_length: tokens, special ones included; the longer text of a pair is cut first.
      principal: "accuracy", "macro_f1", "matthews", or, for two classes, "f1" (of the second).
    """

    labels: tuple[str, ...]
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    max_length: int = 128
    principal: str = "accuracy"

    head: ClassVar[Literal["classification"]] = "classification"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise UserError(f"labels={self.labels!r}: give two or more different names.")
        if self.principal not in self._metrics():
            raise UserError(
                f"principal={self.principal!r}: choose one of {', '.join(self._metrics())}."
            )

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.labels)

    def texts(self, record: Record) -> tuple[str, ...]:
        """The text, or the two."""
        return texts_of(record, self.text, self.text_pair)

    def value(self, record: Record) -> int:
        """The class index."""
        label = field(record, self.label)
        if isinstance(label, str) and label not in self.labels and label.isdecimal():
            label = int(label)
        return class_index(label, self.num_labels, self.labels)

    def metrics(self, predictions: np.ndarray, records: Sequence[Record]) -> dict[str, float]:
        """`accuracy`, `macro_f1`, `matthews` (and `f1` of two classes), the principal one first.

        predictions: logits float32 [N, num_labels].
        """
        guess = np.asarray(predictions).argmax(1)
        true = self.values(guess, records)
        order = sorted(self._metrics(), key=lambda name: name != self.principal)
        return {name: getattr(scores, name)(guess, true) for name in order}

    def _metrics(self) -> tuple[str, ...]:
        return ("accuracy", "macro_f1", "matthews") + (("f1",) if self.num_labels == 2 else ())


TASK = Classification
