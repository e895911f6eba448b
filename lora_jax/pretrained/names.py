"""Hugging Face module names beside our paths."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from lora_jax.models import TensorSpec


@dataclasses.dataclass(frozen=True)
class Names:
    """A model's name table, turned so that adapters can be looked up in it.

    Attributes:
      ours: Hugging Face tensor -> our expanded leaf path (`layers/3/attention/query/kernel`).
      theirs: the other way round.
      shapes: of the Hugging Face tensors.
      transposed: Hugging Face tensor -> whether our leaf is its transpose.
      tied: whether the language-model head is the embedding, transposed.
    """

    ours: Mapping[str, str]
    theirs: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    transposed: Mapping[str, bool]
    tied: bool = False

    @classmethod
    def of(cls, specs: Sequence[TensorSpec], tied: bool = False) -> Names:
        rows = [(path, hf, spec) for spec in specs for path, hf in spec.expand()]
        return cls(
            ours={hf: path for path, hf, _ in rows},
            theirs={path: hf for path, hf, _ in rows},
            shapes={hf: tuple(spec.shape) for _, hf, spec in rows},
            transposed={hf: spec.op == "transpose" for _, hf, spec in rows},
            tied=tied,
        )

    @functools.cached_property
    def modules(self) -> dict[str, list[str]]:
        """Hugging Face module -> its tensors' last names ("weight", "bias")."""
        found: dict[str, list[str]] = {}
        for tensor in self.ours:
            module, _, leaf = tensor.rpartition(".")
            found.setdefault(module, []).append(leaf)
        return found

    @functools.cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Hugging Face module with a matrix -> (in, out); an embedding's in is its vocabulary."""
        found = {}
        for tensor, shape in self.shapes.items():
            if len(shape) == 2:
                ours = shape[::-1] if self.transposed[tensor] else shape
                found[tensor.rpartition(".")[0]] = (ours[0], ours[1])
        return found

    @functools.cached_property
    def linear(self) -> set[str]:
        """The modules with a kernel: what PEFT calls linear layers."""
        return {hf.rpartition(".")[0] for hf, path in self.ours.items() if path.endswith("/kernel")}

    @functools.cached_property
    def embeddings(self) -> set[str]:
        """The modules that are embeddings, which PEFT names and orients in its own way."""
        return {hf.rpartition(".")[0] for hf, path in self.ours.items() if _is_embedding(path)}

    @functools.cached_property
    def tied_embedding(self) -> str:
        """The module of the embedding that is the head too; "" where there is none."""
        return self.theirs["embed/embedding"].rpartition(".")[0] if self.tied else ""

    @functools.cached_property
    def head(self) -> str:
        """The language-model head's module; "" where it is tied to the embedding."""
        hf = self.theirs.get("head/kernel", "")
        return hf.rpartition(".")[0]


def _is_embedding(path: str) -> bool:
    return path.endswith("/embedding")
