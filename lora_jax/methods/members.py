"""Several adapters of one method on one base in one call: each row of a batch has its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base
from lora_jax.tensors.base import Over, is_weight
from lora_jax.tensors.members import Members, over, places


def combine_members(
    method: base.Method,
    params: Any,
    trainable: base.Trainable,
    rows: Any,
    *,
    numbers: Mapping[str, Any],
    key: jax.Array | None = None,
) -> Any:
    """Variables to apply the model to, through `lora_jax.adapt`, to a batch of B rows.

    Row b of the result is what the adapter rows[b] alone gives. Differentiable in `trainable`:
    a member's gradient is that of its own rows.

    Args:
      method: of all members; `sweeps.adapter_stack.stack_adapters` says which may share one.
      trainable, numbers: theirs, with a leading axis over the M members: as a pack's states hold
        them (`sweeps.padding`).
      rows: int [B], 0 to M - 1; may be traced, so that one program serves any mixture.
      key: switches dropout on.

    Raises:
      UserError: the method acts on activations, or changes a leaf by something that is neither a
        weight over it nor an array in its place.
    """
    flat, count = partition.flatten(params), jax.tree.leaves(dict(trainable))[0].shape[0]
    shape: dict[str, tuple[Any, tuple[int, ...], int]] = {}

    def arrays(trainable: base.Trainable, numbers: Any, key: Any) -> dict[str, list[Any]]:
        """Of one member; what stands around them, which is alike in all, goes to `shape`."""
        variables = method.combine(params, trainable, key=key, numbers=numbers)
        if set(variables) != {"params"}:
            raise UserError(
                f"{method.name!r} acts on activations, where one adapter is for a whole batch, so "
                "its adapters cannot be chosen by row: run the rows of each adapter on their own"
            )
        found = {}
        for path, leaf in partition.flatten(variables["params"]).items():
            if leaf is flat[path]:
                continue
            depth = _depth(leaf, flat[path], method, path)
            like, axes = places(leaf, depth, sliced=partition.stack_of(path) is not None)
            shape[path] = like, axes, depth
            found[path] = jax.tree.leaves(over(leaf, None, depth) if depth else leaf)
        return found

    keys = None if key is None else jax.random.split(key, count)
    made = jax.vmap(arrays)(dict(trainable), dict(numbers), keys)
    rows, new = jnp.asarray(rows, jnp.int32), {}
    for path, (like, axes, depth) in shape.items():
        placed = [jnp.moveaxis(x, 0, axis) for x, axis in zip(made[path], axes, strict=True)]
        w = flat[path] if depth else None
        new[path] = Members(w, tuple(placed), rows, axes, like, depth, path)
    return {"params": partition.replace(params, new)}


def _depth(leaf: Any, old: Any, method: base.Method, path: str) -> int:
    """How many weights stand over the old leaf; 0 for an array in its place."""
    depth = 0
    while isinstance(leaf, Over) and leaf is not old:
        depth, leaf = depth + 1, leaf.w
    if leaf is old or (depth == 0 and not is_weight(leaf)):
        return depth
    raise UserError(
        f"{method.name!r} changes {path!r} in a way that cannot be chosen by row: run the rows of "
        "each adapter on their own, or merge each into a base of its own"
    )
