"""Hugging Face module names beside our paths, and regexes that name a set of our modules."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax import partition
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


def regexes(paths: Iterable[str], every: Iterable[str]) -> list[str]:
    """Few regexes that match exactly `paths` among the expanded leaf or module paths `every`.

    `layers/0/attention/query`, … in all layers become `^layers/\\d+/attention/query$`; in some
    layers `^layers/(0|2)/…`. Names that share all but their last part become one `(query|value)`.
    """
    chosen, complete = _layers_by_template(paths), _layers_by_template(every)
    grouped: dict[tuple[str, str], list[str]] = {}
    for template, layers in chosen.items():
        if layers == complete.get(template):
            numbers = r"\d+"
        else:
            numbers = "|".join(map(str, sorted(layers)))
            numbers = f"({numbers})" if len(layers) > 1 else numbers
        parent, _, last = template.rpartition("/")
        grouped.setdefault((parent, numbers), []).append(last)
    found = []
    for (parent, numbers), lasts in grouped.items():
        names = [re.escape(n) for n in dict.fromkeys(lasts)]
        last = names[0] if len(names) == 1 else f"({'|'.join(names)})"
        # A parent may end in the layer's number itself: the template's "*" stands for it.
        joined = f"{re.escape(parent)}/{last}" if parent else last
        found.append(f"^{joined.replace(re.escape('*'), numbers)}$")
    return found


def _layers_by_template(paths: Iterable[str]) -> dict[str, set[int]]:
    """`layers/3/x` -> {"layers/*/x": {3, …}}; paths without a number map to an empty set."""
    found: dict[str, set[int]] = {}
    for path in paths:
        parts = path.split("/")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        layer = set() if at is None else {int(parts[at])}
        if at is not None:
            parts[at] = "*"
        found.setdefault("/".join(parts), set()).update(layer)
    return found


def module_paths(leaves: Iterable[str]) -> list[str]:
    """The modules of expanded leaf paths, each once, in order."""
    return list(dict.fromkeys(partition.module(p) for p in leaves))


def rules(values: Mapping[str, Any], every: Iterable[str]) -> Any:
    """A bare value where all agree, else ordered (regex, value) rules that say the same."""
    every = list(every)
    distinct = list(dict.fromkeys(values.values()))
    if len(distinct) == 1:
        return distinct[0]
    return tuple(
        (regex, value)
        for value in distinct
        for regex in regexes([p for p, v in values.items() if v == value], every)
    )
