"""Llama against itself: packing, scan, remat, segments, cache, and every site."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.errors import UserError
from lora_jax.models import Site, family_for, prompt_length
from lora_jax.models.blocks import attention_masks, default_positions
from lora_jax.models.llama import Llama, LlamaConfig, config_from_hf, config_to_hf
from lora_jax.models.stack import segments_in

CONFIG = LlamaConfig(
    vocab_size=37,
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_size=20,
    attention_bias=True,
    tied=True,
)
B, T = 2, 7
FAST = {"xla_backend_optimization_level": 0}  # compiling is most of the time here
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T))


@pytest.fixture(scope="module")
def params() -> Any:
    """Weights large enough that every block matters."""
    shapes = jax.eval_shape(Llama(CONFIG).init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.asarray(rng.normal(1.0, 0.3, leaf.shape), jnp.float32)
        deviation = {"kernel": 1.5 / leaf.shape[-2] ** 0.5, "bias": 0.3, "embedding": 1.0}
        return jnp.asarray(rng.normal(0.0, deviation[path[-1].key], leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(
    jax.jit, static_argnames=("config", "method", "output_hidden_states"), compiler_options=FAST
)
def apply(
    params: Any,
    tokens: Any = TOKENS,
    config: LlamaConfig = CONFIG,
    sites: Any = None,
    **options: Any,
) -> Any:
    variables = {"params": params} | ({"sites": sites} if sites else {})
    return Llama(config).apply(variables, tokens, **options)


def near(a: Any, b: Any, tolerance: float = 2e-5) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=tolerance * max(float(b.std()), 1e-9), rtol=0)


def differ(a: Any, b: Any) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(a - b).max() > 0.01 * b.std()


def split_segments(params: Any, *edges: int) -> Any:
    whole = params["layers[0:3]"]
    rest = {k: v for k, v in params.items() if k != "layers[0:3]"}
    for low, high in itertools.pairwise(edges):
        rest[f"layers[{low}:{high}]"] = jax.tree.map(lambda a, s=slice(low, high): a[s], whole)
    return rest


def test_init_tree_has_the_table_s_shapes() -> None:
    config = dataclasses.replace(CONFIG, tied=False, mlp_bias=True)
    params = jax.eval_shape(Llama(config).init, jax.random.key(0), TOKENS)["params"]
    shapes = {
        "/".join(k.key for k in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    expected = {}
    for spec in family_for("llama").tensors(config):
        stacked = (spec.layers, *spec.our_shape) if spec.layers else spec.our_shape
        expected[spec.path.replace("layers/{i}", "layers[0:3]")] = stacked
    assert shapes == expected


def test_hidden_then_logits_is_call(params: Any) -> None:
    hidden = apply(params, method="hidden")
    near(apply(params, hidden, method="logits"), apply(params), 1e-6)
    head_only = {"embed": params["embed"]}
    near(apply(head_only, hidden[0, 3], method="logits"), apply(params)[0, 3])


def test_causal(params: Any) -> None:
    changed = TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % CONFIG.vocab_size
    near(apply(params, changed)[:, :4], apply(params)[:, :4], 1e-6)
    differ(apply(params, changed)[:, 4:], apply(params)[:, 4:])


def test_packed_segments_equal_separate_sequences(params: Any) -> None:
    row = TOKENS[:1]
    packed = apply(params, row, segment_ids=np.array([[1, 1, 1, 2, 2, 0, 0]]))
    near(packed[:, :3], apply(params, row[:, :3]))
    near(packed[:, 3:5], apply(params, row[:, 3:5]))
    differ(packed[:, 3:5], apply(params, row)[:, 3:5])


def test_default_positions_start_again_at_each_segment() -> None:
    ids = jnp.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 4, 5]])
    assert default_positions((2, 6), ids).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 0]]


def test_unroll_and_remat_change_neither_value_nor_gradient(params: Any) -> None:
    def loss_of(config: LlamaConfig) -> Any:
        return lambda p: jnp.mean(jnp.square(Llama(config).apply({"params": p}, TOKENS)))

    def residuals(config: LlamaConfig) -> int:
        """Values kept for the backward pass: what remat is for."""
        kept = jax.eval_shape(lambda p: jax.vjp(loss_of(config), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(kept))

    def run(config: LlamaConfig) -> Any:
        return jax.jit(jax.value_and_grad(loss_of(config)), compiler_options=FAST)(params)

    value, gradient = run(CONFIG)
    for change in ({"unroll": 3}, {"remat": "full"}, {"remat": "dots"}):
        v, g = run(dataclasses.replace(CONFIG, **change))
        near(v, value, 1e-3)
        jax.tree.map(near, g, gradient)
    kept = [residuals(dataclasses.replace(CONFIG, remat=r)) for r in ("full", "dots", "none")]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize("edges", [(0, 1, 3), (0, 1, 2, 3)])
def test_split_segments_equal_one(params: Any, edges: tuple[int, ...]) -> None:
    split = split_segments(params, *edges)
    logits, hidden = apply(split, output_hidden_states=True)
    expected, expected_hidden = apply(params, output_hidden_states=True)
    near(logits, expected)
    near(hidden, expected_hidden)


def test_segments_must_cover_the_layers() -> None:
    with pytest.raises(UserError, match="must cover layers 0 to 2"):
        segments_in(["embed", "layers[0:1]", "layers[2:3]"], 3)


@functools.partial(jax.jit, static_argnames="first", compiler_options=FAST)
def step(
    params: Any,
    sites: Any,
    cache: Any,
    index: Any,
    tokens: Any,
    positions: Any,
    mask: Any,
    first: bool,
) -> Any:
    """One call with a cache. A prompt site is written by the call with a concrete index 0."""
    variables = {"params": params} | ({"sites": sites} if sites else {})
    return Llama(CONFIG).apply(
        variables,
        tokens,
        positions=positions,
        attention_mask=mask,
        cache=cache,
        cache_index=0 if first else index,
    )


def decode(
    params: Any, sites: Any = None, prefill: int = 3, pad: int = 0, long_mask: bool = False
) -> jax.Array:
    """Logits of TOKENS from a prefill and single steps, `pad` tokens left-padded."""
    prompt = prompt_length({"sites": sites} if sites else {})
    tokens = np.pad(TOKENS, ((0, 0), (pad, 0)))
    slots = pad + T + 2
    mask = np.zeros((B, slots + (prompt if long_mask else 0)), np.int32)
    mask[:, pad : pad + T] = 1
    positions = np.maximum(np.arange(pad + T) - pad, 0)[None].repeat(B, 0)
    cache = Llama(CONFIG).init_cache(B, prompt + slots, "float32")
    parts = []
    for start, stop in [(0, pad + prefill), *((i, i + 1) for i in range(pad + prefill, pad + T))]:
        logits, cache = step(
            params,
            sites,
            cache,
            start,
            tokens[:, start:stop],
            positions[:, start:stop],
            mask,
            start == 0,
        )
        parts.append(logits)
    return jnp.concatenate(parts, axis=1)[:, pad:]


def test_cache_equals_full_forward(params: Any) -> None:
    near(decode(params), apply(params))
    near(decode(params, pad=2), apply(params))
    near(decode(split_segments(params, 0, 2, 3)), apply(params))


def test_default_positions_with_a_cache(params: Any) -> None:
    cache = Llama(CONFIG).init_cache(B, T)
    _, cache = apply(params, TOKENS[:, :4], cache=cache, cache_index=0)
    logits, _ = apply(params, TOKENS[:, 4:], cache=cache, cache_index=jnp.array(4))
    near(logits, apply(params)[:, 4:])


# --- sites ---------------------------------------------------------------------------------------


def scaled(params: Any, x: jax.Array, **context: Any) -> jax.Array:
    return x * params["factor"]


def prefix(params: Any, k: jax.Array, v: jax.Array, **context: Any) -> tuple[Any, Any]:
    def before(new_PKH: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.broadcast_to(new_PKH[None], (B, *new_PKH.shape)), old], axis=1)

    return before(params["key"], k), before(params["value"], v)


def prompt(params: Any, x: jax.Array, tokens: Any, **context: Any) -> jax.Array:
    rows = jnp.broadcast_to(params["prompt"][None], (x.shape[0], *params["prompt"].shape))
    return jnp.concatenate([rows, x], axis=1)


def test_out_sites_act_layer_by_layer(params: Any) -> None:
    """Scaling a block's output equals scaling the kernel and bias of its last projection."""
    factor = jnp.array([0.5, 2.0, -1.0]).reshape(3, 1, 1, 1)
    for block, last in (("attention", "out"), ("mlp", "down")):
        sites = {"layers[0:3]": {block: {"out": Site({"factor": factor}, scaled)}}}
        edited = jax.tree.map(lambda a: a, params)
        edited["layers[0:3]"][block][last] = {
            name: leaf * factor.reshape((3,) + (1,) * (leaf.ndim - 1))
            for name, leaf in params["layers[0:3]"][block][last].items()
        }
        near(apply(params, sites=sites), apply(edited))
        differ(apply(params, sites=sites), apply(params))
        near(
            apply(
                split_segments(params, 0, 1, 3),
                sites={
                    f"layers[{a}:{b}]": {block: {"out": Site({"factor": factor[a:b]}, scaled)}}
                    for a, b in ((0, 1), (1, 3))
                },
            ),
            apply(edited),
        )


