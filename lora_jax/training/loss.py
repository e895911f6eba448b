"""Next-token cross entropy in chunks: the logits of a whole batch never exist.

Axes: B rows, T positions, D features, V vocabulary, C positions of a chunk, N gathered targets.
The head and the softmax run on a chunk at a time inside `lax.scan` under `jax.checkpoint`, so
the memory of the loss is that of one chunk's logits, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError

DEFAULT_CHUNK = 1024
"""Positions whose logits exist at one time, over all rows together."""


def shifted_targets(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Targets int[B, T] and their weights float32[B, T]: position t predicts token t + 1.

    The weight is `loss_mask[t + 1]`, and 0 where t + 1 is another segment or padding
    (segment 0). The last position has weight 0.
    """
    tokens_BT = jnp.asarray(batch["tokens"])
    weights_BT = jnp.asarray(batch["loss_mask"], jnp.float32)[:, 1:]
    segments = batch.get("segment_ids")
    if segments is not None:
        segments = jnp.asarray(segments)
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
        weights_BT = weights_BT * same
    ends = ((0, 0), (0, 1))
    return jnp.pad(tokens_BT[:, 1:], ends), jnp.pad(weights_BT, ends)


def count_targets(batch: Mapping[str, Any]) -> int:
    """How many positions of a batch carry loss: what `max_targets` must not be below. On the host.

    >>> count_targets({"tokens": np.zeros((1, 3), int), "loss_mask": np.array([[0, 1, 1.]])})
    2
    """
    mask = np.asarray(batch["loss_mask"])[:, 1:] != 0
    if batch.get("segment_ids") is not None:
        segments = np.asarray(batch["segment_ids"])
        mask = mask & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return int(mask.sum())


def _hidden(model: Any, variables: Any, batch: Mapping[str, Any]) -> jax.Array:
    return model.apply(
        variables,
        batch["tokens"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        method="hidden",
    )


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], in float32 whatever the logits are."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _scan_losses(model: Any, variables: Any, h: jax.Array, targets: jax.Array, size: int):
    """Losses like `targets`, whose LAST axis is cut in pieces of `size` positions.

    Cutting positions and not rows keeps every device's own rows in every chunk.
    """
    length = targets.shape[-1]
    count = -(-length // size)
    pad = [(0, 0)] * (targets.ndim - 1) + [(0, count * size - length)]
    targets = jnp.pad(targets, pad)
    h = jnp.pad(h, [*pad, (0, 0)])
    lead = targets.ndim - 1
    cut = (*targets.shape[:-1], count, size)
    xs = (
        jnp.moveaxis(h.reshape(*cut, h.shape[-1]), lead, 0),
        jnp.moveaxis(targets.reshape(cut), lead, 0),
    )

    # The logits of a chunk are computed again backwards: storing them is what this file avoids.
    @jax.checkpoint
    def one(variables, h_chunk, targets_chunk):
        logits = model.apply(variables, h_chunk, method="logits")
        return _cross_entropy(logits, targets_chunk)

    _, losses = jax.lax.scan(lambda carry, x: (carry, one(variables, *x)), None, xs)
    return jnp.moveaxis(losses, 0, lead).reshape(*cut[:-2], count * size)[..., :length]


def token_losses(
    model: Any, variables: Any, batch: Mapping[str, Any], *, chunk: int = DEFAULT_CHUNK
) -> tuple[jax.Array, jax.Array]:
    """(losses float32[B, T] in nats, weights float32[B, T]); position t is about token t + 1.

    Losses are unweighted: multiply by the weights before summing.
    """
    _check_chunk(chunk)
    targets_BT, weights_BT = shifted_targets(batch)
    h_BTD = _hidden(model, variables, batch)
    size = min(max(1, chunk // targets_BT.shape[0]), targets_BT.shape[1])
    return _scan_losses(model, variables, h_BTD, targets_BT, size), weights_BT


def chunked_loss(
    model: Any,
    variables: Any,
    batch: Mapping[str, Any],
    *,
    chunk: int = DEFAULT_CHUNK,
    max_targets: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted losses, sum of weights), both float32 scalars; their ratio is the mean.

    Args:
        model: has `apply(variables, tokens, positions=, segment_ids=, method="hidden")` to
            [B, T, D] and `apply(variables, h, method="logits")` to [..., V].
        variables: what the model is applied to; may hold low-rank leaves under `adapt`.
        batch: tokens int[B, T], loss_mask float[B, T], and if packed positions and segment_ids.
        chunk: positions whose logits exist at one time.
        max_targets: static bound on the positions with loss in a batch. Only these are gathered
            and sent through the head. A batch with more of them gives NaN, never a silently
            partial loss; `count_targets` says on the host how many a batch has.
    """
    if max_targets is None:
        losses_BT, weights_BT = token_losses(model, variables, batch, chunk=chunk)
        return jnp.sum(losses_BT * weights_BT), jnp.sum(weights_BT)
    _check_chunk(chunk)
    targets_BT, weights_BT = shifted_targets(batch)
    h_BTD = _hidden(model, variables, batch)
    count = min(max_targets, targets_BT.size)
    flat = weights_BT.reshape(-1)
    (index_N,) = jnp.nonzero(flat, size=count, fill_value=flat.size - 1)
    # The fill is the last position, whose weight is 0 by construction.
    h_ND = h_BTD.reshape(-1, h_BTD.shape[-1])[index_N]
    losses_N = _scan_losses(
        model, variables, h_ND, targets_BT.reshape(-1)[index_N], min(chunk, count)
    )
    total = jnp.sum(losses_N * flat[index_N])
    fits = jnp.count_nonzero(flat) <= count
    return jnp.where(fits, total, jnp.nan), jnp.sum(flat)


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise UserError(f"chunk={chunk}: the loss needs chunks of at least 1 position.")
