"""LoRA together with prefixes: LoRA+PE and LoRA+PL of the LoRA paper.

Hu et al. 2021, arXiv:2106.09685, appendix E.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from lora_jax.errors import UserError
from lora_jax.methods import activations, base
from lora_jax.methods.lora import LoRA
from lora_jax.methods.prefix_embedding import PrefixEmbedding, PrefixLayer
from lora_jax.methods.prompt import EMBEDDING


@dataclasses.dataclass(frozen=True)
class _LoRAWithPrefix(LoRA):
    """LoRA, and `prefix` and `infix` special tokens that start as N(0, prefix_std²)."""

    mergeable: ClassVar[bool] = False
    inference: ClassVar[str] = "`prefix` + `infix` more positions"
    numeric = (*LoRA.numeric, "prefix_std")

    prefix: int = 8
    infix: int = 0
    prefix_std: float = 0.02

    def special(self) -> PrefixEmbedding | PrefixLayer:
        """The method of the special tokens, with this one's settings."""
        raise TypeError(f"{type(self).__name__} does not define special")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.special()  # its own checks

    def placeholders(self, params: Any) -> tuple[int, ...]:
        return self.special().placeholders(params)

    def init(self, key: jax.Array, params: Any) -> base.Trainable:
        if self.infix and EMBEDDING in self.ranks(params):
            raise UserError(
                "infix tokens have no rows in the embedding, so LoRA cannot target it too: leave "
                "`embed` out of targets"
            )
        return {**super().init(key, params), **self.special().fresh(key, params)}

    def combine(
        self,
        params: Any,
        trainable: base.Trainable,
        *,
        key: jax.Array | None = None,
        numbers: Mapping[str, Any] | None = None,
    ) -> Any:
        trained, weights = activations.split(trainable)
        variables = super().combine(params, weights, key=key, numbers=numbers)
        sites = self.special().sites(trained, params)
        return {**variables, "sites": activations.place(sites, params)}

    def merge(self, params: Any, trainable: base.Trainable) -> Any:
        raise UserError(
            f"{self.name} has special tokens besides weights: it cannot be merged; keep base and "
            "adapter apart"
        )

    def unmerge(self, merged: Any, trainable: base.Trainable) -> Any:
        return self.merge(merged, trainable)

    def count(self, params: Any) -> base.Counts:
        special = activations.count_fresh(self.special().fresh, params)
        return base.Counts({**super().count(params).per_target, **special})


@base.register("lora_prefix_embedding")
@dataclasses.dataclass(frozen=True)
class LoRAPrefixEmbedding(_LoRAWithPrefix):
    """LoRA+PE: LoRA and `PrefixEmbedding`."""

    trains: ClassVar[str] = "A, B and embeddings of special tokens"

    def special(self) -> PrefixEmbedding:
        return PrefixEmbedding(prefix=self.prefix, infix=self.infix, init_std=self.prefix_std)


@base.register("lora_prefix_layer")
@dataclasses.dataclass(frozen=True)
class LoRAPrefixLayer(_LoRAWithPrefix):
    """LoRA+PL: LoRA and `PrefixLayer`."""

    trains: ClassVar[str] = "A, B and activations of special tokens"

    def special(self) -> PrefixLayer:
        return PrefixLayer(prefix=self.prefix, infix=self.infix, init_std=self.prefix_std)
