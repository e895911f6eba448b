"""A weight that is as it was, and tells the second moments of what it is multiplied with.

What is learnt from a pass over data travels as a derivative: the derivative of any scalar with
respect to `moments` is the sum of [x, 1]ᵀ[x, 1] over the inputs x. So it works under scan and
remat, layer by layer, where a side effect would not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.tensors import structure
from lora_jax.tensors.base import Over, WeightError, apply_primitive, densify, stacked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe(Over):
    """W [*batch, in, out], for x·W with x [..., in].

    Args:
      w: the weight: an array, or another weight type.
      moments: [*batch, in + 1, in + 1], of any value: only its derivative matters.
      weights: of the leading axes of x, shared by all layers: 0 leaves an input out. If they are
        [B, T] and a module computes one position of each row, as the last layer does under a
        scoring head, that one is an input unless all of its row is left out.
      path: W's path, for errors.
    """

    w: Any
    moments: jax.Array
    weights: jax.Array
    path: str = dataclasses.field(default="", metadata={"static": True})

    def dense(self) -> jax.Array:
        return densify(self.w)

    def stacked(self) -> Any:
        if self.ndim == 2:
            raise WeightError(f"scan runs along an input or output axis of {self.path!r}")
        w = stacked(self.w)
        flags: dict[str, Any] = dict(w=w, moments=True, weights=False)
        return dataclasses.replace(self, **flags)

    rule_convert_element_type = structure.on_w("convert_element_type")
    rule_copy = structure.on_w("copy")

    def rule_dot_general(self, args: Sequence[Any], at: int, params: Any) -> Any:
        x, (contract, batch) = args[1 - at], params["dimension_numbers"]
        weights = self._weights_of(x.shape[:-1])
        plain = (
            self.ndim == 2
            and not batch[at]
            and tuple(contract[at]) == (0,)
            and tuple(contract[1 - at]) == (x.ndim - 1,)
        )
        if not plain or weights is None:
            return NotImplemented
        pair = [x, self.w] if at == 1 else [self.w, x]
        y = apply_primitive("dot_general", pair, at, params)
        return y + _observed(self.moments, x, weights).astype(y.dtype)

    def _weights_of(self, shape: tuple[int, ...]) -> jax.Array | None:
        """Of inputs in this arrangement; None where they are not those that the weights are of."""
        weights, rows = self.weights, self.weights.ndim
        if rows == 2 and shape[:2] == (weights.shape[0], 1):
            weights = jnp.max(weights, axis=1, keepdims=True)
        if shape[:rows] != weights.shape:
            return None
        return jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (len(shape) - rows)), shape)


@jax.custom_vjp
def _observed(moments: jax.Array, x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.zeros(())


def _forward(moments: jax.Array, x: jax.Array, weights: jax.Array) -> tuple[jax.Array, Any]:
    return jnp.zeros(()), (x, weights)


def _backward(kept: Any, _: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, weights = kept
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    rows = jnp.concatenate([rows, jnp.ones((len(rows), 1))], axis=-1)
    moments = (rows * weights.reshape(-1, 1)).T @ rows
    return moments, jnp.zeros_like(x), jnp.zeros_like(weights)


_observed.defvjp(_forward, _backward)