def test_out_sites_see_the_block_s_input(params: Any) -> None:
    def replaced(p: Any, x: jax.Array, *, inputs: jax.Array) -> jax.Array:
        return inputs * p["factor"]

    sites = {"layers[0:3]": {"mlp": {"out": Site({"factor": jnp.zeros((3, 1, 1, 1))}, replaced)}}}
    edited = jax.tree.map(lambda a: a, params)
    edited["layers[0:3]"]["mlp"]["down"] = {"kernel": jnp.zeros((3, 20, 16))}
    near(apply(params, sites=sites), apply(edited))


def test_embed_site(params: Any) -> None:
    untied = dataclasses.replace(CONFIG, tied=False)
    weights = params | {"head": {"kernel": params["embed"]["embedding"].T}}
    edited = weights | {"embed": {"embedding": params["embed"]["embedding"] * 3}}
    sites = {"embed": {"out": Site({"factor": jnp.full((1, 1, 1), 3.0)}, scaled)}}
    near(apply(weights, config=untied, sites=sites), apply(edited, config=untied))
    near(decode(params, sites), apply(params, sites=sites))


def prompt_of(tokens: list[int], params: Any) -> dict[str, Any]:
    """A soft prompt that equals hard tokens, so that plain calls are the reference."""
    rows = params["embed"]["embedding"][jnp.array(tokens)]
    return {"embed": {"out": Site({"prompt": rows}, prompt, len(tokens))}}


