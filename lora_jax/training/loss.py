"""Losses: next-token cross entropy in chunks, classification and regression.

Axes: B rows, T positions, D features, V vocabulary, C classes, N gathered targets.
The logits of a whole batch of text never exist: the head and the softmax run on a chunk at a time
inside `lax.scan` under `jax.checkpoint`, so the memory of the loss is that of one chunk's logits,
forwards and backwards.
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


def cross_entropy(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """-log softmax(logits)[target], in float32 or the wider type of the logits.

    With smoothing e it is (1 - e) * that + e * the mean over all V classes of -log softmax, the
    target's included: as torch's `CrossEntropyLoss`, transformers' `LabelSmoother` and LoRA's
    GPT-2 code have it (Szegedy et al. 2016, arXiv:1512.00567).
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if label_smoothing:
        chosen = (1.0 - label_smoothing) * chosen + label_smoothing * jnp.mean(logits, axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _scan_losses(
    model: Any, variables: Any, h: jax.Array, targets: jax.Array, size: int, smoothing: float
) -> jax.Array:
    """Losses like `targets`, whose LAST axis is cut in pieces of `size` positions.

    Cutting positions and not rows keeps every device's own rows in every chunk.
    """
    length = targets.shape[-1]
    if size >= length:
        # One chunk: its logits fit as they are, and a second product with the head would be waste.
        return cross_entropy(model.apply(variables, h, method="logits"), targets, smoothing)
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
        return cross_entropy(logits, targets_chunk, smoothing)

    _, losses = jax.lax.scan(lambda carry, x: (carry, one(variables, *x)), None, xs)
    return jnp.moveaxis(losses, 0, lead).reshape(*cut[:-2], count * size)[..., :length]


def token_losses(
    model: Any,
    variables: Any,
    batch: Mapping[str, Any],
    *,
    chunk: int = DEFAULT_CHUNK,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """(losses float32[B, T] in nats, weights float32[B, T]); position t is about token t + 1.

    Losses are unweighted: multiply by the weights before summing.
    """
    _check(chunk, label_smoothing)
    targets_BT, weights_BT = shifted_targets(batch)
    h_BTD = _hidden(model, variables, batch)
    size = min(max(1, chunk // targets_BT.shape[0]), targets_BT.shape[1])
    losses_BT = _scan_losses(model, variables, h_BTD, targets_BT, size, label_smoothing)
    return losses_BT, weights_BT


def chunked_loss(
    model: Any,
    variables: Any,
    batch: Mapping[str, Any],
    *,
    chunk: int = DEFAULT_CHUNK,
    max_targets: int | None = None,
    label_smoothing: float = 0.0,
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
        label_smoothing: in 0..1, see `cross_entropy`; leave it 0 where a loss is evaluated.
    """
    if max_targets is None:
        losses_BT, weights_BT = token_losses(
            model, variables, batch, chunk=chunk, label_smoothing=label_smoothing
        )
        return jnp.sum(losses_BT * weights_BT), jnp.sum(weights_BT)
    _check(chunk, label_smoothing)
    targets_BT, weights_BT = shifted_targets(batch)
    h_BTD = _hidden(model, variables, batch)
    count = min(max_targets, targets_BT.size)
    flat = weights_BT.reshape(-1)
    (index_N,) = jnp.nonzero(flat, size=count, fill_value=flat.size - 1)
    # The fill is the last position, whose weight is 0 by construction.
    h_ND = h_BTD.reshape(-1, h_BTD.shape[-1])[index_N]
    targets_N = targets_BT.reshape(-1)[index_N]
    losses_N = _scan_losses(model, variables, h_ND, targets_N, min(chunk, count), label_smoothing)
    total = jnp.sum(losses_N * flat[index_N])
    fits = jnp.count_nonzero(flat) <= count
    return jnp.where(fits, total, jnp.nan), jnp.sum(flat)


def outputs(model: Any, variables: Any, batch: Mapping[str, Any]) -> jax.Array:
    """What a model with a classification or regression head gives for a batch: float32 [B, C].

    Args:
        batch: tokens int[B, T]; attention_mask and token_type_ids int[B, T] if the model has them.
    """
    found = model.apply(
        variables,
        batch["tokens"],
        attention_mask=batch.get("attention_mask"),
        token_type_ids=batch.get("token_type_ids"),
    )
    return found.astype(jnp.float32)


def classification_loss(
    model: Any, variables: Any, batch: Mapping[str, Any], *, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted cross entropies, sum of weights), float32 scalars.

    Args:
        batch: as for `outputs`, and labels int[B], weights float[B]: 0 on rows that fill up.
        label_smoothing: in 0..1, see `cross_entropy`.
    """
    _check(1, label_smoothing)
    logits_BC = outputs(model, variables, batch)
    weights_B = jnp.asarray(batch["weights"], jnp.float32)
    losses_B = cross_entropy(logits_BC, jnp.asarray(batch["labels"], jnp.int32), label_smoothing)
    return jnp.sum(losses_B * weights_B), jnp.sum(weights_B)


def regression_loss(
    model: Any, variables: Any, batch: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted squared errors, sum of weights), float32 scalars.

    Args:
        batch: as for `outputs`, and labels float[B], weights float[B]: 0 on rows that fill up.

    Raises UserError if the model's head has more than one output.
    """
    values_B1 = outputs(model, variables, batch)
    if values_B1.shape[-1] != 1:
        raise UserError(f"regression needs a head with 1 output, not {values_B1.shape[-1]}.")
    weights_B = jnp.asarray(batch["weights"], jnp.float32)
    errors_B = values_B1[:, 0] - jnp.asarray(batch["labels"], jnp.float32)
    return jnp.sum(errors_B**2 * weights_B), jnp.sum(weights_B)


def _check(chunk: int, label_smoothing: float) -> None:
    if chunk < 1:
        raise UserError(f"chunk={chunk}: the loss needs chunks of at least 1 position.")
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing={label_smoothing} must be in [0, 1).")
