"""Adapters: parameters, identity at the start, where they act, padding, and a whole run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from site_models import (
    KEY,
    MODELS,
    PAPERS,
    TOKENS,
    D,
    L,
    count,
    differ,
    moved,
    near,
    params_of,
    run,
    shapes,
)

import lora_jax as lj
from lora_jax import training
from lora_jax.methods import Method
from lora_jax.methods.adapters import AdapterD, AdapterH, AdapterL, AdapterP, Bottleneck
from lora_jax.sweeps import padding
from lora_jax.training.loss import chunked_loss
from lora_jax.training.step import step_function

NORMS = (r"^layers/.*_norm/",)


@pytest.mark.parametrize(
    ("paper", "method", "wanted"),
    [
        ("GPT-3", AdapterH(size=1), 7_078_080),
        ("GPT-3", AdapterH(size=64), 304_361_472),
        ("GPT-2 M", AdapterL(size=6), 368_784),
        ("GPT-2 L", AdapterL(size=248), 23_002_848),
        ("GPT-2 M", AdapterH(size=112), 11_064_576),  # published 11.09M: 24 d more
        ("RoBERTa-large", AdapterP(size=16), 811_392),
        ("RoBERTa-large", AdapterH(size=8), 835_968),
        ("RoBERTa-large", AdapterH(size=64), 6_343_680),  # published 6.0M
        ("BERT-large", AdapterH(size=64, train=NORMS), 6_441_984),
    ],
)
def test_counts_of_the_papers(paper: str, method: Method, wanted: int) -> None:
    assert count(paper, method) == wanted


@pytest.mark.parametrize(("drop", "wanted"), [(3, 892_224), (9, 297_408)])
def test_counts_of_adapterdrop(drop: int, wanted: int) -> None:
    """Adapters of 64 units in 9 and in 3 layers: the 0.9M and 0.3M that the LoRA paper prints."""
    method = AdapterD(size=64, drop=drop)
    cut = jax.eval_shape(method.arrange, shapes(*PAPERS["RoBERTa-base"]))
    assert method.count(cut).total == wanted


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("cls", [AdapterH, AdapterL])
def test_the_start_is_the_model_and_training_moves_it(cls: type, name: str) -> None:
    params = params_of(name)
    method = cls(size=3)
    trainable = method.init(KEY, params)
    base = run(name, {"params": params})
    np.testing.assert_array_equal(run(name, method.combine(params, trainable)), base)
    differ(run(name, method.combine(params, moved(trainable))), base)
    small = dataclasses.replace(method, start="normal")
    small = run(name, method.combine(params, small.init(KEY, params)))
    assert 0 < np.abs(small - base).max() < 0.05 * np.abs(base).max()


def test_members_and_remat_change_nothing() -> None:
    """Gradients of two adapters under vmap, with remat, are those of each alone without."""
    params, method = params_of("llama"), AdapterH(size=3)
    starts = [moved(method.init(KEY, params), seed=seed) for seed in (1, 2)]

    def gradient(model: Any) -> Any:
        def loss(t: Any) -> jax.Array:
            out = lj.adapt(model.apply)(method.combine(params, t), TOKENS)
            return jnp.mean(jnp.square(out))

        return jax.grad(loss)

    plain = MODELS["llama"]
    remat = type(plain)(dataclasses.replace(plain.config, remat="full"))
    together = jax.jit(jax.vmap(gradient(remat)))(padding.stack(starts))
    alone = jax.jit(gradient(plain))
    for index, start in enumerate(starts):
        got = jax.tree.leaves(padding.take(together, index))
        for a, b in zip(got, jax.tree.leaves(alone(start)), strict=True):
            near(a, b, 1e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_bottleneck_is_the_papers(activation: str) -> None:
    rng = np.random.default_rng(0)
    x, down, up = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, D), (D, 4), (4, D)))
    b, c, scale, bias = (rng.normal(size=n).astype(np.float32) for n in (4, D, D, D))
    f = {
        "relu": lambda v: np.maximum(v, 0),
        "gelu": np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2)))),
        "tanh": np.tanh,
    }[activation]
    params = {"down": down, "down_bias": b, "up": up, "up_bias": c}
    near(Bottleneck(activation)(params, jnp.asarray(x)), x + f(x @ down + b) @ up + c, 1e-5)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    params |= {"norm": {"scale": scale, "bias": bias}}
    want = x + f((normed * scale + bias) @ down + b) @ up + c
    near(Bottleneck(activation)(params, jnp.asarray(x)), want, 1e-5)
    low = Bottleneck(activation)(params, jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    near(low.astype(jnp.float32), want, 0.05)


def test_l_stands_on_what_the_last_layer_passes_on_and_p_before_the_sum() -> None:
    """Only the last layer's adapter moved: the rest of the model is as it was."""
    params = params_of("bert bare")
    base = run("bert bare", {"params": params})

    def last_alone(method: Method) -> tuple[dict, dict]:
        trainable = method.init(KEY, params)
        path = next(iter(trainable))
        after = moved(trainable)
        kept = jax.tree.map(lambda new, old: old.at[-1].set(new[-1]), after, trainable)
        return method.combine(params, kept), jax.tree.map(lambda x: x[-1], kept[path])

    variables, one = last_alone(AdapterL(size=3))
    near(run("bert bare", variables), Bottleneck("relu")(one, base))
    variables, one = last_alone(AdapterP(size=3))
    out = run("bert bare", variables)
    # The norm comes after the sum, so each token's mean and spread are still the norm's.
    norm = jax.tree.map(lambda x: x[-1], params[f"layers[0:{L}]"]["mlp_norm"])
    normed = (out - norm["bias"][None, None]) / norm["scale"][None, None]
    np.testing.assert_allclose(normed.mean(-1), 0.0, atol=1e-4)
    np.testing.assert_allclose(normed.std(-1), 1.0, atol=1e-3)
    differ(out, base)


