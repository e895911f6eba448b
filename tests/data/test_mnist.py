"""MNIST from IDX files without TensorFlow: read, checked, prepared as TFDS has it, or refused."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_jax.data import idx, mnist
from lora_jax.data.sources import TFDS
from lora_jax.errors import UserError

COUNTS = {"train": 7, "t10k": 3}


def packed(array: np.ndarray, kind: int = 8) -> bytes:
    header = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


def drawn(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(prefix))
    n = COUNTS[prefix]
    return rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n).astype(np.uint8)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the four files, small, which stands for the network."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    sums = {}
    for prefix in COUNTS:
        for array, kind in zip(drawn(prefix), ("images-idx3", "labels-idx1"), strict=True):
            content = packed(array)
            name = f"{prefix}-{kind}-ubyte.gz"
            (folder / name).write_bytes(content)
            sums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(mnist, "MIRROR", folder.as_uri())
    monkeypatch.setattr(mnist, "FILES", sums)
    return folder


def test_prepared_as_tfds_reads_it_without_tensorflow(mirror: Path, tmp_path: Path) -> None:
    source = TFDS("mnist", "train", str(tmp_path / "tfds"))
    records = source.open()
    images, labels = drawn("train")
    # TFDS shuffles as it writes: each image has its own label still.
    found = {r["image"].tobytes(): r["label"] for r in records}
    assert found == {i.tobytes(): label for i, label in zip(images, labels, strict=True)}
    assert records[0]["image"].shape == (28, 28, 1) and records[0]["image"].dtype == np.uint8
    assert len(TFDS("mnist", "test", str(tmp_path / "tfds")).open()) == 3
    assert "tensorflow" not in sys.modules
    for file in mirror.iterdir():  # what is prepared needs no file any more
        file.unlink()
    assert len(source.open()) == 7


def test_images_are_decoded_once_but_never_those_of_another_data_set(
    mirror: Path, tmp_path: Path
) -> None:
    """A sweep reads the same images for every pack."""
    source = TFDS("mnist", "train", str(tmp_path / "tfds"))
    first = list(source.open())
    assert all(a is b for a, b in zip(first, source.open(), strict=True))
    assert len(list(TFDS("mnist", "train[:2]", str(tmp_path / "tfds")).open())) == 2
    shutil.rmtree(tmp_path / "tfds")
    labels = "train-labels-idx1-ubyte.gz"
    content = packed((drawn("train")[1] + 1) % 10)
    (mirror / labels).write_bytes(content)
    mnist.FILES[labels] = hashlib.sha256(content).hexdigest()
    before = {r["image"].tobytes(): r["label"] for r in first}
    after = {r["image"].tobytes(): r["label"] for r in source.open()}
    assert after == {image: (label + 1) % 10 for image, label in before.items()}


def test_the_prepared_copy_is_the_real_mnist(shared: Path) -> None:
    records = TFDS("mnist", "train", str(shared / "tfds")).open()
    assert len(records) == 60000 and records[0]["image"].shape == (28, 28, 1)


@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
def test_a_bad_download_is_one_error_and_leaves_nothing(
    mirror: Path, tmp_path: Path, how: str
) -> None:
    path = mirror / "t10k-labels-idx1-ubyte.gz"
    if how == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-3] if how == "cut" else content + b"x")
    root = tmp_path / "tfds"
    words = "Cannot download.*put MNIST's four files" if how == "missing" else "SHA-256"
    with pytest.raises(UserError, match=words):
        TFDS("mnist", "train", str(root)).open()
    left = [p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert {p.name for p in left} <= set(mnist.FILES) - {path.name}
    assert not (root / "mnist").exists() or not list((root / "mnist").iterdir())


def test_files_that_are_right_are_not_fetched_again(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "t10k-labels-idx1-ubyte.gz"
    kept = tmp_path / "kept"
    first = mnist.fetch(kept, name)
    monkeypatch.setattr(mnist, "MIRROR", "file:///nowhere")
    assert mnist.fetch(kept, name) == first
    first.write_bytes(b"damaged")
    with pytest.raises(UserError, match="Cannot download"):
        mnist.fetch(kept, name)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (packed(np.zeros((2, 3), np.uint8))[:-9], "truncated or damaged"),
        (b"plain", "truncated or damaged"),
        (gzip.compress(b"\1\2\3\4", mtime=0), "is no IDX file"),
        (gzip.compress(b"", mtime=0), "begins with nothing"),
        (packed(np.zeros(3, np.int32), kind=12), "type 12"),
        (gzip.compress(b"\0\0\x08\x02\0\0", mtime=0), "within its header"),
        (
            gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 5) + b"abc", mtime=0),
            "3 values.*says 5",
        ),
    ],
    # No bytes in a test's name: workers of one session must find the same names.
    ids=["cut", "plain", "short", "empty", "type", "header", "values"],
)
def test_what_is_no_whole_idx_file(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match):
        idx.read(path)


@pytest.mark.parametrize("axes", [1, 3])
def test_idx_is_read_as_written(tmp_path: Path, axes: int) -> None:
    array = np.arange(24, dtype=np.uint8).reshape((24,) if axes == 1 else (2, 3, 4))
    (tmp_path / "x.gz").write_bytes(packed(array))
    np.testing.assert_array_equal(idx.read(tmp_path / "x.gz"), array)


def test_images_and_labels_must_agree(mirror: Path, tmp_path: Path, monkeypatch: Any) -> None:
    labels = packed(np.array([1, 2], np.uint8))
    (mirror / "t10k-labels-idx1-ubyte.gz").write_bytes(labels)
    checksum = hashlib.sha256(labels).hexdigest()
    monkeypatch.setitem(mnist.FILES, "t10k-labels-idx1-ubyte.gz", checksum)
    with pytest.raises(UserError, match="no MNIST"):
        mnist.images_and_labels(tmp_path / "kept", "t10k")
