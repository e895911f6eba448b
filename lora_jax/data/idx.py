"""The IDX format, in which MNIST and its kin are published: one array of bytes a file, gzipped.

Layout (http://yann.lecun.com/exdb/mnist/): two zeros, the type (8: unsigned byte), the number of
axes, each axis as a big-endian uint32, then the values, last axis fastest.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from lora_jax.errors import UserError

_UNSIGNED_BYTE = 8


def read(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped IDX file.

    Raises UserError for a file that is truncated, damaged, or of another kind.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise UserError(f"No file at {path}.") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is truncated or damaged: {error}.") from None
    if len(content) < 4 or content[:2] != b"\0\0":
        raise UserError(f"{path} is no IDX file: it begins with {content[:4].hex() or 'nothing'}.")
    kind, axes = content[2], content[3]
    if kind != _UNSIGNED_BYTE:
        raise UserError(f"{path} holds values of IDX type {kind}; only bytes ({_UNSIGNED_BYTE}) are"
                        " read.")  # fmt: skip
    start = 4 + 4 * axes
    if len(content) < start:
        raise UserError(f"{path} ends within its header.")
    shape = struct.unpack(f">{axes}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"{path} holds {len(content) - start} values, but its header says"
            f" {' x '.join(map(str, shape))}."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
