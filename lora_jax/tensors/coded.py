"""Weights kept as codes and made anew for every use: the base of the quantised types."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tensors.base import Weight, apply_primitive


class Coded(Weight):
    """A frozen weight whose `dense()` is computed from fewer bytes; a subclass has the codes.

    It is made inside the program, where it is used, in the dtype it stands for: a cast of the
    weight (a layer that computes in bfloat16) changes that dtype and nothing else. Derivatives do
    not keep it either: the backward pass makes it again, so that under a scan over layers one
    layer's array exists at a time, and never the whole model's.
    """

    dtype_name: str

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.dtype_name)

    def rule_convert_element_type(self, args: Sequence[Any], at: int, params: Any) -> Any:
        dtype = jnp.dtype(params["new_dtype"])
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        this: Any = self  # subclasses are dataclasses
        return dataclasses.replace(this, dtype_name=dtype.name)

    def _same(self, args: Sequence[Any], at: int, params: Any) -> Any:
        return self

    rule_copy = _same
    rule_stop_gradient = _same
    rule_sharding_constraint = _same


def _product(name: str) -> Any:
    def rule(self: Coded, args: Sequence[Any], at: int, params: Any) -> Any:
        @jax.checkpoint
        def run(weight: Coded, *others: Any) -> Any:
            full = [*others[:at], weight.dense(), *others[at:]]
            return apply_primitive(name, full, at, params)

        return run(self, *args[:at], *args[at + 1 :])

    return rule


for _name in ("dot_general", "gather", "conv_general_dilated", "ragged_dot_general"):
    setattr(Coded, f"rule_{_name}", _product(_name))
