"""Prefixes, prompts and special tokens: parameters, packing, what they equal, and a whole run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from site_models import (
    KEY,
    MODELS,
    TOKENS,
    B,
    D,
    L,
    T,
    V,
    count,
    differ,
    moved,
    near,
    params_of,
    run,
)  # fmt: skip

import lora_jax as lj
from lora_jax import partition, training
from lora_jax.data.placeholders import behind_prompts
from lora_jax.methods.lora_prefix import LoRAPrefixEmbedding, LoRAPrefixLayer
from lora_jax.methods.prefix import PrefixTuning, PTuningV2
from lora_jax.methods.prefix_embedding import PrefixEmbedding, PrefixLayer
from lora_jax.methods.prompt import PromptTuning

STACK = f"layers[0:{L}]"
KV = f"sites/{STACK}/attention/kv"
IN = f"sites/{STACK}/in"
HARD = np.array([5, 9, 30])  # special tokens that equal these have a known effect


@pytest.mark.parametrize(
    ("paper", "method", "wanted"),
    [
        ("GPT-2 M", PrefixTuning(length=5, hidden=0), 245_760),
        ("GPT-2 M", PrefixTuning(length=10, hidden=0), 491_520),
        ("GPT-2 M", PrefixTuning(length=5, hidden=512), 25_744_896),  # while it trains
        ("RoBERTa-large", PTuningV2(length=128, train=()), 6_291_456),
        ("RoBERTa-large", PTuningV2(length=8, train=()), 393_216),
        ("GPT-3", PrefixEmbedding(prefix=32, infix=8), 491_520),
        ("GPT-3", PrefixEmbedding(prefix=512, infix=8), 6_389_760),
        # The paper's formula; the counts it prints (5.1M, 76.1M) follow no formula of its own.
        ("GPT-3", PrefixLayer(prefix=2, infix=2), 4_718_592),
        ("GPT-3", PrefixLayer(prefix=64, infix=0), 75_497_472),
        ("GPT-3", LoRAPrefixEmbedding(rank=8, prefix=8, infix=4), 37_896_192),
        ("GPT-3", LoRAPrefixLayer(rank=8, prefix=8, infix=4), 51_904_512),  # published 52.8M
        ("GPT-2 M", PromptTuning(length=100), 100 * 1024),
    ],
)
def test_counts_of_the_papers(paper, method, wanted) -> None:
    assert count(paper, method) == wanted


METHODS = {
    "prefix": PrefixTuning(length=3, hidden=0),
    "prefix, mlp": PrefixTuning(length=3, hidden=4),
    "prompt": PromptTuning(length=3),
    "layers": PrefixLayer(prefix=3, init_std=1.0),
    "lora": LoRAPrefixEmbedding(rank=2, prefix=3),
}


@pytest.mark.parametrize(
    ("name", "which"),
    [("llama", "prefix, mlp"), ("gpt2", "prefix"), ("bert bare", "prefix"), ("llama", "prompt"),
     ("gpt2", "layers"), ("gpt2", "lora"), ("mistral", "prompt")],
)  # fmt: skip
def test_every_text_of_a_packed_row_has_the_prefix(name: str, which: str) -> None:
    params, method = params_of(name), METHODS[which]
    start = method.init(KEY, params)
    variables = method.combine(params, moved(start))
    ids = np.array([[1, 1, 1, 2, 2, 2]] * B)
    packed = run(name, variables, segment_ids=ids)
    differ(packed, run(name, method.combine(params, start), segment_ids=ids))
    near(packed[:, :3], run(name, variables, TOKENS[:, :3]))
    near(packed[:, 3:], run(name, variables, TOKENS[:, 3:]))


def test_an_encoders_prompt_cannot_be_shared_by_a_packed_row() -> None:
    params, method = params_of("bert bare"), METHODS["prompt"]
    variables = method.combine(params, method.init(KEY, params))
    assert run("bert bare", variables).shape == (B, T, D)
    with pytest.raises(lj.UserError, match="packed rows cannot share one"):
        run("bert bare", variables, segment_ids=TOKENS)


def test_the_mlp_is_dropped_after_training() -> None:
    params, method = params_of("gpt2"), PrefixTuning(length=3, hidden=4, train=("^final_norm/",))
    trainable = moved(method.init(KEY, params))
    kept, small = method.settle(params, trainable)
    assert kept == dataclasses.replace(method, hidden=0)
    like = jax.eval_shape(kept.init, KEY, params)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, like)
    near(run("gpt2", kept.combine(params, small)), run("gpt2", method.combine(params, trainable)))
    shared = trainable["sites/prefix"]
    inner = np.tanh(shared["embedding"] @ shared["kernel"] + np.asarray(shared["bias"])[None])
    last = trainable[KV]["value"]
    near(small[KV]["value"][1], inner @ last["kernel"][1] + np.asarray(last["bias"])[1:2], 1e-5)
    assert lj.LoRA().settle(params, {}) == (lj.LoRA(), {})


def test_a_prefix_does_not_depend_on_how_layers_are_cut() -> None:
    params, method = params_of("gpt2"), METHODS["prefix, mlp"]
    cut = partition.split_stacks(params, {"layers": [1]})
    whole, parts = method.init(KEY, params), method.init(KEY, cut)
    near(run("gpt2", method.combine(cut, parts)), run("gpt2", method.combine(params, whole)))


def hidden_of(tokens: np.ndarray) -> np.ndarray:
    """What each layer of the GPT-2 reads for these tokens: [L, T, D]."""
    variables = {"params": params_of("gpt2")}
    options = {"output_hidden_states": True}
    return run("gpt2", variables, tokens[None], static=options)[1][:-1, 0]


@pytest.mark.parametrize("cls", [PrefixEmbedding, PrefixLayer])
def test_special_tokens_that_equal_tokens_have_their_effect(cls: type) -> None:
    """A prefix in front, an infix inside: the logits of the text are those of plain tokens."""
    params = params_of("gpt2")
    plain = np.concatenate([HARD, TOKENS[0, :2], HARD[:2], TOKENS[0, 2:]])
    method = cls(prefix=3, infix=2)
    held = np.concatenate([TOKENS[0, :2], method.placeholders(params), TOKENS[0, 2:]])
    assert list(method.placeholders(params)) == [V, V + 1]
    if cls is PrefixEmbedding:
        rows = params["embed"]["embedding"][HARD]
        trainable = {"sites/embed/out": {"rows": rows}, "sites/embed/tokens": {"rows": rows[:2]}}
    else:
        read = hidden_of(plain)
        trainable = {IN: {"prefix": read[:, :3], "infix": read[:, 5:7]}}
    like = jax.eval_shape(method.init, KEY, params)
    assert jax.tree.map(jnp.shape, trainable) == jax.tree.map(jnp.shape, like)
    got = run("gpt2", method.combine(params, trainable), held[None])
    near(got, run("gpt2", {"params": params}, plain[None])[:, 3:])


@pytest.mark.parametrize("method", [PrefixLayer(prefix=2, infix=2, init_std=1.0),
                                    PrefixEmbedding(prefix=0, infix=2, init_std=1.0)])  # fmt: skip
def test_decoding_sees_the_special_tokens(method) -> None:
    """Greedy tokens are the argmax of the whole sequence, with the infix last in the prompt."""
    params = params_of("gpt2")
    variables = method.combine(params, method.init(KEY, params))
    prompt = [*TOKENS[0, :3].tolist(), *method.placeholders(params)]
    new = training.generate(
        MODELS["gpt2"], variables, [prompt], max_new_tokens=3, eos_id=None, pad_id=0
    )[0]
    whole = np.array([*prompt, *new])
    logits = run("gpt2", variables, whole[None])[0]
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(np.argmax(logits, -1)[len(prompt) - 1 : -1], new)


def test_a_window_reaches_a_prompt_over_padding() -> None:
    """Prompts of several lengths in a batch: each one's tokens are those of the text alone."""
    params, method = params_of("mistral"), METHODS["prompt"]
    variables = method.combine(params, moved(method.init(KEY, params)))
    prompts = [TOKENS[0, :1].tolist(), TOKENS[1, :5].tolist()]
    new = training.generate(
        MODELS["mistral"], variables, prompts, max_new_tokens=3, eos_id=None, pad_id=0
    )
    for prompt, tokens in zip(prompts, new, strict=True):
        whole = np.zeros((1, 8), int)
        whole[0, : len(prompt) + 3] = [*prompt, *tokens]
        chosen = np.argmax(run("mistral", variables, whole)[0], -1)
        np.testing.assert_array_equal(chosen[len(prompt) - 1 :][:3], tokens)


