"""Optimizers against optax's, and their numbers as arrays that members of a pack vary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lora_jax.errors import UserError
from lora_jax.training import (
    OptimizerConfig,
    hyperparams,
    make_optimizer,
    optimizer,
    schedules,
    with_hyperparams,
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            OptimizerConfig("adamw", 0.1, weight_decay=0.3),
            lambda r: optax.adamw(r, weight_decay=0.3),
        ),
        (OptimizerConfig("adam", 0.1), optax.adam),
        (OptimizerConfig("sgd", 0.1, momentum=0.9), lambda r: optax.sgd(r, momentum=0.9)),
        (
            OptimizerConfig("lion", 0.1, b2=0.99, weight_decay=0.3),
            lambda r: optax.lion(r, weight_decay=0.3),
        ),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_optimizers_equal_optax(config, expected):
    def follow(tx):
        x = {"x": jnp.array([3.0, -2.0])}
        opt_state, update = tx.init(x), jax.jit(tx.update)
        for _ in range(10):
            updates, opt_state = update(jax.tree.map(lambda v: 2 * v, x), opt_state, x)
            x = optax.apply_updates(x, updates)
        return x

    ours = follow(make_optimizer(config, 10))
    tiny.close(ours, follow(expected(optax.linear_schedule(0.1, 0.0, 10))))


def test_schedules():
    def values(name):
        return [round(float(schedules.factor(name, i, 2, 10)), 4) for i in (0, 1, 2, 4, 6, 10)]

    assert values("constant") == [0.5, 1, 1, 1, 1, 1]
    assert values("linear") == [0.5, 1, 1, 0.75, 0.5, 0]
    assert values("cosine") == [0.5, 1, 1, 0.8536, 0.5, 0]
    with pytest.raises(UserError, match="below the 10 steps"):
        make_optimizer(OptimizerConfig(warmup_steps=10), 10)


def test_warmup_as_a_fraction():
    assert hyperparams(OptimizerConfig(warmup_fraction=0.06), 50)["warmup_steps"] == 3
    assert hyperparams(OptimizerConfig(warmup_fraction=0.07), 100)["warmup_steps"] == 7
    assert hyperparams(OptimizerConfig(warmup_fraction=0.01), 10)["warmup_steps"] == 1
    with pytest.raises(UserError, match="not both"):
        OptimizerConfig(warmup_fraction=0.1, warmup_steps=3)


def test_groups_multiply_per_layer_and_factor():
    config = OptimizerConfig(
        name="sgd",
        schedule="constant",
        learning_rate=1.0,
        groups=((r"layers/1/.*/b$", 16.0), (r"layers/0/attention/query$", 0.0)),
    )
    trainable = tiny.METHOD.init(jax.random.key(0), tiny.params())
    tx = make_optimizer(config, 5)
    ones = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = tx.update(ones, tx.init(trainable), trainable)
    query = updates["layers[0:2]/attention/query/kernel"]
    value = updates["layers[0:2]/attention/value/kernel"]
    assert [float(x) for x in query["b"][:, 0, 0]] == [0.0, -16.0]
    assert [float(x) for x in query["a"][:, 0, 0]] == [0.0, -1.0]
    assert [float(x) for x in value["b"][:, 0, 0]] == [-1.0, -16.0]
    bad = make_optimizer(OptimizerConfig(groups=(("quarry", 2.0),)), 5)
    with pytest.raises(UserError, match="'quarry' matches no"):
        bad.init(trainable)


def test_decay_groups():
    config = OptimizerConfig(
        name="sgd", schedule="constant", learning_rate=1.0, weight_decay=0.5,
        decay_groups=((r"scale$", 0.0), (r"layers/1/.*/b$", 3.0)),
    )  # fmt: skip
    trainable = jax.tree.map(jnp.ones_like, tiny.METHOD.init(jax.random.key(0), tiny.params()))
    tx = make_optimizer(config, 5)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = tx.update(zeros, tx.init(trainable), trainable)
    query = updates["layers[0:2]/attention/query/kernel"]
    assert [float(x) for x in query["b"][:, 0, 0]] == [-0.5, -1.5]
    assert float(query["a"][1, 0, 0]) == -0.5
    assert not np.any(updates["final_norm/scale"])
    bad = make_optimizer(dataclasses.replace(config, decay_groups=(("norm2", 0.0),)), 5)
    with pytest.raises(UserError, match="decay_groups: the pattern 'norm2'"):
        bad.init(trainable)


BASES = {
    "adamw": OptimizerConfig("adamw", 0.1, weight_decay=0.3, clip_norm=1.0, warmup_steps=2),
    "sgd": OptimizerConfig("sgd", 0.1, "cosine", weight_decay=0.3, momentum=0.5),
    # Lion keeps signs alone: with a slow moment its b1 would change none of them here.
    "lion": OptimizerConfig("lion", 0.1, "constant", warmup_steps=3, b2=0.5),
}
CHANGES = {
    "learning_rate": 0.03, "warmup_steps": 5, "weight_decay": 0.01, "b1": 0.1, "b2": 0.2,
    "eps": 1e-2, "clip_norm": 0.05, "momentum": 0.9,
}  # fmt: skip
X = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "v": jnp.ones(5)}


def follow(tx, state, x, steps=6):
    @jax.jit
    def step(x, state, i):
        # Gradients of changing sign: the moments' rates then matter to lion as well.
        updates, state = tx.update(jax.tree.map(lambda v: jnp.cos(3.0 * i + 9.0 * v), x), state, x)
        return optax.apply_updates(x, updates), state

    for i in range(steps):
        x, state = step(x, state, i)
    return x, state


@pytest.mark.parametrize("base", BASES)
def test_a_number_set_afterwards_equals_one_from_the_config(base):
    config = BASES[base]
    tx = make_optimizer(config, 10)
    untouched = follow(tx, tx.init(X), X)[0]
    names = [name for name in CHANGES if name in hyperparams(config, 10)]
    assert {"learning_rate", "warmup_steps", "weight_decay"} <= set(names)
    for name in names:
        wanted_tx = make_optimizer(dataclasses.replace(config, **{name: CHANGES[name]}), 10)
        wanted = follow(wanted_tx, wanted_tx.init(X), X)[0]
        found = follow(tx, with_hyperparams(tx.init(X), {name: CHANGES[name]}), X)[0]
        tiny.same(found, wanted)
        assert np.any(np.asarray(found["w"]) != np.asarray(untouched["w"])), name


def test_members_with_different_numbers_under_vmap():
    config = BASES["adamw"]
    tx = make_optimizer(config, 10)
    members = [
        {},
        {"learning_rate": 0.01, "warmup_steps": 4},
        {"b1": 0.5, "b2": 0.9, "eps": 1e-3, "clip_norm": 0.1, "weight_decay": 0.0},
    ]
    numbers = [{**hyperparams(config, 10), **member} for member in members]
    stacked = {name: jnp.array([n[name] for n in numbers]) for name in numbers[0]}
    states = with_hyperparams(jax.vmap(lambda _: tx.init(X))(jnp.arange(3)), stacked)
    xs = jax.tree.map(lambda x: jnp.stack([x] * 3), X)

    def one(x, state):
        return follow(tx, state, x)[0]

    found = jax.vmap(one)(xs, states)
    for i, member in enumerate(members):
        alone = one(X, with_hyperparams(tx.init(X), member))
        tiny.close(jax.tree.map(lambda x, i=i: x[i], found), alone, 1e-5, 1e-6)


def test_numbers_inside_a_wrapped_optimizer():
    tx = optax.chain(make_optimizer(BASES["adamw"], 10), optax.scale(2.0))
    state = with_hyperparams(tx.init(X), {"learning_rate": 0.5})
    _, state = tx.update(X, state, X)
    assert float(optimizer.current_learning_rate(state)) == 0.25  # first of two warm-up steps
    with pytest.raises(UserError, match="no array 'momentum'"):
        with_hyperparams(state, {"momentum": 0.5})
    assert optimizer.current_learning_rate(optax.adam(0.1).init(X)) is None


def test_clipping_is_over_all_leaves_together():
    tx = make_optimizer(OptimizerConfig("sgd", 1.0, "constant", clip_norm=1.0), 5)
    grads = {"w": jnp.full(1, 3.0), "v": jnp.full(1, 4.0)}
    updates, _ = tx.update(grads, tx.init(grads), grads)
    tiny.close(updates, {"w": jnp.full(1, -0.6), "v": jnp.full(1, -0.8)})


def test_moments_keep_their_precision():
    x = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = make_optimizer(OptimizerConfig(), 5)
    before = tx.init(x)
    _, after = tx.update(x, before, x)
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adan"}, "name 'adan'"),
        ({"schedule": "steps"}, "schedule 'steps'"),
        ({"name": "adam", "weight_decay": 0.1}, "adamw"),
        ({"momentum": 0.9}, "of sgd only"),
        ({"clip_norm": 0.0}, "above 0"),
        ({"warmup_steps": -1}, "not be negative"),
        ({"warmup_fraction": 1.0}, r"in \[0, 1\)"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**options)
