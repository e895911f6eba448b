"""Learning-rate schedules whose numbers are arrays, so that members of a pack can differ."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import UserError

SCHEDULES = ("constant", "linear", "cosine")


def factor(name: str, count: Any, warmup: Any, steps: int) -> jax.Array:
    """Multiplier of the peak learning rate, float32 in 0..1, for update number `count` (from 0).

    Update k of the warm-up uses (k + 1) / warmup, so no update is wasted at rate 0. After it the
    rate stays (constant) or falls to 0 at `steps`: linearly, or as half a cosine (Loshchilov &
    Hutter 2017, arXiv:1608.03983, without restarts).

    Args:
        name: one of SCHEDULES.
        count, warmup: numbers or arrays.
        steps: updates of the whole run; static.
    """
    count = jnp.asarray(count, jnp.float32)
    warmup = jnp.asarray(warmup, jnp.float32)
    done = jnp.clip((count - warmup) / jnp.maximum(steps - warmup, 1.0), 0.0, 1.0)
    if name == "linear":
        value = 1.0 - done
    elif name == "cosine":
        value = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    else:
        value = jnp.ones_like(done)
    return jnp.where(count < warmup, (count + 1.0) / jnp.maximum(warmup, 1.0), value)


def warmup_updates(warmup_steps: int, warmup_fraction: float, steps: int) -> int:
    """The warm-up in updates; a fraction of the run is rounded up, as in transformers.

    Raises UserError if no update would be left after it.
    """
    # The product may lie a rounding above a whole number: 0.07 * 100 is 7.000000000000001.
    updates = math.ceil(warmup_fraction * steps - 1e-9) if warmup_fraction else warmup_steps
    if 0 < steps <= updates:
        raise UserError(f"a warm-up of {updates} steps must be below the {steps} steps of the run.")
    return updates
