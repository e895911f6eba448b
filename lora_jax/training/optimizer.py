"""Optimizers from one frozen config. They only ever see the trainable tree.

Every number a sweep may vary (`learning_rate`, `weight_decay`) is an array in the optimizer's
state, under `opt_state.hyperparams`, so members of a pack can differ in it. The schedule is a
separate factor in 0..1: setting the learning rate of a member keeps the schedule.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import partition
from lora_jax.errors import UserError, nearest

NAMES = ("adamw", "adam", "sgd", "lion")
SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How trainable leaves are updated.

    Attributes:
        name: adamw, adam, sgd or lion.
        learning_rate: peak value.
        schedule: after the warm-up, constant, or falling to 0 at the last step (linear, cosine).
        warmup_steps: optimizer steps over which the rate rises linearly from 0.
        weight_decay: decoupled decay per unit of learning rate, on every trainable leaf.
        b1, b2, eps: of adam and adamw; lion uses b1 and b2.
        momentum: of sgd only.
        clip_norm: bound on the global norm of the trainable leaves' gradient; None: no clipping.
        groups: ordered (regex, multiplier of the learning rate) on paths such as
            `layers/3/attention/query/kernel/b`; the first match wins, no match is 1.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    clip_norm: float | None = None
    groups: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"optimizer name {self.name!r} is unknown; choose one of {NAMES}.")
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule {self.schedule!r} is unknown; choose one of {SCHEDULES}.")
        if self.name == "adam" and self.weight_decay:
            raise UserError("adam has no weight decay here; use name='adamw' for decoupled decay.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(f"clip_norm={self.clip_norm} must be above 0; None turns it off.")
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps={self.warmup_steps} must not be negative.")


def schedule_factor(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step number -> multiplier of the peak learning rate, for a run of `steps` updates.

    Step k (from 0) of the warm-up uses (k + 1) / warmup_steps, so no step is wasted at rate 0.
    """
    warmup, rest = config.warmup_steps, max(1, steps - config.warmup_steps)
    if warmup >= steps and warmup > 0:
        raise UserError(f"warmup_steps={warmup} must be below the {steps} steps of the run.")

    def factor(count: Any) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        done = jnp.clip((count - warmup) / rest, 0.0, 1.0)
        if config.schedule == "linear":
            value = 1.0 - done
        elif config.schedule == "cosine":
            value = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        else:
            value = jnp.ones_like(done)
        return jnp.where(count < warmup, (count + 1.0) / max(1, warmup), value)

    return factor


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optax transformation for a run of `steps` updates.

    Its state starts with `hyperparams` {learning_rate, schedule, weight_decay}. Of these
    `schedule` is recomputed from the step count at each update.
    """

    def build(learning_rate: Any, schedule: Any, weight_decay: Any):
        parts = []
        if config.clip_norm is not None:
            parts.append(optax.clip_by_global_norm(config.clip_norm))
        parts.append(_direction(config))
        if config.name != "adam":
            parts.append(optax.add_decayed_weights(weight_decay))
        if config.groups:
            parts.append(scale_groups(config.groups))
        parts.append(optax.scale_by_learning_rate(learning_rate * schedule))
        return optax.chain(*parts)

    return optax.inject_hyperparams(build, hyperparam_dtype=jnp.float32)(
        learning_rate=float(config.learning_rate),
        schedule=schedule_factor(config, steps),
        weight_decay=float(config.weight_decay),
    )


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    if config.name in ("adamw", "adam"):
        return optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2)
    return optax.trace(config.momentum) if config.momentum else optax.identity()


def scale_groups(groups: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Multiplies updates by the first group whose regex matches their path.

    Leaves of a stack of layers get one multiplier per layer on their leading axis. A group that
    matches no leaf is a UserError at `init`.
    """

    def init(params: Any) -> optax.EmptyState:
        names = [name for path, _ in _leaves(params) for name in partition.expand(path)]
        for pattern, _ in groups:
            partition.compiled(pattern)
            if not any(_matches(pattern, name) for name in names):
                raise UserError(
                    f"optimizer groups: the pattern {pattern!r} matches no trainable leaf; "
                    + nearest(pattern.strip("$^"), names)
                )
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scaled = [leaf * _multiplier(groups, path, leaf) for path, leaf in _leaves(updates)]
        return jax.tree.unflatten(jax.tree.structure(updates), scaled), state

    return optax.GradientTransformation(init, update)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


def _matches(pattern: str, name: str) -> bool:
    # `…/kernel/b` also answers to its kernel's and its module's path.
    return partition.matches(pattern, name) or partition.matches(pattern, partition.module(name))


def _multiplier(groups: tuple[tuple[str, float], ...], path: str, leaf: Any) -> Any:
    names = partition.expand(path)
    values = [
        next((value for regex, value in groups if _matches(regex, name)), 1.0) for name in names
    ]
    if len(set(values)) == 1:
        return values[0]
    if leaf.shape[:1] != (len(names),):
        raise UserError(
            f"{path} has one value for its {len(names)} layers, but the optimizer groups give "
            "different multipliers to them; use a regex that treats all its layers alike."
        )
    return np.asarray(values, np.float32).reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)


def current_learning_rate(opt_state: Any) -> jax.Array | None:
    """The rate the last update used (peak times schedule); None if the state does not hold it."""
    for _, hyper in optax.tree.get_all_with_path(opt_state, "hyperparams"):
        if "learning_rate" in hyper:
            return hyper["learning_rate"] * hyper.get("schedule", 1.0)
    return None
