"""What of a batch a model reads and is to predict, and how wrong its logits are, as arrays.

Axes: B rows, T positions, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def model_input(batch: Mapping[str, Any]) -> Any:
    """What a model reads of a batch: images float32 [B, H, W, C], or tokens int [B, T]."""
    return batch["images"] if "images" in batch else batch["tokens"]


def shifted_targets(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Targets int[B, T] and their weights float32[B, T]: position t predicts token t + 1.

    The weight is `loss_mask[t + 1]`, and 0 where t + 1 is another segment or padding
    (segment 0). The last position has weight 0. Where the weight is 0, so is the target.
    """
    tokens_BT = jnp.asarray(batch["tokens"])
    weights_BT = jnp.asarray(batch["loss_mask"], jnp.float32)[:, 1:]
    segments = batch.get("segment_ids")
    if segments is not None:
        segments = jnp.asarray(segments)
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
        weights_BT = weights_BT * same
    ends = ((0, 0), (0, 1))
    # A placeholder's id is beyond the logits: no target may be one, or 0 * nan is the loss.
    targets_BT = jnp.where(weights_BT > 0, tokens_BT[:, 1:], 0)
    return jnp.pad(targets_BT, ends), jnp.pad(weights_BT, ends)


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
