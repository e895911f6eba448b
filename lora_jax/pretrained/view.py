"""A source of tensors under other names, and with tensors that its file lacks."""

from __future__ import annotations

import functools
import logging
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.errors import UserError
from lora_jax.models.family import Family, TensorSpec
from lora_jax.pretrained.source import Index, TensorSource

_log = logging.getLogger(__name__)
HEAD_DEVIATION = 0.02  # as transformers draws heads (initializer_range)


class View:
    """`source` whose tensors are called `names` (ours -> stored), and with `drawn` tensors."""

    def __init__(
        self, source: TensorSource, names: Mapping[str, str], drawn: Mapping[str, np.ndarray]
    ):
        self.source, self.names, self.drawn = source, names, drawn

    @property
    def config(self) -> Mapping[str, Any]:
        return self.source.config

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        stored = self.source.shapes
        found = {ours: stored[theirs] for ours, theirs in self.names.items()}
        return found | {name: array.shape for name, array in self.drawn.items()}

    @property
    def files(self) -> Sequence[Path]:
        return self.source.files

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        if name in self.drawn:
            return self.drawn[name][index]
        return self.source.read(self.names[name], index)

    def describe(self) -> str:
        return self.source.describe()


def under_our_names(source: TensorSource, family: Family, config: Any) -> TensorSource:
    """`source` under the names that the family's table has.

    Old names are replaced, and the prefix is added where the file is of a bare model (BertModel,
    GPT2Model), which leaves it out.
    """
    names = {}
    for stored in source.shapes:
        name = stored
        for pattern, replacement in family.renamed:
            name = re.sub(pattern, replacement, name)
        names[name] = stored
    prefix = family.prefix(config)
    if not any(name.startswith(prefix) for name in names):
        names = {prefix + name: stored for name, stored in names.items()}
    return View(source, names, {})


def with_new_head(
    source: TensorSource, specs: Sequence[TensorSpec], *, seed: int, replace: bool
) -> TensorSource:
    """`source` with what it lacks of the `new` tensors: kernels N(0, 0.02²), biases 0.

    Each tensor has a stream of its own, so that it does not matter which others are drawn.

    Args:
      replace: draw them all, whatever the file holds.

    Raises:
      UserError: the file holds a head of another size.
    """
    wanted = {spec.name: spec for spec in specs if spec.new}
    if not replace:
        _check_sizes(source, wanted)
        wanted = {name: spec for name, spec in wanted.items() if name not in source.shapes}
    if not wanted:
        return source
    _log.warning(
        "%s: drawing a new %s (seed %d)%s",
        source.describe(),
        ", ".join(wanted),
        seed,
        "" if replace else ", which the file lacks",
    )
    drawn = {}
    for name, spec in wanted.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        scale = HEAD_DEVIATION if len(spec.shape) > 1 else 0.0
        drawn[name] = np.float32(scale) * rng.standard_normal(spec.shape, np.float32)
    kept = {name: name for name in source.shapes if name not in drawn}
    return View(source, kept, drawn)


def _check_sizes(source: TensorSource, wanted: Mapping[str, TensorSpec]) -> None:
    for name, spec in wanted.items():
        stored = source.shapes.get(name, spec.shape)
        if stored != spec.shape:
            raise UserError(
                f"{source.describe()} holds a head for another task: {name} is {list(stored)}, and "
                f"num_labels asks for {list(spec.shape)}. Give num_labels={stored[0]}, or "
                "new_head=True to draw a new one"
            )