def test_lora_with_special_tokens_is_both() -> None:
    params = params_of("gpt2")
    method = LoRAPrefixLayer(rank=2, prefix=3, targets="query$")
    trainable = moved(method.init(KEY, params))
    special = {p: x for p, x in trainable.items() if p.startswith("sites/")}
    lora = lj.LoRA(rank=2, targets="query$")
    factors = {p: x for p, x in trainable.items() if p not in special}
    merged = lora.merge(params, factors)
    want = run("gpt2", method.special().combine(merged, special))
    near(run("gpt2", method.combine(params, trainable)), want, 1e-4)
    with pytest.raises(lj.UserError, match="cannot be merged"):
        method.merge(params, trainable)


def test_placeholders_stand_before_the_first_target() -> None:
    example = {"tokens": np.array([7, 8, 9], np.int32), "loss_mask": np.array([0, 0, 1.0], "f4")}
    (got,) = behind_prompts([example], [V, V + 1])
    assert got["tokens"].tolist() == [7, 8, V, V + 1, 9]
    assert got["loss_mask"].tolist() == [0, 0, 0, 0, 1]
    with pytest.raises(lj.UserError, match="language model's task"):
        behind_prompts([{"tokens": np.array([1]), "label": 0}], [V])  # type: ignore[typeddict-item]


