"""A checkpoint whose matrices bitsandbytes has quantised to NF4, read as what they stand for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.pretrained.source import Index, TensorSource
from lora_jax.tensors.bitsandbytes import PARTS, STATE, from_bitsandbytes, state_of


class Dequantized:
    """`source` with a dense tensor, rounded as bitsandbytes rounds it, in place of the several that
    each quantised one is made of. A slice of it computes the whole, and the last one is kept.

    Args:
      inputs_first: of the family: its dense tensors are (in, out), which transformers turns before
        they are quantised; else they are (out, in).
    """

    def __init__(self, source: TensorSource, *, inputs_first: bool = False):
        self.source = source
        self.inputs_first = inputs_first
        self._last: tuple[str, np.ndarray] | None = None
        suffix = f".{STATE}"
        self._quantised = frozenset(
            name.removesuffix(suffix) for name in source.shapes if name.endswith(suffix)
        )

    @property
    def config(self) -> Mapping[str, Any]:
        """Without what it says of quantisation, where that is undone here."""
        config = dict(self.source.config)
        if self._quantised:
            config.pop("quantization_config", None)
        return config

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        parts = {f"{name}.{part}" for name in self._quantised for part in PARTS}
        plain = {n: shape for n, shape in self.source.shapes.items() if n not in parts}
        return plain | {name: self._shape(name) for name in self._quantised}

    @property
    def files(self) -> Sequence[Path]:
        return self.source.files

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        if name not in self._quantised:
            return self.source.read(name, index)
        if self._last is None or self._last[0] != name:
            names = (name, *(f"{name}.{part}" for part in PARTS))
            tensors = {n: self.source.read(n) for n in names if n in self.source.shapes}
            dense = np.asarray(from_bitsandbytes(tensors, name).dense())
            self._last = name, dense if self.inputs_first else dense.T
        return self._last[1][index]

    def describe(self) -> str:
        return self.source.describe()

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(state_of(self.source.read(f"{name}.{STATE}"), name)["shape"])
        return shape[::-1] if self.inputs_first else shape
