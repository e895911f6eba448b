"""What a step does now and then, at no cost in the steps between: also where members are mapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def where_due(due: jax.Array, act: Callable[..., Any], old: Any, *given: Any) -> Any:
    """`act(old, *given)` where `due`, `old` elsewhere.

    Under `vmap` a `lax.cond` whose condition differs by member becomes a choice between two values
    that are both computed, each time. Here the members are asked together, and nothing is computed
    while none is due.

    Args:
      due: bool [].
      act: reads no traced value but its arguments; what it returns has the form of `old`.
      old, given: trees of arrays.
    """

    @custom_vmap
    def run(due: jax.Array, old: Any, given: Any) -> Any:
        return jax.lax.cond(due, lambda o, g: act(o, *g), lambda o, g: o, old, given)

    @run.def_vmap  # type: ignore[untyped-decorator]
    def _members(size: int, mapped: Any, due: Any, old: Any, given: Any) -> Any:
        def of_all(x: Any, is_mapped: bool) -> Any:
            return x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))

        due_M, old_M = jax.tree.map(of_all, (due, old), tuple(mapped[:2]))
        axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, mapped[2])

        def acted(o: Any, g: Any) -> Any:
            new_M = jax.vmap(lambda one, also: act(one, *also), in_axes=(0, axes))(o, g)
            return jax.tree.map(lambda n, x: _chosen(due_M, n, x), new_M, o)

        new = jax.lax.cond(jnp.any(due_M), acted, lambda o, g: o, old_M, given)
        return new, jax.tree.map(lambda _: True, new)

    return run(due, old, given)


def _chosen(due_M: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(due_M.reshape(-1, *[1] * (new.ndim - 1)), new, old)
