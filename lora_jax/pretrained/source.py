"""What a file of pretrained weights offers, whatever its format, and the fingerprint of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Index = tuple[slice, ...]


class TensorSource(Protocol):
    """Named tensors on disk, read slice by slice; names, shapes and layout are Hugging Face's."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json, or what stands for it."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every stored tensor."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold tensors, sorted by name."""
        ...

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The slice `index` (one slice per axis; () for all) of a tensor, in its stored dtype."""
        ...

    def describe(self) -> str:
        """Where this came from, for messages."""
        ...


_DIGESTS: dict[tuple[str, int, int], str] = {}
_CHUNK_BYTES = 1 << 22


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file in hex, as `sha256sum` prints it.

    Kept in memory by path, time of change and size, so that asking again costs nothing.
    """
    path = Path(path).resolve()
    stat = path.stat()
    key = (str(path), stat.st_mtime_ns, stat.st_size)
    if key not in _DIGESTS:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        _DIGESTS[key] = digest.hexdigest()
    return _DIGESTS[key]


def files_sha256(files: Sequence[Path]) -> str:
    """One fingerprint for several files; of a single file, just its SHA-256.

    For several: the SHA-256 of the lines `<digest>  <name>` that `sha256sum` prints for them,
    in the order of their names, so that it can be checked without this library.
    """
    if len(files) == 1:
        return file_sha256(files[0])
    ordered = sorted(files, key=lambda f: f.name)
    lines = "".join(f"{file_sha256(f)}  {f.name}\n" for f in ordered)
    return hashlib.sha256(lines.encode()).hexdigest()
