"""Full fine-tuning, of every leaf or of those that match: the baseline LoRA is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from lora_jax import partition
from lora_jax.methods import base
from lora_jax.tensors.base import densify


@base.register("full")
@dataclasses.dataclass(frozen=True)
class FullFineTuning(base.Method):
    """Trains the leaves whose expanded paths match a pattern of `train` (all by default)."""

    trains: ClassVar[str] = "every leaf, or those named"
    padding_exact: ClassVar[bool] = True  # nothing is ever padded: `train` is structure

    train: tuple[str, ...] = (".*",)

    def patterns(self, params: Any) -> tuple[str, ...]:
        """The regexes of what trains, for this model."""
        return self.train

    def leaves(self, params: Any) -> list[str]:
        """Paths of the leaves that train."""
        return base.whole_leaves(params, self.patterns(params))

    def init(self, key: jax.Array, params: Any) -> base.Trainable:
        return base.copies(params, self.leaves(params))

    def combine(
        self,
        params: Any,
        trainable: base.Trainable,
        *,
        key: jax.Array | None = None,
        numbers: Mapping[str, Any] | None = None,
    ) -> Any:
        return {"params": partition.combine(params, trainable)}

    def merge(self, params: Any, trainable: base.Trainable) -> Any:
        return densify(partition.combine(params, trainable))

    def count(self, params: Any) -> base.Counts:
        return base.Counts(base.count_whole(params, self.leaves(params)))

    def frozen(self, params: Any) -> Any:
        return base.holes(params, self.leaves(params))
