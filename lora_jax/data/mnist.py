"""MNIST prepared without TensorFlow, in the form in which TFDS's own builder prepares it.

TFDS reads its `mnist` without TensorFlow, but not so the downloaded files: this builder does, and
what it writes is `mnist/3.0.1`, which TFDS then takes for its own. (LeCun et al. 1998.)
"""

from __future__ import annotations

import hashlib
import io
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from lora_jax.data import idx
from lora_jax.errors import UserError

MIRROR = "https://storage.googleapis.com/cvdf-datasets/mnist"
FILES = {
    f"{name}-ubyte.gz": digest
    for name, digest in (
        ("train-images-idx3", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        ("train-labels-idx1", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        ("t10k-images-idx3", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        ("t10k-labels-idx1", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    )
}
"""SHA-256 of each file, as TFDS's url_checksums/mnist.txt has it."""
_SPLITS = {"train": "train", "test": "t10k"}
_SIZE, _CLASSES = 28, 10
_CHUNK_BYTES = 1 << 20
_TIMEOUT = 60.0  # seconds without an answer


def fetch(folder: Path, name: str) -> Path:
    """A file of `FILES` in `folder`, downloaded from `MIRROR` unless it lies there whole.

    Raises UserError where it cannot be had, or is another file than that of the checksum. A file
    appears under its name only when it is whole and right.
    """
    path, part = folder / name, folder / f"{name}.part"
    if path.is_file() and _sha256(path) == FILES[name]:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            urllib.request.urlopen(f"{MIRROR}/{name}", timeout=_TIMEOUT) as source,
            part.open("wb") as file,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                file.write(chunk)
        if (found := _sha256(part)) != FILES[name]:
            raise UserError(
                f"{MIRROR}/{name} came with SHA-256 {found[:12]}…, not {FILES[name][:12]}…: it was"
                f" cut off or changed on the way. Try again, or put the right file in {folder}."
            )
        part.replace(path)
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"Cannot download {MIRROR}/{name}: {getattr(error, 'reason', error)}. Where there is no"
            f" network, put MNIST's four files in {folder}, or a prepared copy in data_dir."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def images_and_labels(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 28, 28, 1] and [N] of "train" or "t10k"; UserError where the two do not agree."""
    paths = [fetch(folder, f"{prefix}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")]
    images, labels = (idx.read(path) for path in paths)
    if images.shape != (len(labels), _SIZE, _SIZE) or labels.shape != (len(images),):
        raise UserError(f"{paths[0]} is {images.shape} and {paths[1]} {labels.shape}: no MNIST.")
    if labels.max(initial=0) >= _CLASSES:
        raise UserError(f"{paths[1]} holds the label {labels.max()}, but there are {_CLASSES}.")
    return images[..., None], labels


class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """60,000 digits to train on and 10,000 to test on; keys are places, as in TFDS's own."""

    name = "mnist"
    VERSION = tfds.core.Version("3.0.1")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"3.0.1": "As TFDS's mnist of this version."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The MNIST database of handwritten digits.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(_SIZE, _SIZE, 1)),
                    "label": tfds.features.ClassLabel(num_classes=_CLASSES),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="http://yann.lecun.com/exdb/mnist/",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        folder = Path(self._data_dir_root) / "downloads" / "mnist"
        # All four are read before the first example is written.
        data = {split: images_and_labels(folder, prefix) for split, prefix in _SPLITS.items()}
        return {split: self._generate_examples(*pair) for split, pair in data.items()}

    def _generate_examples(  # TFDS asks for this name
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for place, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield place, {"image": io.BytesIO(png(image)), "label": int(label)}


def png(image: np.ndarray) -> bytes:
    """A grey image uint8 [H, W, 1] as a PNG file; TFDS would ask TensorFlow for it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "PNG")
    return file.getvalue()
