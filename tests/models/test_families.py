"""What every family promises: sites, segments, packing, remat, dropout, bfloat16, LoRA."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import (
    MODELS,
    TOKENS,
    B,
    D,
    L,
    T,
    apply,
    cut,
    differ,
    draw,
    near,
    params_of,
    prefix,
    prompt,
    replaced,
    scaled,
)

import lora_jax as lj
from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import METHODS
from lora_jax.models import FAMILIES, Site, family_for

STACK = f"layers[0:{L}]"
HARD = [5, 9, 30]  # a soft prompt or prefix that equals these tokens has a known effect


@pytest.fixture(params=["llama", "gpt2", "bert"])
def family(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return MODELS[request.param], params_of(request.param)


def changed(model: Any, **options: Any) -> Any:
    return type(model)(dataclasses.replace(model.config, **options))


def prompt_of(params: Any) -> dict[str, Any]:
    rows = params["embed"]["embedding"][jnp.array(HARD)]
    return {"embed": {"out": Site({"prompt": rows}, prompt, len(HARD))}}


def behind(model: Any, tokens: Any = TOKENS) -> np.ndarray:
    return np.concatenate([np.tile(HARD, (len(tokens), 1)), tokens], axis=1)


def test_every_module_is_here() -> None:
    of_text = {f.module for f in FAMILIES.values() if f.reads == "tokens"}
    assert {type(m) for m in MODELS.values()} == of_text


@pytest.mark.parametrize("name", MODELS)
def test_init_tree_has_the_table_s_shapes(name: str) -> None:
    model = MODELS[name]
    expected = {}
    for spec in family_for(model.config.model_type).tensors(model.config):
        for path, (start, stop) in spec.segments():
            rows = (stop - start,) if spec.layers else ()
            expected[path] = (*rows, *spec.our_shape)
    assert {p: x.shape for p, x in partition.flatten(params_of(name)).items()} == expected


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_hidden_then_logits_is_call(name: str) -> None:
    model, params = MODELS[name], params_of(name)
    hidden = apply(model, params, method="hidden")
    assert hidden.shape == (B, T, D)
    near(apply(model, params, hidden, method="logits"), apply(model, params), 1e-5)


def test_a_scoring_model_has_no_logits_and_no_packed_rows() -> None:
    model, variables = MODELS["roberta"], {"params": params_of("roberta")}
    with pytest.raises(UserError, match="has no logits"):
        model.apply(variables, jnp.ones((1, D)), method="logits")
    with pytest.raises(UserError, match="must not be packed"):
        jax.eval_shape(lambda: model.apply(variables, TOKENS, segment_ids=np.ones_like(TOKENS)))


def test_a_mask_of_ones_changes_nothing(family: tuple) -> None:
    model, params = family
    near(apply(model, params, attention_mask=np.ones((B, T), int)), apply(model, params))


def test_packed_segments_equal_separate_sequences(family: tuple) -> None:
    model, params = family
    ids = np.array([[1, 1, 1, 2, 2, 2, 2]] * B)
    packed = apply(model, params, segment_ids=ids)
    near(packed[:, 3:], apply(model, params, TOKENS[:, 3:]))
    other = TOKENS.copy()
    other[:, 3:] = 4
    near(apply(model, params, other, segment_ids=ids)[:, :3], packed[:, :3], 1e-6)


def test_split_segments_equal_one(family: tuple) -> None:
    model, params = family
    got = apply(model, cut(params, 0, 1, 3), output_hidden_states=True)
    for a, b in zip(got, apply(model, params, output_hidden_states=True), strict=True):
        near(a, b)


def test_out_sites_act_layer_by_layer(family: tuple) -> None:
    """Scaling a block's output equals scaling the kernel and bias of its last projection."""
    model, params = family
    factors = {"attention": jnp.array([0.5, 2.0, -1.0]), "mlp": jnp.array([-0.7, 1.5, 0.4])}
    edited = jax.tree.map(lambda a: a, params)
    sites: dict[str, Any] = {STACK: {}}
    for block, last in (("attention", "out"), ("mlp", "down")):
        factor = factors[block].reshape(3, 1, 1, 1)
        sites[STACK][block] = {"out": Site({"factor": factor}, scaled)}
        for leaf, value in edited[STACK][block][last].items():
            edited[STACK][block][last][leaf] = value * factor.reshape(
                (3,) + (1,) * (value.ndim - 1)
            )
    want = apply(model, edited)
    differ(want, apply(model, params))
    near(apply(model, params, sites=sites), want)


