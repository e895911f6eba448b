"""What tasks for a model with a head share: one text or two, a label, a length."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np

from lora_jax.data.examples import EncoderExample, Record, field, one_each
from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError


class Labelled(abc.ABC):
    """Examples from `texts` and `value`. Subclasses are frozen dataclasses.

    Attributes:
      max_length: tokens, special ones included; the longer text of a pair is cut first.
      unlabelled: the label of records whose true one is kept secret (GLUE's test sets); or None.
    """

    max_length: int
    reads: ClassVar[Literal["tokens"]] = "tokens"
    unlabelled: ClassVar[int | None] = -1

    @abc.abstractmethod
    def texts(self, record: Record) -> tuple[str, ...]:
        """The record's text, or its two texts."""

    @abc.abstractmethod
    def value(self, record: Record) -> int | float:
        """The record's class index, or its value; `unlabelled` where that is secret."""

    def examples(self, records: Iterable[Record], tokenizer: Tokenizer) -> list[EncoderExample]:
        """One example a record: {tokens, token_type_ids: int32 [T], label}."""
        records = list(records)
        texts = [self.texts(record) for record in records]
        inputs = [t[0] for t in texts] if texts and len(texts[0]) == 1 else texts
        encoded = tokenizer.encode_for_classification(
            cast("Sequence[tuple[str, str]]", inputs), max_length=self.max_length
        )
        return [
            {
                "tokens": np.asarray(ids, np.int32),
                "token_type_ids": np.asarray(types, np.int32),
                "label": self.value(record),
            }
            for (ids, types), record in zip(encoded, records, strict=True)
        ]

    def evaluation_records(self, records: Iterable[Record]) -> Sequence[Record]:
        """The records to predict for and to score: all."""
        return list(records)

    def values(self, predictions: np.ndarray, records: Sequence[Record]) -> np.ndarray:
        """True classes or values [N], each checked to have its prediction."""
        one_each(predictions, records)
        true = np.asarray([self.value(record) for record in records])
        if self.unlabelled is not None and (true == self.unlabelled).any():
            raise UserError("The labels of this split are secret (-1): evaluate on another split.")
        return true


def texts_of(record: Record, *names: str | None) -> tuple[str, ...]:
    """The fields of these names as text; None is no field."""
    return tuple(str(field(record, name)) for name in names if name is not None)


def class_index(value: Any, classes: int, names: Sequence[str] = ()) -> int:
    """The class of a label given as its index or as its name."""
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, int) and (value == Labelled.unlabelled or 0 <= value < classes):
        return int(value)
    raise UserError(
        f"Label {value!r} is none of the {classes} classes"
        + (f": {', '.join(names)}." if names else f" 0 to {classes - 1}.")
    )
