"""What a family of models tells readers and writers of Hugging Face folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

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
    """

    path: str
    name: str
    op: Literal["transpose", "keep"]
    shape: tuple[int, ...]
    layers: int = 0

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Shape of our leaf (of one layer)."""
        return self.shape[::-1] if self.op == "transpose" else self.shape

    def expand(self) -> list[tuple[str, str]]:
        """(our path, Hugging Face name) of each tensor, layer by layer."""
        if not self.layers:
            return [(self.path, self.name)]
        return [(self.path.format(i=i), self.name.format(i=i)) for i in range(self.layers)]


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
        carry nothing of their own.
    """

    name: str
    model_types: tuple[str, ...]
    config_from_hf: Callable[[dict[str, Any]], Any]
    config_to_hf: Callable[[Any], dict[str, Any]]
    module: type[nn.Module]
    tensors: Callable[[Any], list[TensorSpec]]
    ignored: Callable[[Any], tuple[str, ...]] = lambda config: ()
