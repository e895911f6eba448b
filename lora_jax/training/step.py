"""One training step: frozen parameters in, a new state and metrics out.

`frozen` is an argument of its own: never donated, never differentiated, and with no optimizer
state. Only `State` is donated.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.errors import UserError
from lora_jax.training import mesh as meshes
from lora_jax.training.optimizer import current_learning_rate

Batch = Mapping[str, Any]
LossFn = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
"""(variables, batch) -> (sum of weighted losses, sum of weights)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that a step changes.

    Attributes:
        step: int32 scalar, number of updates done.
        trainable: the method's tree.
        opt_state: of the optimizer, over `trainable` alone.
        keys: typed random keys by stream name; constant, steps fold their number in.
        numbers: what `method.combine` needs besides `trainable` (scales, rates); constant.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    keys: dict[str, jax.Array]
    numbers: Any = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> State:
        return dataclasses.replace(self, **changes)


def stream(seed: int, name: str) -> jax.Array:
    """The key of a named stream ("init", "data", "dropout"): the same whatever others exist."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def init_state(
    method: Any,
    params: Any,
    tx: optax.GradientTransformation,
    *,
    seed: int = 0,
    dropout_seed: int | None = None,
    trainable: Any = None,
    mesh: Mesh | None = None,
    rules: meshes.ShardingRules = meshes.DEFAULT_RULES,
) -> State:
    """The state before the first step, on the mesh if one is given.

    Args:
        tx: the plain optimizer; the method's `wrap_optimizer` is applied here and in `make_step`.
        seed: of the method's start.
        dropout_seed: of the dropout masks; None: `seed`.
        trainable: used in place of `method.init` (a loaded adapter, a data-driven start).
    """
    if trainable is None:
        trainable = method.init(stream(seed, "init"), params)
    tx = method.wrap_optimizer(tx)
    # A copy of each leaf: the step donates the state, and must not donate the caller's arrays.
    state = State(
        step=jnp.zeros((), jnp.int32),
        trainable=jax.tree.map(jnp.copy, trainable),
        opt_state=tx.init(trainable),
        keys={"dropout": stream(seed if dropout_seed is None else dropout_seed, "dropout")},
        numbers=jax.tree.map(jnp.array, method.numbers(params)),
    )
    if mesh is None:
        return state
    return jax.device_put(state, state_shardings(state, params, tx, mesh, rules))


def state_shardings(
    state: State,
    params: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: meshes.ShardingRules = meshes.DEFAULT_RULES,
) -> State:
    """Where a state (of arrays or ShapeDtypeStructs) lives: a State of NamedShardings.

    `tx` is the optimizer that made it, wrapped by the method; `params` the base's leaves.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = meshes.trainable_shardings(state.trainable, params, mesh, rules)
    return jax.tree.map(lambda _: everywhere, state).replace(
        trainable=placed,
        opt_state=meshes.optimizer_shardings(tx, state.trainable, placed, mesh),
    )


def shardings_of(state: State) -> State:
    """The shardings of a state's arrays: what `make_step` keeps its results at."""
    return jax.tree.map(lambda x: x.sharding, state)


def make_step(
    loss_fn: LossFn,
    method: Any,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    state_shardings: State | None = None,
) -> Callable[[Any, State, Batch], tuple[State, dict[str, jax.Array]]]:
    """`step_function`, jitted; the state is donated.

    Args:
        mesh, state_shardings: where results live; from `shardings_of(state)` with a mesh.
    """
    if mesh is not None and state_shardings is None:
        raise UserError("make_step with a mesh needs state_shardings=shardings_of(state).")
    step = step_function(loss_fn, method, tx, accumulate=accumulate)
    if mesh is None:
        return jax.jit(step, donate_argnums=1)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=1, out_shardings=(state_shardings, everywhere))


def step_function(
    loss_fn: LossFn, method: Any, tx: optax.GradientTransformation, *, accumulate: int = 1
) -> Callable[[Any, State, Batch], tuple[State, dict[str, jax.Array]]]:
    """`step(frozen, state, batch) -> (state, metrics)`: pure, to be jitted or mapped.

    The objective is sum(loss) / sum(weight) over the WHOLE batch plus `method.penalty`, so
    accumulation over micro-batches with unequal weights equals one big batch. All numbers of the
    run come with the state: `method` and `tx` give the structure alone.

    Args:
        loss_fn: from the method's variables, which may hold weights: it runs the model through
            `lora_jax.adapt`, as the losses of `training.loss` do.
        accumulate: micro-batches a step; must divide the rows of a batch.

    Metrics, float32 scalars: loss (without penalty), penalty, grad_norm, learning_rate (if known),
    tokens (sum of weights), finite (1 if loss and gradient are).
    """
    if accumulate < 1:
        raise UserError(f"accumulate={accumulate} must be at least 1.")
    tx = method.wrap_optimizer(tx)

    def summed(trainable: Any, frozen: Any, numbers: Any, micro: Batch, key: jax.Array):
        return loss_fn(method.combine(frozen, trainable, key=key, numbers=numbers), micro)

    gradient = jax.value_and_grad(summed, has_aux=True)

    def total(frozen: Any, state: State, batch: Batch):
        """(sum of losses, sum of weights, gradient of the sum of losses)."""
        key = jax.random.fold_in(state.keys["dropout"], state.step)

        def one(micro: Batch, number: Any):
            key_micro = jax.random.fold_in(key, number)
            (loss, weight), grads = gradient(
                state.trainable, frozen, state.numbers, micro, key_micro
            )
            return loss, weight, grads

        if accumulate == 1:
            return one(batch, 0)
        parts = {name: _split(name, x, accumulate) for name, x in batch.items()}
        zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))

        def body(sums: Any, x: Any):
            return jax.tree.map(jnp.add, sums, one(*x)), None

        return jax.lax.scan(body, zero, (parts, jnp.arange(accumulate)))[0]

    def step(frozen: Any, state: State, batch: Batch):
        loss, weight, grads = total(frozen, state, batch)
        safe = jnp.where(weight > 0, weight, 1.0)
        penalty, penalty_grads = jax.value_and_grad(
            lambda trainable: jnp.asarray(method.penalty(trainable), jnp.float32)
        )(state.trainable)
        grads = jax.tree.map(lambda g, p: g / safe.astype(g.dtype) + p, grads, penalty_grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        metrics = {
            "loss": loss / safe,
            "penalty": penalty,
            "grad_norm": optax.tree.norm(grads),
            "tokens": weight,
        }
        finite = jnp.isfinite(metrics["loss"] + penalty) & jnp.isfinite(metrics["grad_norm"])
        metrics["finite"] = finite.astype(jnp.float32)
        if (rate := current_learning_rate(opt_state)) is not None:
            metrics["learning_rate"] = rate
        state = state.replace(
            step=state.step + 1,
            trainable=optax.apply_updates(state.trainable, updates),
            opt_state=opt_state,
        )
        return method.after_update(state), metrics

    return step


def _split(name: str, x: jax.Array, parts: int) -> jax.Array:
    """[B, …] -> [parts, B / parts, …]. Rows are dealt, so that each device deals its own rows."""
    if x.shape[0] % parts:
        raise UserError(
            f"a batch of {x.shape[0]} rows ({name}) does not divide into accumulate={parts} "
            "micro-batches; choose a batch size that is a multiple of it."
        )
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
