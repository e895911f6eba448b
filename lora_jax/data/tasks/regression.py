"""A number from the fields of any source: a text or two, and a value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from lora_jax.data.examples import Record, field
from lora_jax.data.metrics import labels as scores
from lora_jax.data.tasks.encoder import Labelled, texts_of
from lora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Regression(Labelled):
    """One text, or two, to a number.

    Attributes:
      text, text_pair: record fields; text_pair None: one text.
      label: record field, a number or a number's text.
      max_length: tokens, special ones included; the longer text of a pair is cut first.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    max_length: int = 128

    head: ClassVar[Literal["regression"]] = "regression"
    num_labels: ClassVar[int] = 1
    unlabelled: ClassVar[int | None] = None  # any number may be a value
    principal: ClassVar[str] = "pearson"
    higher_is_better: ClassVar[bool] = True

    def texts(self, record: Record) -> tuple[str, ...]:
        """The text, or the two."""
        return texts_of(record, self.text, self.text_pair)

    def value(self, record: Record) -> float:
        """The number."""
        label = field(record, self.label)
        try:
            value = float(label)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise UserError(
                f"{self.label}={label!r} of a record is not a number, or not a finite one."
            )
        return value

    def metrics(self, predictions: np.ndarray, records: Sequence[Record]) -> dict[str, float]:
        """`pearson`, `spearman`, and the mean squared error as `mse`. predictions: [N, 1]."""
        guess = np.asarray(predictions)[:, 0]
        true = self.values(guess, records)
        return {
            "pearson": scores.pearson(guess, true),
            "spearman": scores.spearman(guess, true),
            "mse": float(np.mean((guess - true) ** 2)),
        }


TASK = Regression
