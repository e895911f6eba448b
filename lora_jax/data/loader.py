"""Batches: endless shuffled training batches with a saved place, and one pass for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

import grain
import numpy as np

from lora_jax.data import bucketing, images
from lora_jax.data import packing as rows
from lora_jax.data.examples import EncoderExample, Example, ImageExample
from lora_jax.data.packing import Batch, Loss, TooLong
from lora_jax.errors import UserError

# Rows filled at once by first-fit packing; more wastes less padding and mixes further.
_PACKING_BINS = 32


class Batches(Iterator[Batch]):
    """Iterator over batches whose place can be saved.

    `get_state()` is a JSON string (a plain leaf of a checkpoint); `set_state` takes it back and
    refuses the state of other data or settings. States are the same on every host.

    Attributes:
      fingerprint: short hash of the examples and of the settings that decide their order.
    """

    def __init__(self, iterator: Any, fingerprint: str) -> None:
        self._iterator = iterator
        self.fingerprint = fingerprint

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> str:
        """The place after the batch last taken."""
        return json.dumps({"fingerprint": self.fingerprint, "place": self._iterator.get_state()})

    def set_state(self, state: str | dict[str, Any]) -> None:
        """Go on where `get_state` was called."""
        saved = json.loads(state) if isinstance(state, str) else state
        if saved["fingerprint"] != self.fingerprint:
            raise UserError(
                "The saved place belongs to other data or other loader settings (examples,"
                " batch_size, length, buckets, packing, loss, seed). Resume with the same, or start"
                " afresh."
            )
        self._iterator.set_state(saved["place"])


def batches(
    examples: Sequence[Example] | Sequence[EncoderExample] | Sequence[ImageExample],
    *,
    batch_size: int,
    length: int,
    packing: bool = False,
    buckets: Sequence[int] = (),
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
      length: tokens a row, T, at most.
      packing: several examples a row (first fit), told apart by segment_ids and positions; for
        language models.
      buckets: further row lengths below `length`. A batch holds examples of one bucket, the
        smallest that takes them, and is padded to that; for examples with labels.
      loss: "completion" or "all", see `packing.prepare`; too_long likewise.
      seed: of the order.

    Returns:
      Iterator of {tokens int32, loss_mask float32, positions int32, segment_ids int32}, [B, T];
      segment_ids count from 1 within a row, 0 is padding. For examples with labels: {tokens,
      attention_mask, token_type_ids int32 [B, T], labels int32 or float32 [B], weights float32
      [B], all 1}. For images, which have no length: {images float32 [B, H, W, C], labels, weights}.
    """
    if batch_size % host_count or not 0 <= host_index < host_count:
        raise UserError(
            f"batch_size={batch_size} does not divide over host_count={host_count} hosts, or"
            f" host_index={host_index} is not below it."
        )
    share = batch_size // host_count
    mine = slice(host_index * share, (host_index + 1) * share)
    settings: list[Any] = [batch_size, length, packing, seed, pad_id]
    if not examples:
        raise UserError("there are no records to train on; is the training split empty?")
    if _pictured(examples):
        _no_buckets(buckets)
        pictures = cast("Sequence[ImageExample]", examples)
        shuffled = images.Shuffled(pictures, batch_size=batch_size, seed=seed, rows=mine)
        return Batches(shuffled, _fingerprint(pictures, settings))
    if _labelled(examples):
        if packing:
            raise UserError("packing=True is for language models: a label belongs to a whole row.")
        sizes = bucketing.sizes(length, buckets)
        kept = bucketing.prepare(
            cast("Sequence[EncoderExample]", examples), length=length, too_long=too_long
        )
        order = grain.MapDataset.range(len(kept)).shuffle(seed=seed).repeat(None)
        bucketed = bucketing.Bucketed(
            kept, order, batch_size=batch_size, sizes=sizes, rows=mine, pad_id=pad_id
        )
        return Batches(bucketed, _fingerprint(kept, [*settings, *sizes]))
    _no_buckets(buckets)
    texts = rows.prepare(
        cast("Sequence[Example]", examples), length=length, too_long=too_long, loss=loss
    )
    dataset = _language(texts, batch_size, length, packing, seed, pad_id)
    dataset = dataset.map(lambda b: {name: value[mine] for name, value in b.items()})
    return Batches(iter(dataset), _fingerprint(texts, settings))


def _language(
    texts: list[Example], batch_size: int, length: int, packing: bool, seed: int, pad_id: int
) -> grain.IterDataset:
    """Global batches [batch_size, length] of language model examples."""
    # Threads would only contend here: the examples are small arrays in memory.
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    order = grain.MapDataset.source(texts).shuffle(seed=seed).repeat(None)
    if packing:
        packed = grain.experimental.FirstFitPackIterDataset(
            order.to_iter_dataset(reading),
            length_struct={"tokens": length, "loss_mask": length},
            num_packing_bins=max(batch_size, _PACKING_BINS),
            shuffle_bins=False,  # the examples were shuffled already
        )
        return packed.batch(batch_size).map(lambda b: rows.from_packed(b, pad_id=pad_id))
    padded = order.map(lambda e: rows.pad(e, length=length, pad_id=pad_id))
    # Without drop_remainder grain rounds the endless length as a float, and overflows.
    return padded.batch(batch_size, drop_remainder=True, batch_fn=rows.stack).to_iter_dataset(
        reading
    )


def eval_batches(
    examples: Sequence[Example] | Sequence[EncoderExample] | Sequence[ImageExample],
    *,
    batch_size: int,
    length: int,
    pad_id: int,
    buckets: Sequence[int] = (),
    loss: Loss = "completion",
    too_long: TooLong = "error",
) -> Iterator[Batch]:
    """One pass, one example a row, in order; arguments and batches as in `batches`.

    A batch is filled up with rows of padding (segment_ids and loss_mask 0), so that shapes do not
    change. For examples with labels see `bucketing.in_order`: those come sorted by length.
    """
    if _pictured(examples):
        _no_buckets(buckets)
        yield from images.in_order(cast("Sequence[ImageExample]", examples), batch_size=batch_size)
        return
    if _labelled(examples):
        yield from bucketing.in_order(
            cast("Sequence[EncoderExample]", examples),
            batch_size=batch_size,
            length=length,
            buckets=buckets,
            pad_id=pad_id,
            too_long=too_long,
        )
        return
    _no_buckets(buckets)
    kept = rows.prepare(
        cast("Sequence[Example]", examples), length=length, too_long=too_long, loss=loss
    )
    for start in range(0, len(kept), batch_size):
        chunk = [
            rows.pad(e, length=length, pad_id=pad_id) for e in kept[start : start + batch_size]
        ]
        blank = rows.empty_row(length=length, pad_id=pad_id)
        yield rows.stack(chunk + [blank] * (batch_size - len(chunk)))


def _labelled(examples: Sequence[Any]) -> bool:
    return bool(examples) and "label" in examples[0]


def _pictured(examples: Sequence[Any]) -> bool:
    return bool(examples) and "image" in examples[0]


def _no_buckets(buckets: Sequence[int]) -> None:
    if buckets:
        raise UserError(
            "buckets are for texts with labels; for a language model use packing, or one length."
        )


def _fingerprint(examples: Sequence[Any], settings: list[Any]) -> str:
    """Short hash of what decides the sequence of batches."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for example in examples:
        if "tokens" in example:
            digest.update(np.int64(len(example["tokens"])).tobytes())
        for _, value in sorted(example.items(), reverse=True):
            digest.update(np.asarray(value).tobytes())
    return digest.hexdigest()[:16]