def test_out_sites_see_the_block_s_input() -> None:
    model, params = MODELS["gpt2"], params_of("gpt2")
    site = {"out": Site({"factor": jnp.zeros((3, 1, 1, 1))}, replaced)}
    edited = jax.tree.map(lambda a: a, params)
    edited[STACK]["mlp"]["down"] = jax.tree.map(jnp.zeros_like, edited[STACK]["mlp"]["down"])
    near(apply(model, params, sites={STACK: {"mlp": site}}), apply(model, edited))


def test_prompt_equals_tokens_in_front(family: tuple) -> None:
    model, params = family
    hard = behind(model)
    out, hidden = apply(model, params, sites=prompt_of(params), output_hidden_states=True)
    want, want_hidden = apply(model, params, hard, output_hidden_states=True)
    near(hidden, want_hidden[:, :, 3:])
    near(out, want[:, 3:])
    if not model.causal:
        with pytest.raises(UserError, match="packed rows cannot share one"):
            model.apply({"params": params, "sites": prompt_of(params)}, TOKENS, segment_ids=TOKENS)


def test_an_encoder_s_prefix_equals_tokens_in_front_that_only_it_can_see() -> None:
    """One layer, so that the prefix's keys and values are those of plain tokens."""
    model = changed(MODELS["bert"], num_layers=1)
    params = draw(model)
    stack = params["layers[0:1]"]["attention"]
    hard = jnp.tile(jnp.array(HARD), (B, 1))
    _, entered = apply(model, params, hard, output_hidden_states=True)

    def rows(name: str) -> jax.Array:
        y = entered[0, 0] @ stack[name]["kernel"][0] + stack[name]["bias"][0][None]
        return y.reshape(1, 3, model.config.num_heads, model.config.head_dim)

    sites = Site({"key": rows("key"), "value": rows("value")}, prefix, 3)
    got = apply(model, params, sites={"layers[0:1]": {"attention": {"kv": sites}}})
    near(got, apply(model, params, behind(model))[:, 3:])


def gradient_of(model: Any) -> Any:
    def loss(p: Any) -> jax.Array:
        return jnp.mean(jnp.square(model.apply({"params": p}, TOKENS)))

    return loss


def test_unroll_and_remat_change_neither_value_nor_gradient(family: tuple) -> None:
    model, params = family

    def residuals(remat: str) -> int:
        """Values kept for the backward pass: what remat is for."""
        loss = gradient_of(changed(model, remat=remat))
        kept = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(kept))

    def run(m: Any) -> Any:
        return jax.jit(jax.value_and_grad(gradient_of(m)))(params)

    value, gradient = run(model)
    v, g = run(changed(model, unroll=2, remat="full"))
    np.testing.assert_allclose(v, value, rtol=1e-5)
    # A key's bias cannot matter without rotation: its gradient is rounding.
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
    for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=max(1e-4 * float(b.std()), 1e-6 * largest), rtol=0)
    assert residuals("full") < residuals("dots") < residuals("none")


