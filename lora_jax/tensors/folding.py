"""Weights that are low-rank once their parts are multiplied out: W + s·A(parts)·B(parts).

The parts stay apart until a product needs the factors; under a scan over layers that is one layer
at a time, so the factors of all layers never exist together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.tensors import structure
from lora_jax.tensors.base import Over, WeightError, stacked
from lora_jax.tensors.low_rank import LowRank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Folding(Over):
    """Base of such weights; a subclass says how its parts are multiplied out (`factors`).

    Args:
      w: the frozen weight [*batch, in, out]: an array, or another weight type.
      parts: arrays by name; those that layers do not share begin with W's batch axes.
      scale: s, shape () or the batch shape.
      key: None, or a typed PRNG key (shape as of scale): inverted dropout on the input of A.
      rate: the dropout rate, shape ().
      path: W's path, for errors.
    """

    OWN_AXES: ClassVar[dict[str, int]] = {}
    """How many axes each part has besides the batch axes."""

    w: Any
    parts: dict[str, jax.Array]
    scale: jax.Array
    key: jax.Array | None = None
    rate: jax.Array | None = None
    path: str = dataclasses.field(default="", metadata={"static": True})

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """(A [*batch, in, r], B [*batch, r, out]); a factor that layers share has no batch axes."""
        raise TypeError(f"{type(self).__name__} does not define factors")

    def folded(self) -> LowRank:
        a, b = self.factors()
        return LowRank(self.w, a, b, self.scale, self.key, self.rate, path=self.path)

    def dense(self) -> jax.Array:
        return self.folded().dense()

    def stacked(self) -> Any:
        n = self.ndim - 2
        if n == 0:
            raise WeightError(f"scan runs along an input or output axis of {self.path!r}")
        flags: dict[str, Any] = dict(
            w=stacked(self.w),
            parts={k: x.ndim - self.OWN_AXES[k] == n for k, x in self.parts.items()},
            scale=jnp.ndim(self.scale) == n,
            key=None if self.key is None else self.key.ndim == n,
            rate=None if self.rate is None else jnp.ndim(self.rate) == n,
        )
        return dataclasses.replace(self, **flags)

    rule_convert_element_type = structure.on_w("convert_element_type")
    rule_reduce_precision = structure.on_w("reduce_precision")
    rule_sharding_constraint = structure.on_w("sharding_constraint")
    rule_copy = structure.on_w("copy")


def _by_folding(name: str) -> Any:
    def rule(self: Folding, args: Sequence[Any], at: int, params: Any) -> Any:
        return getattr(self.folded(), name)(args, at, params)

    return rule


for _name in (
    "dot_general", "gather", "stop_gradient", "neg", "mul", "div", "transpose", "reshape",
    "broadcast_in_dim", "squeeze", "slice", "split", "dynamic_slice", "ragged_dot_general",
):  # fmt: skip
    setattr(Folding, f"rule_{_name}", _by_folding(f"rule_{_name}"))
