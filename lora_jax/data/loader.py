"""Batches: endless shuffled training batches with a saved place, and one pass for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from lora_jax.data import packing as rows
from lora_jax.data.examples import Example
from lora_jax.data.packing import Batch, Loss, TooLong
from lora_jax.errors import UserError

# Rows filled at once by first-fit packing; more wastes less padding and mixes further.
_PACKING_BINS = 32


class Batches(Iterator[Batch]):
    """Iterator over batches whose place can be saved.

    `get_state()` is a JSON string (a plain leaf of a checkpoint); `set_state` takes it back and
    refuses the state of other data or settings. States are the same on every host.
    """

    def __init__(self, dataset: grain.IterDataset, fingerprint: str) -> None:
        self._iterator = iter(dataset)
        self._fingerprint = fingerprint

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> str:
        """The place after the batch last taken."""
        return json.dumps({"fingerprint": self._fingerprint, "place": self._iterator.get_state()})

    def set_state(self, state: str | dict[str, Any]) -> None:
        """Go on where `get_state` was called."""
        saved = json.loads(state) if isinstance(state, str) else state
        if saved["fingerprint"] != self._fingerprint:
            raise UserError(
                "The saved place belongs to other data or other loader settings (examples,"
                " batch_size, length, packing, loss, seed). Resume with the same, or start afresh."
            )
        self._iterator.set_state(saved["place"])


def batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    length: int,
    packing: bool,
    loss: Loss = "completion",
    seed: int,
    pad_id: int,
    host_index: int = 0,
    host_count: int = 1,
    too_long: TooLong = "error",
) -> Batches:
    """Endless batches, reshuffled each epoch.

    Every host builds the same global batch and takes its own rows: the sequence of examples does
    not depend on the number of hosts (packing on each host by itself would make it so).

    Args:
      batch_size: rows of the global batch; a host gets batch_size / host_count of them.
      length: tokens a row, T.
      packing: several examples a row (first fit), told apart by segment_ids and positions.
      loss: "completion" or "all", see `packing.prepare`; too_long likewise.
      seed: of the order.

    Returns:
      Iterator of {tokens int32, loss_mask float32, positions int32, segment_ids int32}, [B, T];
      segment_ids count from 1 within a row, 0 is padding.
    """
    if batch_size % host_count or not 0 <= host_index < host_count:
        raise UserError(
            f"batch_size={batch_size} does not divide over host_count={host_count} hosts, or"
            f" host_index={host_index} is not below it."
        )
    kept = rows.prepare(examples, length=length, too_long=too_long, loss=loss)
    # Threads would only contend here: the examples are small arrays in memory.
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    order = grain.MapDataset.source(kept).shuffle(seed=seed).repeat(None)
    if packing:
        packed = grain.experimental.FirstFitPackIterDataset(
            order.to_iter_dataset(reading),
            length_struct={"tokens": length, "loss_mask": length},
            num_packing_bins=max(batch_size, _PACKING_BINS),
            shuffle_bins=False,  # the examples were shuffled already
        )
        dataset = packed.batch(batch_size).map(lambda b: rows.from_packed(b, pad_id=pad_id))
    else:
        padded = order.map(lambda e: rows.pad(e, length=length, pad_id=pad_id))
        # Without drop_remainder grain rounds the endless length as a float, and overflows.
        whole = padded.batch(batch_size, drop_remainder=True, batch_fn=rows.stack)
        dataset = whole.to_iter_dataset(reading)
    share = batch_size // host_count
    mine = slice(host_index * share, (host_index + 1) * share)
    dataset = dataset.map(lambda b: {name: value[mine] for name, value in b.items()})
    settings = [batch_size, length, packing, seed, pad_id]
    return Batches(dataset, _fingerprint(kept, settings))


def eval_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    length: int,
    pad_id: int,
    loss: Loss = "completion",
    too_long: TooLong = "error",
) -> Iterator[Batch]:
    """One pass in order, one example a row. The last batch is filled with rows of padding
    (segment_ids and loss_mask 0), so that all batches have one shape."""
    kept = rows.prepare(examples, length=length, too_long=too_long, loss=loss)
    for start in range(0, len(kept), batch_size):
        chunk = [
            rows.pad(e, length=length, pad_id=pad_id) for e in kept[start : start + batch_size]
        ]
        blank = rows.empty_row(length=length, pad_id=pad_id)
        yield rows.stack(chunk + [blank] * (batch_size - len(chunk)))


def _fingerprint(examples: Sequence[Example], settings: list[Any]) -> str:
    """Short hash of what decides the sequence of batches."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for example in examples:
        digest.update(np.int64(len(example["tokens"])).tobytes())
        digest.update(example["tokens"].tobytes() + example["loss_mask"].tobytes())
    return digest.hexdigest()[:16]
