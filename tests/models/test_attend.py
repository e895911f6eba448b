"""Attention of our own, against `jax.nn.dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.attention import attend, attention_masks

B, T, N, K, H = 2, 5, 6, 3, 4


@pytest.fixture(params=["causal", "padded", "everything", "one query"])
def case(request: pytest.FixtureRequest) -> tuple[list[jax.Array], jax.Array | None]:
    """([q, k, v], mask) with two query heads a key head."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
    if request.param == "one query":
        shapes[0] = (B, 1, N, H)
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    seen = jnp.arange(T)[None] < jnp.array([[T], [2]])
    masks = {
        "causal": attention_masks(T, T),
        "padded": attention_masks(T, T, attention_mask=seen, causal=False),
        "one query": attention_masks(1, T, attention_mask=seen, causal=False),
    }
    return arrays, masks.get(request.param)


def scalar(attention: Callable[..., jax.Array], mask: jax.Array | None) -> Callable:
    """A loss that weighs all outputs differently."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        y = attention(q, k, v, mask=mask)
        return jnp.sum(jnp.sin(y + jnp.arange(y.size).reshape(y.shape)))

    return loss


def near(one: object, other: object) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_values_and_derivatives_are_jax_s(case: tuple) -> None:
    arrays, mask = case
    near(attend(*arrays, mask), jax.nn.dot_product_attention(*arrays, mask=mask))
    mine, theirs = (scalar(f, mask) for f in (attend, jax.nn.dot_product_attention))
    gradients = [jax.grad(f, argnums=(0, 1, 2)) for f in (mine, theirs)]
    near(*(f(*arrays) for f in gradients))
    # Forward over reverse: a Hessian's product, as curvature and sensitivities take it.
    directions = [jnp.cos(x) for x in arrays]
    near(*(jax.jvp(f, arrays, directions)[1] for f in gradients))
