"""Images to classes: any source whose records hold an image as an array, and a label."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import numpy as np

from lora_jax.data.examples import ImageExample, Record, field, one_each
from lora_jax.data.metrics import labels as scores
from lora_jax.data.tasks.encoder import class_index
from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageClassification:
    """One image to one of some classes; for MNIST the source is TFDS("mnist").

    Attributes:
      num_labels: classes.
      image, label: record fields: uint8 [H, W, C], and the index of the class.
      shuffle_pixels: seed of a permutation of the places of all images, the same for each: what
        Li et al. 2018 (arXiv:1804.08838) call shuffled pixels. None: as they are.
    """

    num_labels: int = 10
    image: str = "image"
    label: str = "label"
    shuffle_pixels: int | None = None

    head: ClassVar[Literal["classification"]] = "classification"
    reads: ClassVar[Literal["images"]] = "images"
    principal: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_labels < 2:
            raise UserError(f"num_labels={self.num_labels}: there must be two classes or more.")

    def examples(
        self, records: Iterable[Record], tokenizer: Tokenizer | None = None
    ) -> list[ImageExample]:
        """One example a record: {image: uint8 [H, W, C], label}."""
        return [{"image": self._image(r), "label": self.value(r)} for r in records]

    def _image(self, record: Record) -> np.ndarray:
        image = field(record, self.image)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
            raise UserError(
                f"The field {self.image!r} of a record is no image: it must be an array of bytes"
                " (uint8) with the axes height, width and channels."
            )
        if self.shuffle_pixels is None:
            return image
        flat = image.reshape(-1, image.shape[-1])
        return flat[_places(self.shuffle_pixels, len(flat))].reshape(image.shape)

    def value(self, record: Record) -> int:
        """The class index."""
        return class_index(field(record, self.label), self.num_labels)

    def evaluation_records(self, records: Iterable[Record]) -> Sequence[Record]:
        """The records to predict for and to score: all."""
        return list(records)

    def metrics(self, predictions: np.ndarray, records: Sequence[Record]) -> dict[str, float]:
        """`accuracy`, a share. predictions: logits float32 [N, num_labels]."""
        one_each(predictions, records)
        true = np.asarray([self.value(record) for record in records])
        return {"accuracy": scores.accuracy(np.asarray(predictions).argmax(1), true)}


@functools.cache
def _places(seed: int, pixels: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(pixels)


TASK = ImageClassification
