"""W + Δ with Δ dense, as one leaf: added where it is used, one layer at a time under a scan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.tensors import structure
from lora_jax.tensors.base import Over, apply_primitive, densify, is_weight, stacked, wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summed(Over):
    """y = x·(W + Δ); where W is another weight type, y = x·W + x·Δ.

    Args:
      w: the frozen weight [...]: an array, or another weight type.
      delta: Δ, of W's shape, in a dtype of its own.
      path: W's path, for errors.
    """

    w: Any
    delta: jax.Array
    path: str = dataclasses.field(default="", metadata={"static": True})

    def dense(self) -> jax.Array:
        w = densify(self.w)
        return (w.astype(wide(w.dtype)) + self.delta).astype(w.dtype)

    def stacked(self) -> Any:
        w = stacked(self.w)
        flags: dict[str, Any] = dict(w=w, delta=True)
        return dataclasses.replace(self, **flags)

    rule_convert_element_type = structure.on_w("convert_element_type")
    rule_reduce_precision = structure.on_w("reduce_precision")
    rule_sharding_constraint = structure.on_w("sharding_constraint")


def _product(name: str) -> Any:
    def rule(self: Summed, args: Sequence[Any], at: int, params: Any) -> Any:
        one, two = list(args), list(args)
        if not is_weight(self.w):
            one[at] = self.dense()
            return apply_primitive(name, one, at, params)
        one[at], two[at] = self.w, self.delta.astype(self.dtype)
        return apply_primitive(name, one, at, params) + apply_primitive(name, two, at, params)

    return rule


def _view(name: str) -> Any:
    def rule(self: Summed, args: Sequence[Any], at: int, params: Any) -> Any:
        if at != 0:
            return NotImplemented
        w = apply_primitive(name, [self.w, *args[1:]], 0, params)
        delta = apply_primitive(name, [self.delta, *args[1:]], 0, params)
        if name == "split":
            return [dataclasses.replace(self, w=x, delta=d) for x, d in zip(w, delta, strict=True)]
        return dataclasses.replace(self, w=w, delta=delta)

    return rule


for _name in ("dot_general", "gather", "conv_general_dilated", "ragged_dot_general"):
    setattr(Summed, f"rule_{_name}", _product(_name))
for _name in (
    "transpose", "reshape", "squeeze", "slice", "dynamic_slice", "split", "broadcast_in_dim",
    "neg", "copy", "stop_gradient",
):  # fmt: skip
    setattr(Summed, f"rule_{_name}", _view(_name))
