"""From examples of any length to rows of one length: padding, packing, and the too long.

Axis letters: B rows, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from lora_jax.data.examples import Example
from lora_jax.errors import UserError

Batch = dict[str, np.ndarray]
TooLong = Literal["error", "truncate", "drop"]
Loss = Literal["completion", "all"]
_log = logging.getLogger(__name__)


def prepare(
    examples: Iterable[Example],
    *,
    length: int,
    too_long: TooLong = "error",
    loss: Loss = "completion",
) -> list[Example]:
    """Examples of at most `length` tokens with their final loss mask.

    The first token of an example is never a target: nothing precedes it that could predict it.

    Args:
      too_long: "error" names the first offender; "truncate" keeps the first `length` tokens;
        "drop" leaves the example out. Truncation also drops examples left with no target.
      loss: "completion" keeps the examples' masks; "all" makes every token a target.
    """
    if too_long not in ("error", "truncate", "drop"):
        raise UserError(f"too_long={too_long!r}: choose 'error', 'truncate' or 'drop'.")
    if loss not in ("completion", "all"):
        raise UserError(f"loss={loss!r}: choose 'completion' or 'all'.")
    kept: list[Example] = []
    dropped = 0
    for index, example in enumerate(examples):
        tokens, mask = example["tokens"], example["loss_mask"]
        if len(tokens) > length and too_long == "error":
            raise UserError(
                f"Example {index} has {len(tokens)} tokens, more than length={length}. Raise the"
                " length, or pass too_long='truncate' or too_long='drop'."
            )
        mask = np.ones_like(mask) if loss == "all" else mask.copy()
        mask[:1] = 0
        if (len(tokens) > length and too_long == "drop") or not mask[:length].any():
            dropped += 1
            continue
        kept.append({"tokens": tokens[:length], "loss_mask": mask[:length]})
    if dropped:
        _log.info("%d examples dropped: too long, or no target within %d tokens", dropped, length)
    if not kept:
        raise UserError(f"No example with a target token within length={length} is left.")
    return kept


def pad(example: Example, *, length: int, pad_id: int) -> Batch:
    """One example as a row: arrays [T]; segment_ids 1 on tokens, 0 on padding."""
    size = len(example["tokens"])
    fill = (0, length - size)
    return {
        "tokens": np.pad(example["tokens"], fill, constant_values=pad_id).astype(np.int32),
        "loss_mask": np.pad(example["loss_mask"], fill).astype(np.float32),
        "positions": np.pad(np.arange(size), fill).astype(np.int32),
        "segment_ids": np.pad(np.ones(size), fill).astype(np.int32),
    }


def from_packed(packed: Batch, *, pad_id: int) -> Batch:
    """Our batch [B, T] from what grain's packing yields for {tokens, loss_mask}."""
    segments = packed["tokens_segment_ids"].astype(np.int32)
    return {
        "tokens": np.where(segments > 0, packed["tokens"], pad_id).astype(np.int32),
        "loss_mask": packed["loss_mask"].astype(np.float32),
        "positions": packed["tokens_positions"].astype(np.int32),
        "segment_ids": segments,
    }


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows [T] to a batch [B, T]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def empty_row(*, length: int, pad_id: int) -> Batch:
    """A row of padding only; it fills the last batch of an evaluation."""
    nothing: Example = {"tokens": np.zeros(0, np.int32), "loss_mask": np.zeros(0, np.float32)}
    return pad(nothing, length=length, pad_id=pad_id)
