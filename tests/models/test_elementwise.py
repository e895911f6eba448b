"""Activations and norms with derivatives of their own: as jax's, forward, backward and twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.activations import ACTIVATIONS, gated
from lora_jax.models.norms import LayerNorm, RMSNorm

PLAIN: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
X = jnp.linspace(-6.0, 6.0, 240).reshape(8, 30) + 0.01  # not at relu's corner


def near(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def agree(ours: Callable[..., Any], theirs: Callable[..., Any], *args: jax.Array) -> None:
    """Values, reverse mode, forward mode, and the gradient of the gradient."""
    draw = tuple(jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(args))
    weight = jax.random.normal(jax.random.key(9), jax.eval_shape(ours, *args).shape)

    def total(f: Callable[..., Any], *xs: jax.Array) -> jax.Array:
        return jnp.sum(f(*xs) * weight)

    def slope(f: Callable[..., Any], *xs: jax.Array) -> jax.Array:
        found = jax.grad(total, argnums=tuple(range(1, 1 + len(xs))))(f, *xs)
        return sum(jnp.sum(g * d) for g, d in zip(found, draw, strict=True))

    every = tuple(range(1, 1 + len(args)))
    near(ours(*args), theirs(*args))
    for a, b in zip(
        jax.grad(total, every)(ours, *args), jax.grad(total, every)(theirs, *args), strict=True
    ):
        near(a, b)
    for a, b in zip(jax.jvp(ours, args, draw), jax.jvp(theirs, args, draw), strict=True):
        near(a, b)
    for a, b in zip(
        jax.grad(slope, every)(ours, *args), jax.grad(slope, every)(theirs, *args), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name: str) -> None:
    assert set(PLAIN) == set(ACTIVATIONS)
    agree(ACTIVATIONS[name], PLAIN[name], X)
    up = jax.random.normal(jax.random.key(3), X.shape)
    agree(gated(name), lambda x, u: PLAIN[name](x) * u, X, up)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (RMSNorm(1e-5, jnp.float32), nn.RMSNorm(epsilon=1e-5)),
        (LayerNorm(1e-5, jnp.float32), nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)),
    ],
    ids=["rms", "layer"],
)
def test_norms(ours: nn.Module, theirs: nn.Module) -> None:
    params = theirs.init(jax.random.key(0), X)["params"]
    params = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), params)
    leaves, tree = jax.tree.flatten(params)
    assert jax.tree.structure(ours.init(jax.random.key(0), X)["params"]) == tree

    def apply(model: nn.Module) -> Callable[..., Any]:
        return lambda x, *some: model.apply({"params": jax.tree.unflatten(tree, some)}, x)

    agree(apply(ours), apply(theirs), X, *leaves)


def residuals(f: Callable[..., Any], *args: jax.Array) -> int:
    """Arrays as large as the input that reverse mode keeps."""
    _, pull = jax.vjp(f, *args)
    return sum(x.shape == args[0].shape for x in jax.tree.leaves(pull))


def test_few_arrays_are_kept_for_the_way_back() -> None:
    assert residuals(ACTIVATIONS["gelu"], X) == 1 < residuals(PLAIN["gelu"], X)
    assert residuals(gated("silu"), X, X) == 2 < residuals(lambda x, u: jax.nn.silu(x) * u, X, X)
    norm = RMSNorm(1e-5, jnp.float32)
    frozen = norm.init(jax.random.key(0), X)
    assert residuals(lambda x: norm.apply(frozen, x), X) == 1
