"""8-bit integers with a scale for every output: W = codes ∘ scale, scale = absmax / 127.

The row-wise ("vector-wise") absmax quantisation of weights in LLM.int8() (Dettmers et al. 2022,
arXiv:2208.07339, section 2.1), with activations left as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax.tensors.base import apply_primitive
from lora_jax.tensors.coded import Coded
from lora_jax.tensors.rescaled import Rescaled

LARGEST = 127
_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Integers(Coded):
    """Integers that stand for numbers of a float dtype, which holds them exactly.

    Args:
      codes: int8 [...].
      dtype_name: of the array that they stand for.
      path: the weight's path, for errors.
    """

    codes: jax.Array
    dtype_name: str = dataclasses.field(default="float32", metadata=_STATIC)
    path: str = dataclasses.field(default="", metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dense(self) -> jax.Array:
        return self.codes.astype(self.dtype)

    def stacked(self) -> Any:
        return jax.tree.map(lambda _: True, self)

    def specs(self, spec: Sequence[Any], sizes: Mapping[str, int]) -> Any:
        return jax.tree.map(lambda _: PartitionSpec(*spec), self)


def _view(name: str) -> Any:
    def rule(self: Integers, args: Sequence[Any], at: int, params: Any) -> Any:
        if at != 0:
            return NotImplemented
        codes = apply_primitive(name, [self.codes, *args[1:]], 0, params)
        if name == "split":
            return [dataclasses.replace(self, codes=x) for x in codes]
        return dataclasses.replace(self, codes=codes)

    return rule


for _name in (
    "transpose", "reshape", "squeeze", "slice", "dynamic_slice", "split", "broadcast_in_dim",
):  # fmt: skip
    setattr(Integers, f"rule_{_name}", _view(_name))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Rescaled):
    """y = (x·codes) ∘ scale: `Integers` under the scales of their outputs, in float32.

    Its bytes are one a number and four an output. The scales are `gain`.
    """

    def specs(self, spec: Sequence[Any], sizes: Mapping[str, int]) -> Any:
        """Codes as the array they stand for, the scales beside their outputs."""
        pairs = zip(spec, self.gain.shape, strict=False)
        gain: Any = PartitionSpec(*(None if size == 1 else axis for axis, size in pairs))
        return dataclasses.replace(self, w=self.w.specs(spec, sizes), gain=gain)

    def rule_neg(self, args: Sequence[Any], at: int, params: Any) -> Any:
        return dataclasses.replace(self, gain=-self.gain)

    def rule_mul(self, args: Sequence[Any], at: int, params: Any) -> Any:
        if jnp.ndim(args[1 - at]) != 0:
            return NotImplemented
        factor = jnp.asarray(args[1 - at], jnp.float32)
        return dataclasses.replace(self, gain=self.gain * factor)

    def rule_div(self, args: Sequence[Any], at: int, params: Any) -> Any:
        if at != 0 or jnp.ndim(args[1]) != 0:
            return NotImplemented
        return dataclasses.replace(self, gain=self.gain / jnp.asarray(args[1], jnp.float32))


def int8(w: Any, *, batch: int = 0, path: str = "") -> Int8:
    """`w` quantised; its last axis are the outputs.

    Args:
      w: [*batch, *in, out], any float dtype.
      batch: how many leading axes are layers or experts.
    """
    w32 = jnp.asarray(w).astype(jnp.float32)
    absmax = jnp.max(jnp.abs(w32), axis=tuple(range(batch, w.ndim - 1)), keepdims=True)
    scale = absmax / LARGEST
    codes = jnp.round(w32 / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
    return Int8(Integers(codes, jnp.dtype(w.dtype).name, path), scale, path)
