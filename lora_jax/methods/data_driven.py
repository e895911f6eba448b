"""What data-driven starts learn from a few batches: the model's outputs, loss and gradients."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lora_jax.errors import UserError
from lora_jax.losses import cross_entropy, model_input, shifted_targets
from lora_jax.methods import base

M = TypeVar("M", bound=base.Method)
_MODEL_INPUTS = ("positions", "segment_ids", "attention_mask", "token_type_ids")


def outputs(apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> jax.Array:
    """What the model gives for a batch: float32 logits [B, T, V], or [B, C] with a head."""
    further = {k: batch[k] for k in _MODEL_INPUTS if k in batch}
    return apply({"params": params}, model_input(batch), **further).astype(jnp.float32)


def loss(apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> jax.Array:
    """The mean loss that the batch is for: next tokens, or labels (classes or numbers)."""
    y = outputs(apply, params, batch)
    if "labels" not in batch:
        targets, weights = shifted_targets(batch)
        losses = cross_entropy(y, targets)
    elif jnp.issubdtype(jnp.asarray(batch["labels"]).dtype, jnp.integer):
        losses, weights = cross_entropy(y, jnp.asarray(batch["labels"])), batch["weights"]
    else:
        losses, weights = (y[:, 0] - batch["labels"]) ** 2, batch["weights"]
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def real_tokens(batch: Mapping[str, Any]) -> jax.Array:
    """float32 [B, T]: 1 on tokens, 0 on padding."""
    for name in ("attention_mask", "segment_ids"):
        if name in batch:
            return (jnp.asarray(batch[name]) > 0).astype(jnp.float32)
    if "tokens" not in batch:
        raise UserError("this method looks at the activations of tokens: its task must be of text")
    return jnp.ones(jnp.shape(batch["tokens"]), jnp.float32)


def first(batches: Iterable[Any], count: int, who: str) -> list[dict[str, Any]]:
    """The first batches, without what is no array of the batch."""
    found = [{k: x for k, x in b.items() if k != "rows"} for b in itertools.islice(batches, count)]
    if not found:
        raise UserError(f"{who} looks at {count} batches, but there are none")
    return found


def with_start(method: M, start: Any) -> M:
    """A copy that holds arrays beside its fields, which say how they are had and are what is saved.

    `dataclasses.replace` leaves them behind.
    """
    new = copy.copy(method)
    object.__setattr__(new, "_start", start)
    return new
