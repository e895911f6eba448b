"""Batches of labelled images. Axes: N examples, B rows, H, W, C of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lora_jax.data.bucketing import rows_a_batch
from lora_jax.data.examples import ImageExample
from lora_jax.data.packing import Batch
from lora_jax.errors import UserError

_BLACK_TO_WHITE = np.float32(255)


def stack(examples: Sequence[ImageExample]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, H, W, C] and int32 [N]; UserError where sizes differ."""
    shapes = {tuple(e["image"].shape) for e in examples}
    if len(shapes) > 1:
        raise UserError(f"Images of several sizes do not make a batch: {sorted(shapes)[:4]}.")
    labels = np.asarray([e["label"] for e in examples], np.int32)
    return np.stack([e["image"] for e in examples]), labels


def batch_of(images: np.ndarray, labels: np.ndarray, rows: int) -> Batch:
    """{images float32 [B, H, W, C] from 0 to 1, labels int32 [B], weights float32 [B]}.

    Rows beyond the images are black, with weight 0.
    """
    extra = rows - len(images)
    whole = np.pad(images, [(0, extra), (0, 0), (0, 0), (0, 0)]) if extra else images
    weights = np.ones(rows, np.float32)
    weights[len(images) :] = 0
    return {
        "images": whole.astype(np.float32) / _BLACK_TO_WHITE,
        "labels": np.pad(labels, (0, extra)),
        "weights": weights,
    }


class Shuffled(Iterator[Batch]):
    """Endless batches in a new order each epoch; a batch may take its rows from two epochs.

    The order of an epoch is one permutation of (seed, epoch), drawn at once: a lookup for each
    example would take longer than a step of a small network.

    Args:
      rows: which rows of the global batch to give.

    The place is the number of examples taken.
    """

    def __init__(
        self, examples: Sequence[ImageExample], *, batch_size: int, seed: int, rows: slice
    ) -> None:
        self._images, self._labels = stack(examples)
        if self._labels.min() < 0:
            raise UserError("An example has no label (-1): train on a split that has.")
        self._batch_size, self._seed, self._rows = batch_size, seed, rows
        self._taken = 0
        self._epoch: tuple[int, np.ndarray] | None = None

    def __next__(self) -> Batch:
        first, total = self._taken, len(self._labels)
        self._taken += self._batch_size
        places = np.arange(first, self._taken)
        order = np.concatenate(
            [
                self._order(epoch)[places[places // total == epoch] % total]
                for epoch in range(first // total, (self._taken - 1) // total + 1)
            ]
        )[self._rows]
        return batch_of(self._images[order], self._labels[order], len(order))

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._epoch = epoch, rng.permutation(len(self._labels))
        return self._epoch[1]

    def get_state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._taken = int(state["taken"])


def in_order(examples: Sequence[ImageExample], *, batch_size: int) -> Iterator[Batch]:
    """One pass for evaluation; see `rows_a_batch`. Batches have a further array, rows int32 [B]:
    the index of the example of each row, -1 on the rows of weight 0 that fill up the last one."""
    images, labels = stack(examples)
    size = rows_a_batch(len(labels), batch_size)
    for start in range(0, len(labels), size):
        chunk = slice(start, start + size)
        places = np.full(size, -1, np.int32)
        real = len(labels[chunk])
        places[:real] = np.arange(start, start + real)
        yield {**batch_of(images[chunk], labels[chunk], size), "rows": places}
