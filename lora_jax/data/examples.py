"""What a task makes of a record: an example, and the helpers all tasks share."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np

from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError

Record = Mapping[str, Any]


class Example(TypedDict):
    """tokens: int32[T]; loss_mask: float32[T], 1 where the token is a target of prediction."""

    tokens: np.ndarray
    loss_mask: np.ndarray


class Task(Protocol):
    """What the trainer and the evaluation ask of a task."""

    def prompt(self, record: Record, tokenizer: Tokenizer | None = None) -> str: ...

    def completion(self, record: Record, tokenizer: Tokenizer | None = None) -> str: ...

    def references(self, record: Record) -> list[str]: ...

    def prompt_ids(self, record: Record, tokenizer: Tokenizer) -> list[int]: ...

    def examples(self, records: Iterable[Record], tokenizer: Tokenizer) -> list[Example]: ...


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


def strings(record: Record, field: str) -> list[str]:
    """A field that holds one string or several, as a list."""
    if field not in record:
        raise UserError(f"The record has no field {field!r}. Its fields: {', '.join(record)}.")
    value = record[field]
    return [value] if isinstance(value, str) else [str(v) for v in value]