def test_bfloat16_stays_bfloat16(family: tuple) -> None:
    model, params = family
    sites = {"embed": {"out": Site({"factor": jnp.full((1, 1, 1), 1.0)}, scaled)}}
    low = apply(changed(model, dtype="bfloat16"), params, sites=sites, method="hidden")
    assert low.dtype == jnp.bfloat16
    near(low.astype(jnp.float32), apply(model, params, method="hidden"), 0.25)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_lora_equals_the_merged_model(name: str) -> None:
    """Logits and gradients, unequal ranks and remat included."""
    model, params = changed(MODELS[name], remat="full"), params_of(name)
    method = lj.LoRA(
        rank=((r"layers/1/", 1), (".*", 3)), targets=(r"attention/", r"mlp/", "^embed/")
    )
    trainable = method.init(jax.random.key(1), params)
    ranks = method.ranks(params)
    rng = np.random.default_rng(0)

    def moved(path: str, ab: Any) -> Any:
        live = np.arange(3)[None] < np.array(ranks[path])[:, None]  # padding stays zero
        live = live if ab["a"].ndim == 3 else live[0]
        mask = {"a": live[..., None, :], "b": live[..., :, None]}
        noise = {k: 0.1 * rng.normal(size=x.shape).astype(np.float32) for k, x in ab.items()}
        return {k: jnp.where(mask[k], ab[k] + noise[k], 0.0) for k in ab}

    moved_all = {path: moved(path, ab) for path, ab in trainable.items()}

    def ours(t: Any) -> Any:
        out = lj.adapt(model.apply)(method.combine(params, t), TOKENS)
        return jnp.sum(out**2), out

    def merged(t: Any) -> Any:
        out = model.apply({"params": method.merge(params, t)}, TOKENS)
        return jnp.sum(out**2), out

    run = {f: jax.jit(jax.grad(f, has_aux=True))(moved_all) for f in (ours, merged)}
    (got, out), (want, expected) = run[ours], run[merged]
    differ(expected, apply(MODELS[name], params))
    near(out, expected, 1e-4)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_dropout_is_drawn_anew_for_each_key_and_every_rate_is_used(name: str) -> None:
    model, params = MODELS[name], params_of(name)

    def noisy(m: Any, seed: int) -> Any:
        rngs = {"dropout": jax.random.key(seed)}
        return apply(m, params, deterministic=False, rngs=rngs)

    a, b, again = (noisy(model, seed) for seed in (0, 1, 0))
    differ(a, b)
    near(a, again, 1e-7)
    rates = [f.name for f in dataclasses.fields(model.config) if f.name.endswith("dropout")]
    off = dict.fromkeys(rates, 0.0)
    # One rate at a time: each is used. At a tiny rate, attention takes its other path.
    for rate in rates:
        differ(noisy(changed(model, **off | {rate: 0.4}), 0), apply(model, params))
    near(noisy(changed(model, **off | {"attention_dropout": 1e-7}), 0), apply(model, params))


def test_roberta_counts_positions_from_the_padding_id() -> None:
    model, params = MODELS["roberta"], params_of("roberta")
    table = params["positions"]["embedding"]
    spoilt = {**params, "positions": {"embedding": table.at[4 + T :].set(9.0).at[:3].set(9.0)}}
    near(apply(model, spoilt), apply(model, params), 1e-6)
    with pytest.raises(UserError, match="longer than the 20"):
        model.apply({"params": params}, np.ones((1, 21), int))


def test_gpt3_s_tree_costs_nothing() -> None:
    from lora_jax.models.gpt2 import GPT2, GPT2Config

    model = GPT2(
        GPT2Config(
            vocab_size=50257, hidden_size=12288, num_layers=96, num_heads=96, max_positions=2048
        )
    )
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8), int))["params"]
    assert sum(x.size for x in jax.tree.leaves(like)) == 174_604_259_328


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decoder_scores_its_last_token(name: str) -> None:
    model = changed(MODELS[name], head="regression", pad_id=0)
    params = draw(model)
    assert params["head"]["kernel"].shape == (D, 1)
    padded = np.pad(TOKENS, ((0, 0), (0, 2)))
    want = apply(model, params)
    assert want.shape == (B, 1)
    near(apply(model, params, padded), want)
    mask = np.pad(np.ones_like(TOKENS), ((0, 0), (0, 2)))
    near(apply(model, params, padded, attention_mask=mask, token_type_ids=mask), want)
    differ(apply(model, params, TOKENS[:, :5]), want)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_prefix_takes_positions_too(name: str) -> None:
    """Beyond the table of positions an embedding would be NaN."""
    model, params = MODELS[name], params_of(name)
    limit = model.position_limit
    method = METHODS["prefix_tuning"](length=3, hidden=0)
    variables = method.combine(params, method.init(jax.random.key(0), params))
    fits = model.apply(variables, np.ones((1, limit - 3), int))
    assert np.isfinite(fits).all()
    with pytest.raises(UserError, match=f"{limit + 1} positions"):
        model.apply(variables, np.ones((1, limit - 2), int))
