"""Batches of labelled examples, each as long as its bucket.

Examples wait in the queue of the smallest bucket that takes them; the first queue to fill becomes
a batch. Rows are thus nearly as long as their texts, and only as many shapes occur as there are
buckets. Axis letters: B rows, T tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lora_jax.data.examples import EncoderExample
from lora_jax.data.packing import Batch, TooLong
from lora_jax.errors import UserError

_log = logging.getLogger(__name__)


def sizes(length: int, buckets: Sequence[int]) -> tuple[int, ...]:
    """Row lengths in rising order, `length` last."""
    wrong = [b for b in buckets if not 0 < b <= length]
    if wrong:
        raise UserError(f"buckets={tuple(buckets)}: {wrong[0]} is not within 1 to length={length}.")
    return tuple(sorted({*buckets, length}))


def prepare(
    examples: Sequence[EncoderExample],
    *,
    length: int,
    too_long: TooLong = "error",
    training: bool = True,
) -> list[EncoderExample]:
    """Examples of at most `length` tokens.

    too_long: "error"; "drop", for training only, since evaluation has a record for each row; or
      "truncate", which keeps the last token ([SEP]) at the end.
    """
    if too_long not in ("error", "truncate", "drop"):
        raise UserError(f"too_long={too_long!r}: choose 'error', 'truncate' or 'drop'.")
    if too_long == "drop" and not training:
        raise UserError("too_long='drop' would leave records without a prediction: truncate them.")
    kept: list[EncoderExample] = []
    for index, example in enumerate(examples):
        if training and isinstance(example["label"], int) and example["label"] < 0:
            raise UserError(f"Example {index} has no label ({example['label']}): train on a split"
                            " that has.")  # fmt: skip
        if len(example["tokens"]) <= length:
            kept.append(example)
        elif too_long == "error":
            raise UserError(
                f"Example {index} has {len(example['tokens'])} tokens, more than length={length}."
                " Lower the task's max_length to it, or raise the length."
            )
        elif too_long == "truncate":
            places = [*range(length - 1), -1]
            kept.append(
                {
                    "tokens": example["tokens"][places],
                    "token_type_ids": example["token_type_ids"][places],
                    "label": example["label"],
                }
            )
    if len(kept) < len(examples):
        _log.info("%d examples dropped: too long", len(examples) - len(kept))
    if not kept:
        raise UserError(f"No example of at most length={length} tokens is left.")
    return kept


def pad(examples: Sequence[EncoderExample], *, rows: int, size: int, pad_id: int) -> Batch:
    """A batch of `rows` rows of `size` tokens; those without an example are padding of weight 0.

    They attend to one token: a softmax over none would be NaN, and NaN times 0 is NaN.
    """
    shape = (rows, size)
    kind = np.float32 if any(isinstance(e["label"], float) for e in examples) else np.int32
    batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "attention_mask": np.zeros(shape, np.int32),
        "token_type_ids": np.zeros(shape, np.int32),
        "labels": np.zeros(rows, kind),
        "weights": np.zeros(rows, np.float32),
    }
    for row, example in enumerate(examples):
        end = len(example["tokens"])
        batch["tokens"][row, :end] = example["tokens"]
        batch["attention_mask"][row, :end] = 1
        batch["token_type_ids"][row, :end] = example["token_type_ids"]
        batch["labels"][row] = example["label"]
        batch["weights"][row] = 1
    batch["attention_mask"][len(examples) :, 0] = 1
    return batch


def widen(batch: Batch, length: int, pad_id: int) -> Batch:
    """The batch with rows padded to `length`; it computes the same."""
    if batch["tokens"].shape[1] == length:
        return batch
    found: Batch = {}
    for name, x in batch.items():
        fill = pad_id if name == "tokens" else 0
        more = ((0, 0), (0, length - x.shape[1])) if x.ndim == 2 else ()
        found[name] = np.pad(x, more, constant_values=fill) if more else x
    return found


def alike(batches: Sequence[Batch], pad_id: int) -> list[Batch]:
    """The batches with rows as long as the longest has them; images have no length."""
    if any("tokens" not in batch for batch in batches):
        return list(batches)
    longest = max(batch["tokens"].shape[1] for batch in batches)
    return [widen(batch, longest, pad_id) for batch in batches]


def rows_a_batch(count: int, most: int) -> int:
    """How many rows, `most` at most, as few batches as can be have, filled up as little as can be:
    70 examples in batches of 64 are two of 35; one example is a batch of its own."""
    batches = max(1, math.ceil(count / most))
    return max(1, math.ceil(count / batches))


def in_order(
    examples: Sequence[EncoderExample],
    *,
    batch_size: int,
    length: int,
    buckets: Sequence[int],
    pad_id: int,
    too_long: TooLong,
) -> Iterator[Batch]:
    """One pass for evaluation, the examples of each bucket together; see `rows_a_batch`.

    Batches have a further array, rows int32 [B]: the index of the example of each row, -1 on the
    rows of weight 0 that fill up the last batch of a bucket.
    """
    limits = sizes(length, buckets)
    kept = prepare(examples, length=length, too_long=too_long, training=False)
    lower = 0
    for limit in limits:
        places = [i for i, e in enumerate(kept) if lower < len(e["tokens"]) <= limit]
        lower = limit
        rows = rows_a_batch(len(places), batch_size)
        for start in range(0, len(places), rows):
            mine = places[start : start + rows]
            batch = pad([kept[i] for i in mine], rows=rows, size=limit, pad_id=pad_id)
            filled = mine + [-1] * (rows - len(mine))
            yield {**batch, "rows": np.asarray(filled, np.int32)}


class Bucketed(Iterator[Batch]):
    """Endless batches, each of one bucket.

    Args:
      order: endless random access to indices of `examples`.
      rows: which rows of the global batch to give.

    The place is the number of indices taken and the indices that wait: small, and JSON.
    """

    def __init__(
        self,
        examples: Sequence[EncoderExample],
        order: Any,
        *,
        batch_size: int,
        sizes: Sequence[int],
        rows: slice,
        pad_id: int,
    ) -> None:
        self._examples, self._order, self._sizes = examples, order, tuple(sizes)
        self._batch_size, self._rows, self._pad_id = batch_size, rows, pad_id
        self._taken = 0
        self._waiting: list[list[int]] = [[] for _ in self._sizes]

    def __next__(self) -> Batch:
        while True:
            index = int(self._order[self._taken])
            self._taken += 1
            size = len(self._examples[index]["tokens"])
            bucket = next(i for i, limit in enumerate(self._sizes) if limit >= size)
            queue = self._waiting[bucket]
            queue.append(index)
            if len(queue) == self._batch_size:
                self._waiting[bucket] = []
                mine = [self._examples[i] for i in queue[self._rows]]
                size = self._sizes[bucket]
                return pad(mine, rows=len(mine), size=size, pad_id=self._pad_id)

    def get_state(self) -> dict[str, Any]:
        return {"taken": self._taken, "waiting": [list(queue) for queue in self._waiting]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._taken = int(state["taken"])
        self._waiting = [list(queue) for queue in state["waiting"]]
