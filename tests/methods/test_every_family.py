"""Every method on every family: a training step that is its own, or an error that says why not."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import site_models

import lora_jax as lj
from lora_jax import partition
from lora_jax.methods import METHODS, LoRA, data_driven
from lora_jax.models.bert import Bert, BertConfig
from lora_jax.models.lenet import LeNet, LeNetConfig
from lora_jax.models.mlp import Mlp, MlpConfig
from lora_jax.training import chunked_loss, classification_loss, init_state, step_function

TX = optax.sgd(0.1)
TEXT: dict[str, Any] = {
    "llama": site_models.MODELS["llama"],
    "gpt2": site_models.MODELS["gpt2"],
    "bert with a language head": Bert(BertConfig(**site_models.SIZES, head="lm")),
    "bert with a class head": site_models.MODELS["bert"],
}
IMAGES: dict[str, Any] = {"mlp": Mlp(MlpConfig(widths=(6, 6))), "lenet": LeNet(LeNetConfig())}
FAMILIES = {**TEXT, **IMAGES}

# What a method needs beside its defaults on so small a model.
TOKENS: dict[str, dict[str, Any]] = {
    **{name: {"size": 3} for name in ("adapter_h", "adapter_l", "adapter_p")},
    "adapter_d": {"size": 3, "drop": 1},
    "prefix_tuning": {"length": 2, "hidden": 3},
    "p_tuning_v2": {"length": 2, "train": ()},
    "prompt_tuning": {"length": 2},
    **{n: {"prefix": 2, "infix": 1} for n in ("prefix_embedding", "prefix_layer")},
    **{
        n: {"rank": 2, "prefix": 2, "infix": 1}
        for n in ("lora_prefix_embedding", "lora_prefix_layer")
    },
    "ft_top": {"layers": 1},
}
"""Methods that act on activations or layers, which classifiers of images do not have."""
PLAIN: dict[str, dict[str, Any]] = {
    "full": {}, "bitfit": {}, "head_only": {}, "galore": {"rank": 2}, "subspace": {"dimension": 9},
    "ia3": {}, "vera": {"rank": 4}, "adalora": {"rank": 3, "target_rank": 2},
    **{n: {"rank": 2} for n in ("lora", "lora_plus", "dora", "lora_fa", "pissa", "olora", "loha",
                                "lokr", "lora_xs", "relora", "eva", "lora_ga")},
}  # fmt: skip
"""Methods on weights."""
EVERYWHERE = ("full", "bitfit", "head_only", "subspace")
"""Those whose default choice of weights suits classifiers of images too."""

REFUSED = {
    ("llama", "bitfit"): "trains biases, and this model has none",
    ("llama", "head_only"): "no head of its own",
    ("gpt2", "head_only"): "no head of its own",
    **{(f, n): "needs a model with sites" for f in IMAGES for n in TOKENS},
    **{(f, "ft_top"): "needs layers in a stack" for f in IMAGES},
    **{(f, "eva"): "its task must be of text" for f in IMAGES},
}


def test_every_method_is_here() -> None:
    assert set(TOKENS) | set(PLAIN) == set(METHODS)


def method_of(family: str, name: str) -> Any:
    options = dict(TOKENS.get(name) or PLAIN[name])
    if family in IMAGES and name not in EVERYWHERE and hasattr(METHODS[name], "targets"):
        options["targets"] = (r"hidden_\d/kernel$",)
    if family in IMAGES and name == "ia3":
        options["feedforward"] = ()
    return METHODS[name](**options).scheduled(10)


def batch_of(family: str, method: Any, params: Any) -> dict[str, Any]:
    labels = {"labels": np.array([1, 0]), "weights": np.ones(2, np.float32)}
    if family in IMAGES:
        draw = np.random.default_rng(0)
        return {"images": draw.normal(size=(2, 28, 28, 1)).astype(np.float32), **labels}
    tokens = site_models.TOKENS.astype(np.int32)
    new = np.asarray(method.placeholders(params), np.int32)
    mask = np.insert(np.ones(tokens.shape, np.float32), [3] * len(new), 0.0, axis=1)
    tokens = np.insert(tokens, [3] * len(new), new, axis=1)
    if TEXT[family].config.head == "lm":
        return {"tokens": tokens, "loss_mask": mask}
    return {"tokens": tokens, **labels}


def loss_of(family: str) -> Any:
    lm = family in TEXT and TEXT[family].config.head == "lm"
    return functools.partial(chunked_loss if lm else classification_loss, FAMILIES[family])


@functools.cache
def shapes_of(family: str) -> Any:
    inputs = batch_of(family, lj.LoRA(), {})
    x = inputs["tokens" if family in TEXT else "images"]
    return jax.eval_shape(FAMILIES[family].init, jax.random.key(0), x)["params"]


def stepping(family: str, method: Any, touched: set[str]) -> Any:
    """(params, batch) -> (metrics, trainable before and after); paths that differ to `touched`."""

    def run(params: Any, batch: Any) -> Any:
        params = method.arrange(params)
        own = method
        if method.name == "lora_ga" and method._start is None:
            # In place of what a look at data gives, which here is shapes alone.
            plain = LoRA(rank=2, targets=method.targets)
            own = data_driven.with_start(method, plain.init(jax.random.key(0), params))
        state, frozen = init_state(own, params, TX), own.frozen(params)
        new, metrics = step_function(loss_of(family), own, TX)(frozen, state, batch)
        old = partition.flatten(frozen)
        made = own.combine(frozen, new.trainable, numbers=new.numbers)["params"]
        touched.update(p for p, x in partition.flatten(made).items() if x is not old[p])
        return metrics, state.trainable, new.trainable

    return run


def check_touched(method: Any, touched: set[str], trainable: Any) -> None:
    """The model differs at the method's own leaves and nowhere else."""
    if method.name == "subspace":
        assert touched  # the coordinates are of all leaves
    elif method.name in TOKENS and method.name != "ft_top":
        assert touched == {p for p in trainable if p in touched}
    elif method.name == "ia3":  # a unit's factor is of its bias too
        assert {partition.module(p) for p in touched} == set(map(partition.module, trainable))
    else:
        assert touched == set(trainable)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step(family: str, name: str) -> None:
    """Traced, as a compiler would get it: shapes tell all that depends on the family."""
    method, params = method_of(family, name), shapes_of(family)
    touched: set[str] = set()

    def run() -> Any:
        batch = batch_of(family, method, params)
        if name == "eva" and family in IMAGES:  # its look at data comes first
            full = jax.tree.map(lambda x: jnp.ones(x.shape), params)
            return method.prepare(lj.adapt(FAMILIES[family].apply), full, [batch])
        return jax.eval_shape(stepping(family, method, touched), params, batch)

    if (family, name) in REFUSED:
        with pytest.raises(lj.UserError, match=REFUSED[family, name]):
            run()
        return
    metrics, before, after = run()
    assert metrics["loss"].shape == () and jax.tree.leaves(before)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )
    check_touched(method, touched, after)


# Numbers do not depend on the family as shapes do: each method's on one that compiles fast.
NUMBERS = {
    **{name: "mlp" for name in PLAIN if name != "eva"},
    **dict(zip(["eva", *TOKENS], [*TEXT] * 4, strict=False)),
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_step_in_numbers(name: str) -> None:
    """A finite loss, parameters that move, and stay finite."""
    family = NUMBERS[name]
    method, shapes = method_of(family, name), shapes_of(family)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.3, x.shape), x.dtype), shapes)
    batch = batch_of(family, method, params)
    if name in ("eva", "lora_ga"):
        method = method.prepare(lj.adapt(FAMILIES[family].apply), params, [batch])
    run = jax.jit(stepping(family, method, set()))
    metrics, before, after = run(params, batch)
    assert metrics["finite"] == 1.0 and metrics["grad_norm"] > 0
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), before, after)
    assert any(jax.tree.leaves(moved))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
