"""W + A·diag(d)·B·diag(g) with A and B shared by all layers (VeRA, Kopiczko et al. 2024, eq. 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.tensors.base import apply_primitive, wide
from lora_jax.tensors.folding import Folding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VeraWeight(Folding):
    """y = x·W + s·(((x·A) ∘ d)·B) ∘ g.

    Parts: a [in or more, r] and b [r, out or more], of which the first rows and columns are used,
    d [*batch, r], g [*batch, out].
    """

    OWN_AXES: ClassVar[dict[str, int]] = {"a": 2, "b": 2, "d": 1, "g": 1}

    def factors(self) -> tuple[jax.Array, jax.Array]:
        n_in, n_out = self.shape[-2:]
        d, g = self.parts["d"][..., :, None], self.parts["g"][..., None, :]
        b = self.parts["b"][:, :n_out]
        return self.parts["a"][:n_in], d * b.reshape((1,) * (d.ndim - 2) + b.shape) * g

    def rule_dot_general(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """A matrix times activations, in the order that needs least work; else by folding."""
        x, (contract, batch) = args[1 - at], params["dimension_numbers"]
        if self.ndim != 2 or batch[at] or len(contract[at]) != 1:
            return self.folded().rule_dot_general(args, at, params)
        y = apply_primitive("dot_general", [x, self.w] if at == 1 else [self.w, x], at, params)
        (axis,) = contract[1 - at]
        n_in, n_out = self.shape
        a, b = self.parts["a"][:n_in], self.parts["b"][:, :n_out]
        d, g = self.parts["d"], self.parts["g"]
        z = jnp.moveaxis(self.folded_dropout(x), axis, -1)
        options: dict[str, Any] = dict(
            precision=params["precision"], preferred_element_type=wide(x.dtype)
        )

        def times(z: jax.Array, factor: jax.Array) -> jax.Array:
            z = z.astype(x.dtype)
            return jnp.tensordot(z, factor.astype(x.dtype), ((z.ndim - 1,), (0,)), **options)

        def along(v: jax.Array) -> jax.Array:
            return v.reshape((1,) * (z.ndim - 1) + v.shape)

        if contract[at][0] == 0:
            z = times(times(z, a) * along(d), b) * along(g)
        else:
            z = times(times(z * along(g).astype(x.dtype), b.T) * along(d), a.T)
        z = z * jnp.asarray(self.scale, jnp.float32)
        if at == 0:
            z = jnp.moveaxis(z, -1, 0)
        return y + z.astype(y.dtype)

    def folded_dropout(self, x: jax.Array) -> jax.Array:
        """Dropout of the input of A, as LowRank has it."""
        return x if self.key is None else self.folded().dropped(x)