def test_adapterdrop_is_adapters_that_do_nothing_below() -> None:
    params = params_of("gpt2")
    method, plain = AdapterD(size=3, drop=1), AdapterP(size=3)
    with pytest.raises(lj.UserError, match=r"method.arrange\(params\)"):
        method.init(KEY, params)
    cut = method.arrange(params)
    trainable = method.init(KEY, cut)
    assert list(trainable) == ["sites/layers[1:2]/mlp/out"]
    assert method.count(cut).total * 2 == plain.count(params).total
    after = moved(trainable)
    all_layers = plain.init(KEY, params)
    path = "sites/layers[0:2]/mlp/out"
    # The start does not depend on how the layers are cut.
    for a, b in zip(jax.tree.leaves(trainable), jax.tree.leaves(all_layers), strict=True):
        np.testing.assert_array_equal(a[0], b[1])
    top = next(iter(after.values()))
    same = {path: jax.tree.map(lambda a, b: a.at[1].set(b[0]), all_layers[path], top)}
    near(run("gpt2", method.combine(cut, after)), run("gpt2", plain.combine(params, same)))
    with pytest.raises(lj.UserError, match="layers are cut as"):
        method.combine(params, after)  # else these sites would go unseen
    with pytest.raises(lj.UserError, match="leaves no layer"):
        AdapterD(drop=2).init(KEY, params)


def test_a_smaller_adapter_padded_with_zeros_trains_alike() -> None:
    """What a sweep over sizes relies on: a member of size 2 in a slot of size 5."""
    params = params_of("gpt2")
    tx = training.make_optimizer(
        training.OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=1.0), 5
    )
    batch = {"tokens": TOKENS, "loss_mask": np.ones(TOKENS.shape, np.float32)}
    found, start = [], None

    def loss(variables: Any, b: Any) -> Any:
        return chunked_loss(MODELS["gpt2"], variables, b)

    for size in (2, 5):
        method = AdapterH(size=size, activation="gelu", start="normal", init_std=0.3)
        state = training.init_state(method, params, tx)
        if start is None:
            start = small = state
        else:
            state = padding.pad(start, state)
            np.testing.assert_array_equal(  # the smaller start is the larger one's beginning
                jax.tree.leaves(start.trainable)[0], jax.tree.leaves(state.trainable)[0][..., :2]
            )
        step = jax.jit(step_function(loss, method, tx))
        for _ in range(5):
            state, _ = step(params, state, batch)
        found.append(state.trainable)
    cut = padding.cut(found[1], small.trainable)
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(found[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    again = padding.pad(cut, found[1])
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_array_equal(a, b)  # nothing outside of the smaller one's shapes
    before, after = (jax.tree.leaves(t) for t in (small.trainable, found[0]))
    assert all(not np.allclose(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AdapterH(activation="geul"), "did you mean gelu"),
        (lambda: AdapterH(start="one"), "start must be"),
        (lambda: AdapterH(size=0), "at least 1"),
        (lambda: AdapterH().init(KEY, {"w": np.ones((2, 2))}), "needs a model with sites"),
        (lambda: AdapterH().init(KEY, {"layers[0:2]": {"w": np.ones((2, 2))}}), "other model"),
        (lambda: AdapterH().merge(params_of("gpt2"), {}), "cannot be merged"),
    ],
)
def test_bad_settings_say_what_to_do(build, message) -> None:
    with pytest.raises(lj.UserError, match=message):
        build()
