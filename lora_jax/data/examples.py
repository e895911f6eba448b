"""What a task makes of a record: an example, and the helpers all tasks share."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, Literal, Protocol, TypedDict

import numpy as np

from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError

Record = Mapping[str, Any]


class Example(TypedDict):
    """tokens: int32[T]; loss_mask: float32[T], 1 where the token is a target of prediction."""

    tokens: np.ndarray
    loss_mask: np.ndarray


class EncoderExample(TypedDict):
    """tokens, token_type_ids: int32[T]; label: class index, or float where head is regression."""

    tokens: np.ndarray
    token_type_ids: np.ndarray
    label: int | float


class ImageExample(TypedDict):
    """image: uint8 [H, W, C]; label: class index."""

    image: np.ndarray
    label: int


class Task(Protocol):
    """What the trainer and the evaluation ask of any task (a frozen dataclass).

    Attributes:
      head: of the model it needs.
      reads: what the model is given of an example: "tokens" or "images".
      num_labels: outputs of that head; 0 for "lm", 1 for "regression".
      principal: name of the metric that chooses the best of several evaluations.
      higher_is_better: of that metric.
    """

    @property
    def head(self) -> Literal["lm", "classification", "regression"]: ...

    @property
    def reads(self) -> Literal["tokens", "images"]: ...

    @property
    def num_labels(self) -> int: ...

    @property
    def principal(self) -> str: ...

    @property
    def higher_is_better(self) -> bool: ...

    def examples(
        self, records: Iterable[Record], tokenizer: Tokenizer
    ) -> list[Example] | list[EncoderExample] | list[ImageExample]:
        """`ImageExample`s of images; else `Example`s for the head "lm", `EncoderExample`s else."""
        ...

    def evaluation_records(self, records: Iterable[Record]) -> Sequence[Record]:
        """The records to predict for and to score, from those of an evaluation split."""
        ...

    def metrics(self, predictions: Any, records: Sequence[Record]) -> dict[str, float]:
        """Metrics by name, the principal one first.

        predictions: list[str] where head is "lm"; else float32 [N, num_labels], logits or values.
        records: the N `evaluation_records`, in the same order.
        """
        ...


_LOWER = ("loss", "error", "error_rate", "mse", "perplexity")


def higher_is_better(task: Task, metric: str) -> bool:
    """Of any metric: of the principal one as the task says, of the others by their names, which end
    in one of `_LOWER` where less is better (`general_loss`)."""
    return task.higher_is_better if metric == task.principal else not metric.endswith(_LOWER)


class LanguageTask(Task, Protocol):
    """What is asked besides of a task whose head is "lm"."""

    def prompt(self, record: Record, tokenizer: Tokenizer | None = None) -> str: ...

    def completion(self, record: Record, tokenizer: Tokenizer | None = None) -> str: ...

    def references(self, record: Record) -> list[str]: ...

    def prompt_ids(self, record: Record, tokenizer: Tokenizer) -> list[int]: ...


class _Fields(string.Formatter):
    """str.format over a record's fields, with an error that lists them."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return super().get_field(field_name, args, kwargs)
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise UserError(
                f"The template asks for {{{field_name}}}, which the record lacks. Its fields:"
                f" {', '.join(kwargs) or '(none)'}."
            ) from error


def fill(template: str, record: Record) -> str:
    """`template` with {field} (or {field[key]}) replaced by the record's values."""
    return _Fields().vformat(template, (), record)


def make_example(parts: Iterable[tuple[Sequence[int], int]]) -> Example:
    """Example from (ids, whether they are targets) in order."""
    ids: list[int] = []
    mask: list[int] = []
    for part, counts in parts:
        ids.extend(part)
        mask.extend([counts] * len(part))
    return {"tokens": np.asarray(ids, np.int32), "loss_mask": np.asarray(mask, np.float32)}


def eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise UserError("The tokenizer names no end token (eos_token), which ends each completion.")
    return tokenizer.eos_id


def field(record: Record, name: str) -> Any:
    """A field of the record, with an error that lists its fields."""
    if name not in record:
        raise UserError(f"The record has no field {name!r}. Its fields: {', '.join(record)}.")
    return record[name]


def one_each(predictions: Sized, records: Sequence[Record]) -> None:
    """UserError where there are no records, or not a prediction for each."""
    if len(predictions) != len(records) or not records:
        raise UserError(
            f"{len(predictions)} predictions for {len(records)} records: give one for each."
        )


def strings(record: Record, name: str) -> list[str]:
    """A field that holds one string or several, as a list."""
    value = field(record, name)
    return [value] if isinstance(value, str) else [str(v) for v in value]
