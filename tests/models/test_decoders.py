"""Decoders: causality, caches, prompts in front of them; and Llama's configuration."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import (
    MODELS,
    TOKENS,
    B,
    T,
    apply,
    cut,
    decode,
    differ,
    near,
    params_of,
    prefix,
    prompt,
    scaled,
)

from lora_jax.errors import UserError
from lora_jax.models import Site, family_for
from lora_jax.models.attention import attention_masks, default_positions
from lora_jax.models.llama import config_from_hf, config_to_hf
from lora_jax.models.stack import segments_in

HARD = [5, 9, 30]  # a soft prompt or prefix that equals these tokens has a known effect


@pytest.fixture(params=["llama", "gpt2"])
def decoder(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return MODELS[request.param], params_of(request.param)


def prompt_of(params: Any) -> dict[str, Any]:
    rows = params["embed"]["embedding"][jnp.array(HARD)]
    return {"embed": {"out": Site({"prompt": rows}, prompt, len(HARD))}}


def test_causal(decoder: tuple) -> None:
    model, params = decoder
    changed = TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % model.config.vocab_size
    near(apply(model, params, changed)[:, :4], apply(model, params)[:, :4], 1e-6)
    differ(apply(model, params, changed)[:, 4:], apply(model, params)[:, 4:])


def test_cache_equals_full_forward(decoder: tuple) -> None:
    model, params = decoder
    near(decode(model, cut(params, 0, 2, 3), pad=2), apply(model, params))


def test_default_positions_with_a_cache() -> None:
    model, params = MODELS["gpt2"], params_of("gpt2")
    cache = model.init_cache(B, T)
    _, cache = apply(model, params, TOKENS[:, :4], cache=cache, cache_index=0)
    logits, _ = apply(model, params, TOKENS[:, 4:], cache=cache, cache_index=jnp.array(4))
    near(logits, apply(model, params)[:, 4:])


def test_prompt_with_cache() -> None:
    model, params = MODELS["llama"], params_of("llama")
    sites = prompt_of(params)
    near(decode(model, params, sites, pad=2, long_mask=True), apply(model, params, sites=sites))


def test_prompt_is_in_front_of_every_packed_segment() -> None:
    model, params = MODELS["llama"], params_of("llama")
    sites = prompt_of(params)
    ids = np.array([[1, 1, 1, 2, 2, 2, 2]])
    packed = apply(model, params, TOKENS[:1], sites=sites, segment_ids=ids)
    near(packed[:, :3], apply(model, params, TOKENS[:1, :3], sites=sites))
    near(packed[:, 3:], apply(model, params, TOKENS[:1, 3:], sites=sites))


def test_prefix_equals_cached_tokens(decoder: tuple) -> None:
    """Keys and values of hard tokens, taken from a cache, are a prefix of known effect."""
    model, params = decoder
    hard = np.tile(HARD, (B, 1))
    _, cache = apply(model, params, hard, cache=model.init_cache(B, 3), cache_index=0)
    rows = {"key": cache["key"][:, 0], "value": cache["value"][:, 0]}
    sites = {"layers[0:3]": {"attention": {"kv": Site(rows, prefix, 3)}}}
    expected = apply(model, params, np.concatenate([hard, TOKENS], axis=1))[:, 3:]
    near(apply(model, params, sites=sites), expected)
    ids = np.array([[1, 1, 1, 2, 2, 2, 2]] * B)
    near(apply(model, params, sites=sites, segment_ids=ids)[:, :3], expected[:, :3])
    near(decode(model, cut(params, 0, 2, 3), cut(sites, 0, 2, 3)), expected)


def test_an_encoder_does_not_decode() -> None:
    with pytest.raises(UserError, match="does not decode"):
        MODELS["bert"].init_cache(1, 4)


def test_default_positions_start_again_at_each_segment() -> None:
    ids = jnp.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 4, 5]])
    assert default_positions((2, 6), ids).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 0]]


def test_segments_must_cover_the_layers() -> None:
    with pytest.raises(UserError, match="must cover layers 0 to 2"):
        segments_in(["embed", "layers[0:1]", "layers[2:3]"], 3)


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


def test_sites_are_differentiable() -> None:
    model, params = MODELS["llama"], params_of("llama")

    def loss(site: Site) -> jax.Array:
        variables = {"params": params, "sites": {"embed": {"out": site}}}
        return jnp.mean(jnp.square(model.apply(variables, TOKENS)))

    site = prompt_of(params)["embed"]["out"]
    gradient = jax.jit(jax.grad(loss))(site)
    assert gradient.params["prompt"].shape == (3, 16)
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
def test_wrong_sites_are_explained(sites: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply(MODELS["llama"], params_of("llama"), sites=sites)


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
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config gptq \\(only"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8},
            "sliding_window 8",
        ),
        ({"model_type": "gemma2"}, "model_type 'gemma2'"),
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
    with pytest.raises(UserError, match="did you mean llama"):
        family_for("lama")


def test_what_is_left_out_and_what_is_null_are_two_things() -> None:
    """transformers' MistralConfig: a window of 4096 and 8 key heads by default, null for none and
    for as many as queries."""
    mistral = HF | {"model_type": "mistral", "num_attention_heads": 16, "hidden_size": 32}
    left_out = config_from_hf(mistral)
    assert (left_out.window, left_out.num_kv_heads) == (4096, 8)
    null = config_from_hf(mistral | {"sliding_window": None, "num_key_value_heads": None})
    assert (null.window, null.num_kv_heads) == (None, 16)
