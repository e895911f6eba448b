"""A scoring head reads one position: the last layer, apart, computes that one and no other."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import MODELS, TOKENS, B, D, L, T, apply, draw, near, prefix, prompt

from lora_jax.models import Site
from lora_jax.pretrained.assemble import abstract_params
from lora_jax.pretrained.load import family_of

STACK, APART = f"layers[0:{L}]", (f"layers[0:{L - 1}]", f"layers[{L - 1}:{L}]")
LENGTHS = np.array([4, T])
MASK = (np.arange(T)[None] < LENGTHS[:, None]).astype(np.int32)


def whole(tree: Any) -> Any:
    """Both segments as one stack, whose last layer computes every position."""
    rest = {k: v for k, v in tree.items() if k not in APART}
    first, last = (tree[name] for name in APART)
    return {**rest, STACK: jax.tree.map(lambda *x: jnp.concatenate(x), first, last)}


@pytest.fixture(params=["llama", "gpt2", "bert", "roberta"], scope="module")
def scoring(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    base = MODELS[request.param]
    config = dataclasses.replace(base.config, head="classification", pad_id=3)
    model = type(base)(config)
    return model, draw(model)


def test_parameters_are_made_with_the_last_layer_apart(scoring: tuple) -> None:
    model, params = scoring
    assert {k for k in params if k.startswith("layers")} == set(APART)
    like = abstract_params(family_of(model).tensors(model.config))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, like)


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_one_position_gives_the_same_scores_and_gradients(scoring: tuple, mask: Any) -> None:
    model, params = scoring
    weights = np.random.default_rng(2).normal(size=(B, 2))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params: Any) -> Any:
        scores = model.apply({"params": params}, TOKENS, attention_mask=mask)
        return jnp.sum(scores * weights), scores

    (_, one), slopes = loss(params)
    (_, every), theirs = loss(whole(params))
    near(one, every)
    # A bias of keys has no effect, so a gradient of rounding alone: one scale for all leaves.
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(theirs))
    for got, want in zip(jax.tree.leaves(whole(slopes)), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * scale)


def test_prompts_and_prefixes_stand_in_front_of_it(scoring: tuple) -> None:
    model, params = scoring
    c = model.config
    rng = np.random.default_rng(3)

    def rows(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    keys = {name: rows(L, 2, c.num_kv_heads, c.head_dim) for name in ("key", "value")}
    embed = {"out": Site({"prompt": rows(3, D)}, prompt, 3)}
    both = {"embed": embed, STACK: {"attention": {"kv": Site(keys, prefix, 2)}}}
    parts: dict[str, Any] = {"embed": embed}
    for name, layers in zip(APART, (slice(0, L - 1), slice(L - 1, L)), strict=True):
        part = jax.tree.map(lambda x, s=layers: x[s], keys)
        parts[name] = {"attention": {"kv": Site(part, prefix, 2)}}
    one = apply(model, params, attention_mask=MASK, sites=parts)
    near(one, apply(model, whole(params), attention_mask=MASK, sites=both))


def test_hidden_states_are_whole_where_they_are_asked_for(scoring: tuple) -> None:
    model, params = scoring
    scores, hidden = apply(model, params, attention_mask=MASK, output_hidden_states=True)
    near(scores, apply(model, params, attention_mask=MASK))
    assert hidden.shape == (L + 1, B, T, D)
    assert apply(model, params, method="hidden").shape == (B, T, D)


def test_fewer_operations(scoring: tuple) -> None:
    model, params = scoring

    def flops(params: Any) -> float:
        # Unrolled: XLA counts the body of a loop once.
        flat = type(model)(dataclasses.replace(model.config, unroll=L))
        call = jax.jit(lambda p: flat.apply({"params": p}, TOKENS))
        return call.lower(params).compile().cost_analysis()["flops"]

    assert flops(params) < 0.9 * flops(whole(params))
