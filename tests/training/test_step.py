"""One step: who trains, accumulation, hooks, optimizers, and several devices against one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.training import (
    MeshConfig,
    OptimizerConfig,
    chunked_loss,
    init_state,
    make_mesh,
    make_optimizer,
    make_step,
    mesh,
    place_batch,
    shardings,
    shardings_of,
    stream,
)

LOSS = functools.partial(chunked_loss, tiny.MODEL, chunk=32)
TX = make_optimizer(OptimizerConfig(learning_rate=1e-2, clip_norm=1.0, weight_decay=0.1), 20)


def run(steps=3, *, method=tiny.METHOD, tx=TX, accumulate=1):
    params = tiny.params()
    step = make_step(LOSS, method, tx, accumulate=accumulate)
    state, frozen = init_state(method, params, tx), method.dropped(params)
    history = []
    for i in range(steps):
        state, metrics = step(frozen, state, tiny.batch(i))
        history.append({k: float(v) for k, v in metrics.items()})
    return state, history, frozen


@pytest.fixture(scope="module")
def reference():
    return run()


def test_only_trainable_leaves_have_gradient_and_optimizer_state(reference):
    state, history, frozen = reference
    tiny.same(frozen, tiny.METHOD.dropped(tiny.params()))
    paths = set(state.trainable)
    assert paths == {
        "layers[0:2]/attention/query/kernel",
        "layers[0:2]/attention/value/kernel",
        "final_norm/scale",
    }
    trained = sum(x.size for x in jax.tree.leaves(state.trainable))
    moments = [x.size for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(moments) == 2 * trained
    assert history[-1]["loss"] < history[0]["loss"] * 1.1 and history[-1]["finite"] == 1.0
    assert history[0]["learning_rate"] == pytest.approx(1e-2)
    assert history[0]["tokens"] == np.sum(tiny.batch(0)["loss_mask"])


def test_accumulation_equals_one_big_batch(reference):
    state, history, _ = run(accumulate=4)
    tiny.close(state.trainable, reference[0].trainable)
    for one, other in zip(history, reference[1], strict=True):
        tiny.close(one, other)


def test_accumulation_must_divide():
    with pytest.raises(UserError, match="accumulate=3"):
        run(1, accumulate=3)


def test_dropout_key_differs_by_step_and_micro_batch():
    method = dataclasses.replace(tiny.METHOD, dropout=0.5)
    seen = []

    class Spy:
        def __getattr__(self, name):
            return getattr(method, name)

        def combine(self, frozen, trainable, *, key=None):
            jax.debug.callback(lambda k: seen.append(tuple(k.tolist())), jax.random.key_data(key))
            return method.combine(frozen, trainable, key=key)

    run(2, method=Spy(), accumulate=2)
    jax.effects_barrier()
    assert len(set(seen)) == 4


def test_hooks_are_honoured(reference):
    class Hooked:
        def __getattr__(self, name):
            return getattr(tiny.METHOD, name)

        def penalty(self, trainable):
            return 7.0 * jnp.sum(trainable["final_norm/scale"])

        def wrap_optimizer(self, tx):
            return optax.chain(tx, optax.scale(0.0))

        def after_update(self, state):
            return state.replace(step=state.step + 10)

    state, history, _ = run(1, method=Hooked())
    assert int(state.step) == 11
    assert history[0]["penalty"] == pytest.approx(7.0 * tiny.WIDTH)
    assert history[0]["grad_norm"] > 7.0 * tiny.WIDTH**0.5 * 0.5 > reference[1][0]["grad_norm"]
    tiny.same(state.trainable, tiny.METHOD.init(stream(0, "init"), tiny.params()))


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
    from lora_jax.training.optimizer import schedule_factor

    def values(**options):
        factor = schedule_factor(OptimizerConfig(**options), 10)
        return [round(float(factor(i)), 4) for i in (0, 1, 2, 6, 10)]

    assert values(schedule="constant", warmup_steps=2) == [0.5, 1, 1, 1, 1]
    assert values(schedule="linear", warmup_steps=2) == [0.5, 1, 1, 0.5, 0]
    assert values(schedule="cosine", warmup_steps=2) == [0.5, 1, 1, 0.5, 0]
    with pytest.raises(UserError, match="below the 10 steps"):
        values(warmup_steps=10)


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


@pytest.mark.parametrize(
    ("config", "accumulate"),
    [
        (MeshConfig(data=4), 1),
        (MeshConfig(fsdp=4), 1),
        (MeshConfig(tensor=4), 1),
        (MeshConfig(fsdp=2, tensor=2), 2),
    ],
    ids=str,
)
def test_four_devices_equal_one(reference, config, accumulate):
    params, devices = tiny.params(), make_mesh(config)
    frozen = tiny.METHOD.dropped(params)
    frozen = jax.device_put(frozen, shardings(frozen, devices))
    state = init_state(tiny.METHOD, params, TX, mesh=devices)
    layout = shardings_of(state)
    step = make_step(
        LOSS, tiny.METHOD, TX, mesh=devices, state_shardings=layout, accumulate=accumulate
    )
    for i in range(3):
        state, metrics = step(frozen, state, place_batch(tiny.batch(i), devices))
        tiny.close({k: float(v) for k, v in metrics.items()}, reference[1][i])
    tiny.close(jax.device_get(state.trainable), jax.device_get(reference[0].trainable), 2e-3, 2e-5)
    assert shardings_of(state) == layout


def test_where_things_live():
    params, devices = tiny.params(), make_mesh(MeshConfig(fsdp=2, tensor=2))
    placed = partition.flatten(shardings(params, devices))
    assert placed["layers[0:2]/attention/query/kernel"].spec == P(None, "fsdp", "tensor")
    assert placed["layers[0:2]/mlp/down/kernel"].spec == P(None, "tensor", "fsdp")
    assert placed["embed/embedding"].spec == P("tensor", "fsdp")
    trainable = tiny.METHOD.init(jax.random.key(0), params)
    factors = mesh.trainable_shardings(trainable, params, devices)
    query = factors["layers[0:2]/attention/query/kernel"]
    assert query["a"].spec == P(None, "fsdp", None) and query["b"].spec == P(None, None, "tensor")
    pure = mesh.trainable_shardings(trainable, params, make_mesh(MeshConfig(fsdp=4)))
    assert all(s.is_fully_replicated for s in jax.tree.leaves(pure))


def test_mesh_errors_say_what_to_do():
    with pytest.raises(UserError, match="needs 3 devices, but there are 4"):
        make_mesh(MeshConfig(data=3))
    odd = {"head": {"kernel": jnp.zeros((6, 4))}}
    with pytest.raises(UserError, match=r"length 6 does not divide over fsdp=4.*head"):
        shardings(odd, make_mesh(MeshConfig(fsdp=4)))
    with pytest.raises(UserError, match="multiple of 4"):
        place_batch(tiny.batch(0, rows=6), make_mesh(MeshConfig(data=4)))
    assert make_mesh().size == 1
