"""The language model's head and cross entropy in chunks, with gradients made on the way forward.

A chunk's logits are big and its gradient with respect to the hidden states is small: so that is
computed at once, chunk by chunk, and kept. The head is then multiplied once forwards and once
backwards, never a second time to get its logits back, and whole logits exist at no time. Chunks
in which no position carries loss are skipped.

Axes: B rows, T positions, D features, V vocabulary, S positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

Head = Callable[[Any, jax.Array], jax.Array]
"""(variables, h [B, S, D]) -> logits [B, S, V]."""
Losses = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits [B, S, V], targets int [B, S]) -> losses [B, S]."""


def total_loss(
    head: Head,
    losses: Losses,
    variables: Any,
    h_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int,
    axis_name: str | None = None,
) -> jax.Array:
    """Sum over all positions of weight times loss; a scalar.

    Differentiable once, in reverse, by `h_BTD` and whatever of `variables` is differentiated.

    Args:
      variables: a tree of arrays, weights (`lora_jax.tensors`) included, that `head` may use.
      chunk: positions, over all rows, whose logits exist at one time. Positions are cut, not rows:
        every device keeps its own rows.
      axis_name: of a `vmap` around: chunks are then skipped where no member needs them. Without
        it a mapped loss computes all chunks.
    """
    rows, length = targets_BT.shape
    size = min(max(1, chunk // rows), length)
    if size == length:
        logits = head(variables, h_BTD)
        return jnp.sum(losses(logits, targets_BT) * weights_BT)
    # Positions with loss go to the front of their row, so that the last chunks have none.
    order_BT = jnp.argsort(weights_BT == 0, axis=1, stable=True)
    count = jnp.max(jnp.sum(weights_BT != 0, axis=1))
    if axis_name is not None:
        count = jax.lax.pmax(count, axis_name)
    targets_BT = jnp.take_along_axis(targets_BT, order_BT, axis=1)
    weights_BT = jnp.take_along_axis(weights_BT, order_BT, axis=1)
    h_BTD = jnp.take_along_axis(h_BTD, order_BT[:, :, None], axis=1)
    extra = -length % size
    cut = [
        jnp.moveaxis(
            jnp.pad(x, [(0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)]).reshape(
                rows, -1, size, *x.shape[2:]
            ),
            1,
            0,
        )
        for x in (h_BTD, targets_BT, weights_BT)
    ]
    live = jnp.arange(cut[0].shape[0]) * size < count
    leaves, treedef = jax.tree.flatten(variables)

    def logits_of(leaves: list[Any], h: jax.Array) -> jax.Array:
        return head(jax.tree.unflatten(treedef, leaves), h)

    used = _used(logits_of, leaves, cut[0][0])
    idle = [jax.lax.stop_gradient(leaf) for leaf in leaves]  # there for their shapes alone

    def one(some: list[Any], h: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        full = list(idle)
        for i, leaf in zip(used, some, strict=True):
            full[i] = leaf
        return jnp.sum(losses(logits_of(full, h), targets) * weights)

    return _chunked(one)(*cut, live, *(leaves[i] for i in used))


def _used(logits_of: Callable[..., jax.Array], leaves: list[Any], h: jax.Array) -> list[int]:
    """Which leaves the head reads: the others must not get gradients, even of zero."""
    jaxpr = jax.make_jaxpr(logits_of)(leaves, h).jaxpr
    read = {v for e in jaxpr.eqns for v in e.invars if not isinstance(v, Literal)}
    return [i for i, v in enumerate(jaxpr.invars[: len(leaves)]) if v in read]


def _chunked(one: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """(h [chunks, B, S, D], targets, weights, live [chunks], *leaves) -> the sum of `one`."""

    def forward(wanted: list[int], h: Any, targets: Any, weights: Any, live: Any, leaves: Any):
        """(total, [gradient by h, of each wanted leaf])."""

        def loss(h_: Any, chosen: Any, targets_: Any, weights_: Any) -> jax.Array:
            full = list(leaves)
            for i, leaf in zip(wanted, chosen, strict=True):
                full[i] = leaf
            return one(full, h_, targets_, weights_)

        chosen = [leaves[i] for i in wanted]
        gradient = jax.value_and_grad(loss, argnums=(0, 1))
        shapes = jax.eval_shape(gradient, h[0], chosen, targets[0], weights[0])
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def body(sums: Any, chunk: Any) -> Any:
            h_, targets_, weights_, live_ = chunk
            total, (dh, dleaves) = jax.lax.cond(
                live_, lambda: gradient(h_, chosen, targets_, weights_), lambda: nothing
            )
            return jax.tree.map(jnp.add, sums, (total, dleaves)), dh

        start = (nothing[0], nothing[1][1])
        (total, dleaves), dh = jax.lax.scan(body, start, (h, targets, weights, live))
        return total, (dh, dleaves)

    def plain(h: Any, targets: Any, weights: Any, live: Any, *leaves: Any) -> jax.Array:
        def body(total: Any, chunk: Any) -> Any:
            h_, targets_, weights_, live_ = chunk
            loss = jax.lax.cond(
                live_, lambda: one(list(leaves), h_, targets_, weights_), lambda: zero
            )
            return total + loss, None

        shape = jax.eval_shape(one, list(leaves), h[0], targets[0], weights[0])
        zero = jnp.zeros(shape.shape, shape.dtype)
        return jax.lax.scan(body, zero, (h, targets, weights, live))[0]

    run = jax.custom_vjp(plain)

    def run_forward(h: Any, targets: Any, weights: Any, live: Any, *leaves: Any) -> Any:
        # Only leaves that are differentiated get a gradient: none for a frozen head.
        wanted = [i for i, leaf in enumerate(leaves) if leaf.perturbed]
        values = [leaf.value for leaf in leaves]
        total, (dh, dleaves) = forward(
            wanted, h.value, targets.value, weights.value, live.value, values
        )
        by_place: list[Any] = [None] * len(leaves)
        for i, gradient in zip(wanted, dleaves, strict=True):
            by_place[i] = gradient
        return total, (dh, by_place)

    def run_backward(kept: Any, cotangent: Any) -> Any:
        dh, dleaves = kept
        scaled = [None if x is None else (x * cotangent).astype(x.dtype) for x in dleaves]
        return ((dh * cotangent).astype(dh.dtype), None, None, None, *scaled)

    run.defvjp(run_forward, run_backward, symbolic_zeros=True)
    return run
