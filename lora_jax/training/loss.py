"""Losses: next-token cross entropy in chunks, classification and regression.

Axes: B rows, T positions, D features, V vocabulary, C classes.
Variables may hold weights everywhere: models are run through `adapt` here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError
from lora_jax.losses import cross_entropy, model_input, shifted_targets
from lora_jax.tensors import adapt
from lora_jax.training.head_loss import total_loss

DEFAULT_CHUNK = 1024
"""Positions whose logits exist at one time, over all rows together."""


def chunked_loss(
    model: Any,
    variables: Any,
    batch: Mapping[str, Any],
    *,
    chunk: int = DEFAULT_CHUNK,
    label_smoothing: float = 0.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted losses, sum of weights), scalars; their ratio is the mean.

    The head is applied only in chunks that hold a position with loss; see `head_loss`.

    Args:
        model: has `apply(variables, tokens, positions=, segment_ids=, method="hidden")` to
            [B, T, D] and `apply(variables, h, method="logits")` to [..., V].
        variables: what the model is applied to; may hold weights, it is run through `adapt`.
        batch: tokens int[B, T], loss_mask float[B, T], and if packed positions and segment_ids.
        chunk: positions, over all rows, whose logits exist at one time.
        label_smoothing: in 0..1, see `cross_entropy`; leave it 0 where a loss is evaluated.
        axis_name: of a `vmap` around, see `head_loss.total_loss`.
    """
    _check(chunk, label_smoothing)
    apply = adapt(model.apply)
    targets_BT, weights_BT = shifted_targets(batch)
    h_BTD = apply(
        variables,
        batch["tokens"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        method="hidden",
    )
    total = total_loss(
        functools.partial(apply, method="logits"),
        functools.partial(cross_entropy, label_smoothing=label_smoothing),
        variables, h_BTD, targets_BT, weights_BT, chunk=chunk, axis_name=axis_name,
    )  # fmt: skip
    return total, jnp.sum(weights_BT)


def outputs(model: Any, variables: Any, batch: Mapping[str, Any]) -> jax.Array:
    """What a model with a classification or regression head gives for a batch: [B, C].

    float32, or float64 where the model computes in that.

    Args:
        batch: tokens int[B, T]; attention_mask and token_type_ids int[B, T] if the model has them.
            Or images float32[B, H, W, C].
    """
    further = {name: batch[name] for name in ("attention_mask", "token_type_ids") if name in batch}
    found = adapt(model.apply)(variables, model_input(batch), **further)
    return found.astype(jnp.promote_types(found.dtype, jnp.float32))


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


def mean_of(sums: Sequence[tuple[Any, Any]]) -> float:
    """Nats a token from (sum of losses, tokens) of batches."""
    total, tokens = (float(np.sum(column)) for column in zip(*sums, strict=True))
    return total / tokens
