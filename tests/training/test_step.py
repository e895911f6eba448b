"""One step: who trains, accumulation, hooks and seeds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lora_jax.errors import UserError
from lora_jax.training import (
    OptimizerConfig,
    chunked_loss,
    init_state,
    make_optimizer,
    make_step,
    stream,
)

LOSS = functools.partial(chunked_loss, tiny.MODEL, chunk=32)
TX = make_optimizer(OptimizerConfig(learning_rate=1e-2, clip_norm=1.0, weight_decay=0.1), 20)


def run(steps=3, *, method=tiny.METHOD, tx=TX, accumulate=1):
    params = tiny.params()
    step = make_step(LOSS, method, tx, accumulate=accumulate)
    state, frozen = init_state(method, params, tx), method.frozen(params)
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
    tiny.same(frozen, tiny.METHOD.frozen(tiny.params()))
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

        def combine(self, frozen, trainable, *, key=None, **options):
            jax.debug.callback(lambda k: seen.append(tuple(k.tolist())), jax.random.key_data(key))
            return method.combine(frozen, trainable, key=key, **options)

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


def test_each_stream_has_a_seed_of_its_own():
    one = init_state(tiny.METHOD, tiny.params(), TX, seed=3)
    other = init_state(tiny.METHOD, tiny.params(), TX, seed=3, dropout_seed=7)
    tiny.same(one.trainable, other.trainable)
    assert one.keys["dropout"] == stream(3, "dropout") != other.keys["dropout"]
    assert other.keys["dropout"] == stream(7, "dropout")
