"""Optimizers from one frozen config. They only ever see the trainable tree.

Every number a sweep may vary is an array in the optimizer's state, under `hyperparams`, so
members of a pack can differ in it: `hyperparams(config, steps)` are the numbers of one member,
`with_hyperparams` puts them into a state. What is None in the config, and the names of optimizer
and schedule, is structure: members of one pack share it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.errors import UserError
from lora_jax.training import groups, schedules

NAMES = ("adamw", "adam", "sgd", "lion")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How trainable leaves are updated.

    Attributes:
        name: adamw, adam, sgd or lion.
        learning_rate: peak value.
        schedule: after the warm-up, constant, or falling to 0 at the last step (linear, cosine).
        warmup_steps: optimizer steps over which the rate rises linearly from 0.
        warmup_fraction: the same as a share of the run's steps, rounded up; 0: `warmup_steps`.
        weight_decay: decoupled decay per unit of learning rate.
        b1, b2, eps: of adam and adamw; lion uses b1 and b2.
        momentum: of sgd only; None: none, and no buffer for it.
        clip_norm: bound on the global norm of the trainable leaves' gradient; None: no clipping.
        groups: ordered (regex, multiplier of the learning rate) on paths such as
            `layers/3/attention/query/kernel/b`; the first match wins, no match is 1.
        decay_groups: likewise (regex, multiplier of the weight decay); biases and norms are
            spared by `((r"(bias|scale)$", 0.0),)`.
    """

    # Fields in which members of one compiled sweep may differ (None or not is structure), and
    # whether zero-padded entries stay zero: all of NAMES work entry by entry.
    numeric: ClassVar[tuple[str, ...]] = (
        "learning_rate", "warmup_steps", "warmup_fraction", "weight_decay", "b1", "b2", "eps",
        "momentum", "clip_norm",
    )  # fmt: skip
    padding_exact: ClassVar[bool] = True

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float | None = None
    clip_norm: float | None = None
    groups: tuple[tuple[str, float], ...] = ()
    decay_groups: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"optimizer name {self.name!r} is unknown; choose one of {NAMES}.")
        if self.schedule not in schedules.SCHEDULES:
            raise UserError(
                f"schedule {self.schedule!r} is unknown; choose one of {schedules.SCHEDULES}."
            )
        if self.name == "adam" and (self.weight_decay or self.decay_groups):
            raise UserError("adam has no weight decay here; use name='adamw' for decoupled decay.")
        if self.momentum is not None and self.name != "sgd":
            raise UserError(f"momentum is of sgd only; {self.name} has b1.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(f"clip_norm={self.clip_norm} must be above 0; None turns it off.")
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps={self.warmup_steps} must not be negative.")
        if not 0 <= self.warmup_fraction < 1:
            raise UserError(f"warmup_fraction={self.warmup_fraction} must be in [0, 1).")
        if self.warmup_steps and self.warmup_fraction:
            raise UserError("give warmup_steps or warmup_fraction, not both.")


class OptimizerState(NamedTuple):
    """The state of `make_optimizer`'s transformation.

    Attributes:
        updates: int32, number of updates done.
        schedule: float32, the schedule's factor at the last update.
        hyperparams: float32 scalars by name, the numbers of the next update.
        inner: moments and the like.
    """

    updates: jax.Array
    schedule: jax.Array
    hyperparams: dict[str, jax.Array]
    inner: Any


def hyperparams(config: OptimizerConfig, steps: int) -> dict[str, float]:
    """The numbers that `config` puts into `OptimizerState.hyperparams`, for a run of `steps`.

    learning_rate and warmup_steps, and of weight_decay, b1, b2, eps, momentum and clip_norm
    those that the optimizer has.
    """
    warmup = schedules.warmup_updates(config.warmup_steps, config.warmup_fraction, steps)
    numbers = {"learning_rate": config.learning_rate, "warmup_steps": warmup}
    if config.name != "adam":
        numbers["weight_decay"] = config.weight_decay
    if config.name != "sgd":
        numbers |= {"b1": config.b1, "b2": config.b2}
    if config.name in ("adam", "adamw"):
        numbers["eps"] = config.eps
    for name in ("momentum", "clip_norm"):
        if getattr(config, name) is not None:
            numbers[name] = getattr(config, name)
    return {name: float(value) for name, value in numbers.items()}


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optax transformation for a run of `steps` updates; its state is an OptimizerState.

    Raises UserError for a warm-up as long as the run, and at `init` for a group that matches no
    trainable leaf.
    """
    numbers = hyperparams(config, steps)

    def init(params: Any) -> OptimizerState:
        groups.check(config.groups, params, "optimizer groups")
        groups.check(config.decay_groups, params, "optimizer decay_groups")
        arrays = {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}
        inner = _chain(config, arrays, jnp.float32(0)).init(params)
        return OptimizerState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), arrays, inner)

    def update(updates: Any, state: OptimizerState, params: Any = None) -> tuple[Any, Any]:
        h = state.hyperparams
        schedule = schedules.factor(config.schedule, state.updates, h["warmup_steps"], steps)
        chain = _chain(config, h, h["learning_rate"] * schedule)
        updates, inner = chain.update(updates, state.inner, params)
        # float32 numbers would turn moments of lower precision into float32 ones.
        inner = jax.tree.map(lambda new, old: new.astype(old.dtype), inner, state.inner)
        return updates, OptimizerState(state.updates + 1, schedule, h, inner)

    return optax.GradientTransformation(init, update)


def _chain(
    config: OptimizerConfig, h: Mapping[str, jax.Array], rate: jax.Array
) -> optax.GradientTransformation:
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(h["clip_norm"]))
    if config.name == "lion":
        parts.append(optax.scale_by_lion(h["b1"], h["b2"]))
    elif config.name == "sgd":
        parts.append(optax.trace(h["momentum"]) if "momentum" in h else optax.identity())
    else:
        parts.append(optax.scale_by_adam(h["b1"], h["b2"], h["eps"]))
    if "weight_decay" in h:
        parts.append(groups.decay(h["weight_decay"], config.decay_groups))
    if config.groups:
        parts.append(groups.scale(config.groups))
    return optax.chain(*parts, optax.scale_by_learning_rate(rate))


def current_learning_rate(opt_state: Any) -> jax.Array | None:
    """The rate the last update used (peak times schedule); None if the state does not hold it.

    Finds the OptimizerState inside whatever a method's `wrap_optimizer` made of it; of several
    the first counts.
    """
    parts = _parts(opt_state)
    return parts[0].hyperparams["learning_rate"] * parts[0].schedule if parts else None


def with_hyperparams(opt_state: Any, numbers: Mapping[str, Any]) -> Any:
    """`opt_state` with some numbers replaced, in every OptimizerState inside it.

    Args:
        numbers: scalars or, for a stacked state, arrays with its leading axis.

    Raises UserError for a number that the optimizer does not have.
    """
    known = {name for part in _parts(opt_state) for name in part.hyperparams}
    for name in numbers:
        if name not in known:
            raise UserError(
                f"this optimizer has no array {name!r}, only {', '.join(sorted(known))}; what is "
                "None in its config cannot become a number afterwards."
            )

    def replaced(node: Any) -> Any:
        if not isinstance(node, OptimizerState):
            return node
        new = {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}
        return node._replace(hyperparams={**node.hyperparams, **new})

    return jax.tree.map(replaced, opt_state, is_leaf=_is_ours)


def _is_ours(node: Any) -> bool:
    return isinstance(node, OptimizerState)


def _parts(opt_state: Any) -> list[OptimizerState]:
    return [part for part in jax.tree.leaves(opt_state, is_leaf=_is_ours) if _is_ours(part)]