def test_prompt_equals_tokens_in_front(params: Any) -> None:
    hard = [5, 9, 30]
    tokens = np.concatenate([np.tile(hard, (B, 1)), TOKENS], axis=1)
    sites = prompt_of(hard, params)
    logits, hidden = apply(params, sites=sites, output_hidden_states=True)
    expected, expected_hidden = apply(params, tokens, output_hidden_states=True)
    near(logits, expected[:, 3:])
    near(hidden, expected_hidden[:, :, 3:])
    mask = np.ones((B, T), int)
    mask[0, :2] = 0
    full = np.concatenate([np.ones((B, 3), int), mask], axis=1)
    near(
        apply(params, sites=sites, attention_mask=mask)[:, 2:],
        apply(params, tokens, attention_mask=full)[:, 5:],
    )


def test_prompt_is_in_front_of_every_packed_segment(params: Any) -> None:
    sites = prompt_of([5, 9, 30], params)
    packed = apply(params, TOKENS[:1], sites=sites, segment_ids=np.array([[1, 1, 1, 2, 2, 2, 2]]))
    near(packed[:, :3], apply(params, TOKENS[:1, :3], sites=sites))
    near(packed[:, 3:], apply(params, TOKENS[:1, 3:], sites=sites))


def test_prompt_sees_only_itself() -> None:
    mask = attention_masks(
        5, 5, prefix=2, attention_mask=jnp.array([[0, 1, 1]]), segment_ids=jnp.array([[1, 1, 2]])
    )[0, 0]
    assert mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("options", [{"pad": 2}, {"long_mask": True}])
