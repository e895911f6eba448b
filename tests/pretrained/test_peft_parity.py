"""Adapters both ways between PEFT and here: the same logits, merged or not."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest
from random_llama import random_model
from test_peft import METHODS, trained

import lora_jax as lj
from lora_jax.pretrained import load_adapter, save_adapter, save_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True}
CASES = {
    "plain": ({}, {"target_modules": ["q_proj", "v_proj"], "r": 4}),
    "patterns, rslora": ({}, {
        "target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 7, "use_rslora": True,
        "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 8},
        "alpha_pattern": {r"layers\.2\..*": 32}}),
    "all-linear, a module whole": ({}, {
        "target_modules": "all-linear", "r": 2, "exclude_modules": ["up_proj"],
        "modules_to_save": ["lm_head"]}),
    "regex, norms whole": ({}, {
        "target_modules": r".*\.(1|2)\.mlp\.(up|down)_proj", "r": 2,
        "modules_to_save": ["model.norm", "input_layernorm"]}),
    "layers": ({}, {"target_modules": ["k_proj", "o_proj"], "layers_to_transform": [0, 2], "r": 2}),
    "embedding, head": ({}, {"target_modules": ["k_proj", "embed_tokens", "lm_head"], "r": 2}),
    "tied embedding": (TIED, {
        "target_modules": ["k_proj", "embed_tokens"], "ensure_weight_tying": True, "r": 3}),
    "tied embedding whole": (TIED, {
        "target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True, "r": 3}),
    "all biases": (BIASED, {"target_modules": ["k_proj"], "bias": "all", "r": 3}),
    "adapted biases": (BIASED, {"target_modules": ["k_proj"], "bias": "lora_only", "r": 3}),
}  # fmt: skip


def hugging_face(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.fixture(autouse=True)
def libraries_may_warn():
    # PEFT and transformers warn about each other's ageing names; that is not what is tested.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("case", CASES)
def test_from_peft(tmp_path, tokens, case):
    changes, options = CASES[case]
    model, params = random_model(**changes)
    save_pretrained(tmp_path / "base", model, params)
    theirs = peft.get_peft_model(hugging_face(tmp_path / "base"), peft.LoraConfig(**options))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    want = logits(theirs, tokens)
    assert np.abs(want - logits(hugging_face(tmp_path / "base"), tokens)).max() > 0.01

    method, trainable = load_adapter(tmp_path / "theirs", model, params)
    close(jax.jit(lj.adapt(model.apply))(method.combine(params, trainable), tokens), want)
    close(jax.jit(model.apply)({"params": method.merge(params, trainable)}, tokens), want)

    save_adapter(tmp_path / "ours", model, method, trainable)
    again = peft.PeftModel.from_pretrained(hugging_face(tmp_path / "base"), tmp_path / "ours")
    close(logits(again, tokens), want)


@pytest.mark.parametrize("name", METHODS)
def test_to_peft(tmp_path, tiny, tokens, name):
    folder, model, params = tiny
    method = METHODS[name]
    trainable = jax.tree.map(lambda x: 0.3 * x, trained(method, params))
    save_adapter(tmp_path / "ours", model, method, trainable, base_name=str(folder))
    theirs = peft.PeftModel.from_pretrained(hugging_face(folder), tmp_path / "ours")
    close(
        logits(theirs, tokens),
        jax.jit(lj.adapt(model.apply))(method.combine(params, trainable), tokens),
    )
