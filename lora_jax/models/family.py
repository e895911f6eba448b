"""What a family of models tells readers and writers of Hugging Face folders."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import numpy as np
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One row of a family's name table.

    Attributes:
      path: of our leaf; ``{i}`` stands for the layer: ``layers/{i}/attention/query/kernel``.
      name: of the Hugging Face tensor, with the same ``{i}``.
      op: "transpose" where Hugging Face stores (out, in) and we (in, out), else "keep".
      shape: of the Hugging Face tensor (of one layer).
      layers: how many layers have it; 0 for a tensor outside the layers.
      part: (k, n) where our leaf is the k-th of n equal parts, along our last axis, of a tensor
        that Hugging Face stores fused; each part is a row of its own.
      new: whether a checkpoint may lack it, as a head for a new task: then it is drawn.
      cuts: layers at which our stack is cut into segments (`TextConfig.cuts`).
    """

    path: str
    name: str
    op: Literal["transpose", "keep"]
    shape: tuple[int, ...]
    layers: int = 0
    part: tuple[int, int] | None = None
    new: bool = False
    cuts: tuple[int, ...] = ()

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Shape of our leaf (of one layer)."""
        shape = self.shape[::-1] if self.op == "transpose" else self.shape
        return shape if self.part is None else (*shape[:-1], shape[-1] // self.part[1])

    def segments(self, cuts: Collection[int] = ()) -> list[tuple[str, tuple[int, int]]]:
        """(path of our leaf, (first layer, end)) of each segment: ``layers[0:30]/x``, (0, 30).

        A tensor outside the layers has one, (0, 0). `cuts` are added to the spec's own.
        """
        if not self.layers:
            return [(self.path, (0, 0))]
        inside = {c for c in (*self.cuts, *cuts) if 0 < c < self.layers}
        pairs = itertools.pairwise([0, *sorted(inside), self.layers])
        return [(self.path.replace("/{i}/", f"[{a}:{b}]/"), (a, b)) for a, b in pairs]

    def expand(self) -> list[tuple[str, str]]:
        """(our path, Hugging Face name) of each tensor, layer by layer."""
        if not self.layers:
            return [(self.path, self.name)]
        return [(self.path.format(i=i), self.name.format(i=i)) for i in range(self.layers)]


def cut(rows: Iterable[TensorSpec], cuts: tuple[int, ...]) -> list[TensorSpec]:
    """The rows, those of layers cut into segments (`TextConfig.cuts`)."""
    return [dataclasses.replace(row, cuts=cuts) if row.layers else row for row in rows]


def linear(
    path: str,
    name: str,
    d_in: int,
    d_out: int,
    *,
    bias: bool = True,
    layers: int = 0,
    new: bool = False,
) -> list[TensorSpec]:
    """Rows of a torch ``nn.Linear`` called `name`, held as ``path/kernel`` and ``path/bias``."""
    kernel = TensorSpec(
        f"{path}/kernel", f"{name}.weight", "transpose", (d_out, d_in), layers, new=new
    )
    if not bias:
        return [kernel]
    return [kernel, TensorSpec(f"{path}/bias", f"{name}.bias", "keep", (d_out,), layers, new=new)]


def norm(
    path: str, name: str, size: int, *, bias: bool = True, layers: int = 0, new: bool = False
) -> list[TensorSpec]:
    """Rows of a norm called `name`: ``path/scale`` and, unless it has none, ``path/bias``."""
    scale = TensorSpec(f"{path}/scale", f"{name}.weight", "keep", (size,), layers, new=new)
    if not bias:
        return [scale]
    return [scale, TensorSpec(f"{path}/bias", f"{name}.bias", "keep", (size,), layers, new=new)]


def tokens_example(config: Any) -> Any:
    """A batch of one text of two tokens, [1, 2]."""
    return np.zeros((1, 2), np.int32)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family: one file in this package that defines ``FAMILIES = (Family(...),)``.

    Attributes:
      name: of the family, such as "llama".
      model_types: the Hugging Face ``model_type`` values it reads.
      config_from_hf: config.json's dict -> the family's config. Raises UserError if unsupported.
      config_to_hf: the family's config -> config.json's dict.
      module: Linen class, called with the config.
      tensors: config -> the table of all tensors.
      ignored: config -> regexes (full match) of Hugging Face tensors that files may hold and that
        carry nothing of their own, or belong to a head that the config does not have.
      prefix: config -> what the names of all but the head's tensors start with ("model."), and
        what files of the bare model leave out.
      renamed: (regex, replacement) of tensor names in old files, before anything else looks.
      reads: what its models are called with: "tokens", or "images", whose families are this
        library's own and unknown to transformers.
      example: config -> the smallest batch that a model may be called with.
      inputs_first: whether its layers are stored (in, out), as transformers' `Conv1D`.
    """

    name: str
    model_types: tuple[str, ...]
    config_from_hf: Callable[[dict[str, Any]], Any]
    config_to_hf: Callable[[Any], dict[str, Any]]
    module: type[nn.Module]
    tensors: Callable[[Any], list[TensorSpec]]
    ignored: Callable[[Any], tuple[str, ...]] = lambda config: ()
    prefix: Callable[[Any], str] = lambda config: ""
    renamed: tuple[tuple[str, str], ...] = ()
    reads: Literal["tokens", "images"] = "tokens"
    example: Callable[[Any], Any] = tokens_example
    inputs_first: bool = False
