"""What all descendants of LoRA promise: start, merge, counts, files, packs."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from descendants import (
    BOTH,
    KEY,
    METHODS,
    batch,
    logits,
    moved,
    prepared,
    toy,
    toy_loss,
    toy_params,
)  # fmt: skip

import lora_jax as lj
from lora_jax import methods, partition
from lora_jax.pretrained import load_adapter, save_adapter
from lora_jax.sweeps import padding
from lora_jax.training import make_optimizer, step_function
from lora_jax.training.optimizer import OptimizerConfig
from lora_jax.training.step import init_state

# The fields in which members of a pack may differ, and whether padding with zeros is exact.
LORA = ("rank", "alpha", "targets", "scaling", "dropout", "start", "init_scale")
OWN_START = ("rank", "alpha", "targets", "scaling", "dropout")
PACKS = {
    "lora_plus": ((*LORA, "lr_ratio"), True),
    "dora": (LORA, True),
    "lora_fa": ((*LORA, "projection_seed"), True),
    "vera": (("rank", "targets", "dropout", "d_initial", "projection_seed"), True),
    "ia3": (("targets",), True),
    "pissa": (OWN_START, True),
    "olora": (OWN_START, True),
    "lora_ga": (OWN_START, True),
    "lora_xs": ((*OWN_START, "sigma"), True),
    "loha": (OWN_START, True),
    "eva": ((*LORA, "batches", "rho", "whiten"), True),
    "lokr": (OWN_START, False),
    "adalora": (("alpha", "dropout"), False),
    "relora": (("alpha", "scaling", "dropout"), False),
    "galore": ((), True),
}


@pytest.mark.parametrize("name", METHODS)
def test_start_merge_counts_and_packs(name):
    method, params = prepared(name), toy_params()
    start = method.init(KEY, params)
    before = logits({"params": params})
    at_start = logits(method.combine(params, start))
    near = 1e-3 if name == "lora_xs" else 1e-5  # which starts at sigma, not at zero
    np.testing.assert_allclose(at_start, before, atol=near * np.abs(before).max())

    trainable = moved(start)
    forward = logits(method.combine(params, trainable))
    assert np.abs(forward - before).max() > 0.01
    given = method.combine(params, trainable, numbers=method.numbers(params))
    np.testing.assert_allclose(logits(given), forward, atol=1e-5 * np.abs(forward).max())
    merged = method.merge(params, trainable)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(
        logits({"params": merged}), forward, atol=2e-5 * np.abs(forward).max()
    )
    # Nothing of a run's start is the base's own array, which the step would donate.
    held = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}
    assert not any(x.unsafe_buffer_pointer() in held for x in jax.tree.leaves(start))

    trained = {p: v for p, v in start.items() if not isinstance(v, dict)}
    trained |= {
        p: {k: x for k, x in v.items() if k != "delta"}
        for p, v in start.items()
        if isinstance(v, dict)
    }
    if name != "eva":  # which has layers of different ranks
        assert method.count(params).total == sum(x.size for x in jax.tree.leaves(trained))
    assert (method.numeric, method.padding_exact) == PACKS[name]


def test_every_registered_descendant_is_tested():
    assert {type(m) for m in METHODS.values()} <= set(methods.METHODS.values())
    assert set(METHODS) == set(PACKS)


BIG = {"pissa": (BOTH, "mlp/"), "ia3": (r"attention/", r"mlp/")}


@pytest.mark.parametrize("name", [n for n, (f, exact) in PACKS.items() if exact and f])
def test_padding_is_exact_under_training(name):
    """A member trained in the hull of itself and a larger one is the member trained alone."""
    params, small = toy_params(), prepared(name)
    changes = {"targets": BIG.get(name, (BOTH, "mlp/"))}
    if "rank" in small.numeric and name not in ("eva", "lora_ga"):
        changes["rank"] = 3 if name != "vera" else 5
    if name == "lora_ga":
        changes["rank"] = 3
    large = type(small)(**{**_fields(METHODS[name]), **changes})
    large = large.prepare(lj.adapt(toy), params, [batch(i) for i in range(2)])
    tx = make_optimizer(OptimizerConfig(learning_rate=0.01, weight_decay=0.1), 10)
    alone, other = (init_state(m, params, tx, seed=s) for m, s in ((small, 0), (large, 1)))
    hull = padding.hull([alone.trainable, other.trainable])
    padded = alone.replace(
        trainable=padding.pad(alone.trainable, hull),
        numbers=padding.pad(
            alone.numbers, padding.hull([alone.numbers, other.numbers])
        ) if alone.numbers else {},
        opt_state=padding.pad(
            alone.opt_state, jax.eval_shape(large.wrap_optimizer(tx).init, hull)
        ),
    )  # fmt: skip

    def train(method, state):
        step = jax.jit(step_function(toy_loss, method, tx))
        for i in range(3):
            state, _ = step(params, state, batch(i))
        return state.trainable

    want, got = train(small, alone), train(large, padded)
    inside = padding.cut({p: got[p] for p in want}, want)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
    back = padding.pad(inside, hull)  # zeros where the padding is
    for path, value in got.items():
        for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(back[path]), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[np.asarray(b) == 0], 0)


def _fields(method):
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


@pytest.mark.parametrize("name", METHODS)
def test_own_form_of_a_foreign_model(tmp_path, name):
    """A model without Hugging Face names: the adapter comes back in our own form."""
    method, params = prepared(name), toy_params()
    trainable = moved(method.init(KEY, params))
    method, trainable = method.settle(params, trainable)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PEFT does not read it
        save_adapter(tmp_path / "a", object(), method, trainable, params=params)
    again, loaded = load_adapter(tmp_path / "a", object(), params)
    assert again == method
    jax.tree.map(np.testing.assert_array_equal, loaded, trainable)
    want = logits(method.combine(params, trainable))
    np.testing.assert_allclose(logits(again.combine(params, loaded)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vera", "loha", "lokr", "adalora"])
def test_only_matrices(name):
    params = {"w": jnp.ones((3, 4, 5))}
    method = type(METHODS[name])(rank=2, targets="w$", layouts=((".*", "ioo"),))
    with pytest.raises(lj.UserError, match="adapts matrices"):
        method.init(KEY, params)


@pytest.mark.parametrize("name", ["pissa", "lora_xs", "vera", "loha", "adalora", "lokr"])
def test_a_start_that_does_not_exist_is_refused(name):
    with pytest.raises(lj.UserError, match="leave .*(start|it)"):
        type(METHODS[name])(start="gaussian")


@pytest.mark.parametrize("name", ["pissa", "dora", "lora_ga", "lora_xs"])
def test_unmerging_what_cannot_be(name):
    with pytest.raises(lj.UserError, match="keep the base"):
        prepared(name).unmerge(toy_params(), {})


@pytest.mark.parametrize("name", ["lora_plus", "lora_fa", "vera", "loha", "relora"])
def test_unmerge(name):
    method, params = prepared(name), toy_params()
    trainable = moved(method.init(KEY, params))
    back = method.unmerge(method.merge(params, trainable), trainable)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bare_optimizers_work_too():
    """wrap_optimizer takes any optax transformation."""
    params = toy_params()
    for name in ("lora_plus", "adalora", "relora", "galore"):
        method = prepared(name)
        trainable = method.init(KEY, params)
        tx = method.wrap_optimizer(optax.sgd(0.1))
        updates, _ = tx.update(trainable, tx.init(trainable), trainable)
        assert jax.tree.structure(updates) == jax.tree.structure(trainable)
        assert partition.flatten(updates)
