"""LoRA-FA: A stays as it was drawn, B alone is trained (Zhang et al. 2023, arXiv:2308.03303)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base, peft
from lora_jax.methods.lora import LoRA
from lora_jax.methods.plain import as_lora


@base.register("lora_fa", peft={"peft_type": "LORA"})
@dataclasses.dataclass(frozen=True)
class LoRAFA(LoRA):
    """h = x·W0 + s·x·A·B with A frozen: nothing as wide as x need be kept for A's gradient.

    Args:
      projection_seed: A is drawn from it alone, not from the run's seed, since it is no part of
        what is trained.

    Its file is an ordinary LoRA, with A in it. Embeddings cannot be targets: the factor that
    would be frozen is the one that starts at zero.
    """

    trains: ClassVar[str] = "B; A is frozen"
    numeric: ClassVar[tuple[str, ...]] = (*LoRA.numeric, "projection_seed")

    projection_seed: int = 0

    def ranks(self, params: Any) -> dict[str, list[int]]:
        found = super().ranks(params)
        for path in found:
            if partition.is_embedding(path):
                raise UserError(f"LoRA-FA cannot adapt the embedding {path!r}: take it off targets")
        return found

    def projections(self, params: Any) -> dict[str, jax.Array]:
        """A by leaf path: [*batch, *in, r], zeros where a layer has a smaller rank."""
        flat, key = partition.flatten(params), jax.random.key(self.projection_seed)
        drawn = {}
        for path, ranks in self.ranks(params).items():
            drawn[path] = self._factors(key, path, flat[path], ranks)["a"]
        return drawn

    def init(self, key: jax.Array, params: Any) -> base.Trainable:
        ranks = self.ranks(params)
        start = super().init(key, params)
        return {p: {"b": v["b"]} if p in ranks else v for p, v in start.items()}

    def numbers(self, params: Any) -> dict[str, Any]:
        """LoRA's, and {"a": A by leaf path}."""
        return {**super().numbers(params), "a": self.projections(params)}

    def _weights(
        self, params: Any, trainable: base.Trainable, key: Any, numbers: Mapping[str, Any]
    ) -> Any:
        return super()._weights(params, _with(trainable, numbers["a"]), key, numbers)

    def unmerge(self, merged: Any, trainable: base.Trainable) -> Any:
        return super().unmerge(merged, _with(trainable, self.projections(merged)))

    def _parameters(self, path: str, leaf: Any, ranks: list[int]) -> int:
        layout, shape = self.layout(path, leaf), tuple(leaf.shape)
        copies = math.prod(layout.sizes(shape, "b")) // len(ranks)
        frozen = sum(ranks) * math.prod(layout.sizes(shape, "i")) * copies
        return super()._parameters(path, leaf, ranks) - frozen

    def to_peft(
        self, trainable: base.Trainable, names: peft.ModelNames, params: Any
    ) -> peft.AdapterFiles:
        return super().to_peft(_with(trainable, self.projections(params)), names, params)

    @classmethod
    def from_peft(
        cls,
        files: peft.AdapterFiles,
        names: peft.ModelNames,
        params: Any,
        saved: base.Method | None = None,
    ) -> tuple[LoRA, base.Trainable]:
        """A plain LoRA where the file's A is not the one that `saved` draws."""
        told = as_lora(saved) if isinstance(saved, LoRAFA) else None
        lora, tree = LoRA.from_peft(files, names, params, told)
        if not isinstance(saved, LoRAFA) or lora != told:
            return lora, tree
        drawn = saved.projections(params)
        if not all(np.array_equal(drawn[p], tree[p]["a"]) for p in drawn):
            return lora, tree
        return saved, {p: {"b": v["b"]} if p in drawn else v for p, v in tree.items()}


def _with(trainable: base.Trainable, drawn: Mapping[str, Any]) -> base.Trainable:
    return {p: {"a": drawn[p], **v} if p in drawn else v for p, v in trainable.items()}