def test_prompts_start_as_asked() -> None:
    params = params_of("gpt2")
    table = np.asarray(params["embed"]["embedding"])

    def rows(**options) -> np.ndarray:
        method = PromptTuning(length=4, **options)
        return np.asarray(method.init(KEY, params)["sites/embed/out"]["rows"])

    drawn = rows(vocabulary=6)
    assert all((np.abs(table[:6] - row).max(-1) < 1e-6).any() for row in drawn)
    named = rows(start="labels", labels=((4, 5), (9,)), vocabulary=6)
    near(named[0], (table[4] + table[5]) / 2)
    near(named[1], table[9])
    near(named[2:], drawn[2:])
    uniform = rows(start="random")
    assert 0.3 < np.abs(uniform).max() <= 0.5


def test_a_deep_prompt_trains_with_a_new_head() -> None:
    params, method = params_of("bert"), PTuningV2(length=3)
    trainable = method.init(KEY, params)
    assert {p.split("/")[0] for p in trainable} == {"sites", "head"}
    frozen = method.frozen(params)

    def loss(t) -> jax.Array:
        return (MODELS["bert"].apply(method.combine(frozen, t), TOKENS) ** 2).mean()

    gradients = jax.jit(jax.grad(loss))(trainable)
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PrefixTuning(length=0), "at least 1"),
        (lambda: PromptTuning(start="words"), "start must be"),
        (lambda: PromptTuning(start="labels"), "token ids of each label"),
        (lambda: PromptTuning(length=1, start="labels", labels=((1,), (2,))), "need length=2"),
        (lambda: PromptTuning(start="labels", labels=((V,),)).init(KEY, params_of("gpt2")),
         "outside of the vocabulary"),
        (lambda: PrefixEmbedding(prefix=0), "one of them more"),
        (lambda: PrefixTuning().init(KEY, {"layers[0:2]": {"w": np.ones((2, 2))}}), "other model"),
        (lambda: PromptTuning().init(KEY, {"w": np.ones((2, 2))}), "needs a model with sites"),
        (lambda: PrefixLayer().merge(params_of("gpt2"), {}), "cannot be merged"),
        (lambda: LoRAPrefixEmbedding(infix=1, targets="^embed").init(KEY, params_of("gpt2")),
         "leave `embed` out"),
    ],
)  # fmt: skip
def test_bad_settings_say_what_to_do(build, message) -> None:
    with pytest.raises(lj.UserError, match=message):
        build()