def test_prompt_with_cache(params: Any, options: dict[str, Any]) -> None:
    sites = prompt_of([5, 9, 30], params)
    near(decode(params, sites, **options), apply(params, sites=sites))


def test_prefix_equals_cached_tokens(params: Any) -> None:
    """Keys and values of hard tokens, taken from a cache, are a prefix of known effect."""
    hard = np.tile([5, 9, 30], (B, 1))
    _, cache = apply(params, hard, cache=Llama(CONFIG).init_cache(B, 3), cache_index=0)
    rows = {"key": cache["key"][:, 0], "value": cache["value"][:, 0]}
    sites = {"layers[0:3]": {"attention": {"kv": Site(rows, prefix, 3)}}}
    expected = apply(params, np.concatenate([hard, TOKENS], axis=1))[:, 3:]
    near(apply(params, sites=sites), expected)
    near(
        apply(params, sites=sites, segment_ids=np.array([[1, 1, 1, 2, 2, 2, 2]] * B))[:, :3],
        expected[:, :3],
    )
    near(decode(params, sites), expected)
    split = split_segments(params, 0, 2, 3)
    near(
        apply(
            split,
            sites={
                name: {
                    "attention": {"kv": Site(jax.tree.map(lambda a, s=s: a[s], rows), prefix, 3)}
                }
                for name, s in (("layers[0:2]", slice(0, 2)), ("layers[2:3]", slice(2, 3)))
            },
        ),
        expected,
    )


def test_sites_are_differentiable(params: Any) -> None:
    def loss(site: Site) -> jax.Array:
        variables = {"params": params, "sites": {"embed": {"out": site}}}
        return jnp.mean(jnp.square(Llama(CONFIG).apply(variables, TOKENS)))

    site = prompt_of([5, 9], params)["embed"]["out"]
    gradient = jax.jit(jax.grad(loss), compiler_options=FAST)(site)
    assert gradient.params["prompt"].shape == (2, 16)
    assert (np.abs(gradient.params["prompt"]).max(axis=1) > 0).all()


@pytest.mark.parametrize(
    "sites, message",
    [
        (
            {"embed": {"out": Site({"factor": jnp.ones((1, 1, 1))}, scaled, 2)}},
            "length=2 calls for",
        ),
        ({"layers[0:3]": {"mlp": {"out": Site({}, scaled, 1)}}}, "cannot lengthen"),
        ({"embed": {"out": jnp.ones(3)}}, "put a Site there"),
    ],
)
def test_wrong_sites_are_explained(params: Any, sites: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply(params, sites=sites)


# --- configuration -------------------------------------------------------------------------------

HF = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 20,
}


def test_old_and_new_rope_forms_agree() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = config_from_hf(HF | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | scaling})
    new = config_from_hf(
        HF | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | scaling}
    )
    assert old == new
    assert config_from_hf(config_to_hf(old)) == old


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "without low_freq_factor"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window 8"),
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_unsupported_options_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_hf(HF | change)


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(UserError, match="gelu.*pretraining_tp"):
        config_from_hf(HF | {"hidden_act": "gelu", "pretraining_tp": 2})


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'llama'"):
        family_for("lama")


def test_bfloat16_stays_bfloat16(params: Any) -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    sites = {"embed": {"out": Site({"factor": jnp.full((1, 1, 1), 1.0)}, scaled)}}
    logits = apply(params, config=config, sites=sites)
    assert logits.dtype == jnp.bfloat16
    near(logits.astype(jnp.float32), apply(params), 0.2)
