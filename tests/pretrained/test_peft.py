"""Adapters in PEFT's format, without PEFT: round trips, padding, fingerprints, refusals."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_llama import random_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import partition
from lora_jax.methods.peft.targets import lookup, pattern_of, short_names
from lora_jax.pretrained import load_adapter, save_adapter


def trained(method, params, seed=1):
    """A trainable tree with no zero in it but the padding."""
    start = method.init(jax.random.key(0), params)
    ranks = method.ranks(params)
    rng = np.random.default_rng(seed)
    moved = {}
    for path, value in start.items():
        if path not in ranks:
            moved[path] = value + jnp.asarray(0.1 * rng.standard_normal(value.shape), value.dtype)
            continue
        a = rng.standard_normal(value["a"].shape).astype(np.float32)
        b = rng.standard_normal(value["b"].shape).astype(np.float32)
        stacked = partition.stack_of(path) is not None
        for a_l, b_l, r in zip(
            *((a, b) if stacked else (a[None], b[None])), ranks[path], strict=True
        ):
            a_l[:, r:] = 0
            b_l[r:] = 0
        moved[path] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    return moved


def same(a, b):
    assert list(a) == list(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


METHODS = {
    "plain": lj.LoRA(rank=4, alpha=8, dropout=0.1),
    "ranks and alphas": lj.LoRA(
        rank=((r"layers/1/", 3), (r"query", 2), (r".*", 1)),
        alpha=((r"layers/(0|2)/mlp", 5.5), (r".*", 7)),
        targets=(r"query$", r"mlp/down$"), scaling="rslora", start="gaussian",
    ),
    "some layers": lj.LoRA(rank=2, targets=r"layers/(0|2)/attention/(key|out)$"),
    "embedding and head": lj.LoRA(rank=2, targets=r"^(embed|head)$", train=(r"_norm/scale$",)),
    "whole modules": lj.LoRA(rank=2, train=(r"^final_norm/scale$", r"^head/kernel$")),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_round_trip(tmp_path, tiny, name):
    _, model, params = tiny
    method = METHODS[name]
    trainable = trained(method, params)
    save_adapter(tmp_path / "a", model, method, trainable)  # shapes are known without params
    again, loaded = load_adapter(tmp_path / "a", model, params)
    same(loaded, trainable)
    assert again == method
    without_header(tmp_path / "a")  # as PEFT would have written it
    told, loaded = load_adapter(tmp_path / "a", model, params)
    same(loaded, trainable)
    assert told.ranks(params) == method.ranks(params)
    jax.tree.map(np.testing.assert_array_equal, told.scales(params), method.scales(params))
    assert (told.scaling, told.dropout, told.start) == (
        method.scaling, method.dropout, method.start)  # fmt: skip


def without_header(folder):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file)


def test_padding_is_not_saved(tmp_path, tiny):
    _, model, params = tiny
    method = METHODS["ranks and alphas"]
    save_adapter(tmp_path / "a", model, method, trained(method, params))
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    assert [stored[name.format(i, "A")].shape for i in range(3)] == [(2, 16), (3, 16), (2, 16)]
    assert [stored[name.format(i, "B")].shape for i in range(3)] == [(16, 2), (16, 3), (16, 2)]


@pytest.mark.parametrize("saved, loaded", [((), (1,)), ((2,), (1,))])
def test_segments_do_not_matter(tmp_path, tiny, tokens, saved, loaded):
    _, model, params = tiny
    method = lj.LoRA(rank=2, alpha=4)
    cut = partition.split_stacks(params, {"layers": saved})
    trainable = trained(method, cut)
    save_adapter(tmp_path / "a", model, method, trainable)
    other = partition.split_stacks(params, {"layers": loaded})
    again, back = load_adapter(tmp_path / "a", model, other)
    want = jax.jit(lj.adapt(model.apply))(method.combine(cut, trainable), tokens)
    got = jax.jit(lj.adapt(model.apply))(again.combine(other, back), tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_one_layer_trained_whole(tmp_path, tiny):
    _, model, params = tiny
    params = partition.split_stacks(params, {"layers": [1, 2]})
    method = lj.LoRA(rank=2, train=(r"layers/1/mlp/up/kernel$",))
    trainable = trained(method, params)
    save_adapter(tmp_path / "a", model, method, trainable)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.layers.1.mlp.up_proj"]
    same(load_adapter(tmp_path / "a", model, params)[1], trainable)


def test_tied_embedding(tmp_path):
    model, params = random_model(tie_word_embeddings=True)
    method = lj.LoRA(rank=2, targets=r"^embed$")
    trainable = trained(method, params)
    save_adapter(tmp_path / "a", model, method, trainable)
    same(load_adapter(tmp_path / "a", model, params)[1], trainable)
    file = tmp_path / "a" / "adapter_model.safetensors"
    only = {k: v for k, v in load_file(file).items() if "lm_head" not in k}
    save_file(only, file)
    with pytest.raises(lj.UserError, match="the head is the embedding"):
        load_adapter(tmp_path / "a", model, params)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"use_dora": True}, "should have .* magnitudes"),
        ({"megatron_config": {"x": 1}, "layer_replication": [[0, 2]]}, "layer_repl.*megatron"),
        ({"some_new_option": 3}, "some_new_option=3"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"peft_type": "NEW"}, "peft_type is 'NEW'; only .*LORA.* is read"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "some"}, "bias='some'"),
        ({"r": 5}, "should have rank 5"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "no factors for .*k_proj"),
        ({"target_modules": ["q_proj"]}, "does not target"),
        ({"modules_to_save": ["lm_head"]}, "no tensor lm_head.weight"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, tiny, change, match):
    _, model, params = tiny
    method = lj.LoRA(rank=2)
    save_adapter(tmp_path / "a", model, method, trained(method, params))
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(lj.UserError, match=match):
        load_adapter(tmp_path / "a", model, params)


def test_tensors_that_do_not_belong_are_listed(tmp_path, tiny):
    _, model, params = tiny
    method = lj.LoRA(rank=2)
    save_adapter(tmp_path / "a", model, method, trained(method, params))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[key.replace("layers.0", "layers.7")] = tensors.pop(key)
    save_file(tensors, file)
    with pytest.raises(lj.UserError, match=r"layers\.7.*did you mean.*; .*has only lora_B"):
        load_adapter(tmp_path / "a", model, params)
    file.rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(lj.UserError, match="pickle can run code"):
        load_adapter(tmp_path / "a", model, params)


def test_a_failed_save_leaves_nothing(tmp_path, tiny, monkeypatch):
    _, model, params = tiny
    method = lj.LoRA(rank=2)

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("lora_jax.pretrained.peft.write_sorted_json", fails)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        save_adapter(tmp_path / "a", model, method, trained(method, params))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("trains", ["all", "lora_only", "neither"])
def test_biases(tmp_path, trains):
    model, params = random_model(attention_bias=True)
    train = {"all": r"/bias$", "lora_only": r"(query|value)/bias$", "neither": r"query/bias$"}
    method = lj.LoRA(rank=2, train=(train[trains],))
    trainable = trained(method, params)
    if trains == "neither":  # kept all the same, in our own form
        with pytest.warns(UserWarning, match="biases of all modules or of all adapted"):
            save_adapter(tmp_path / "a", model, method, trainable)
    else:
        save_adapter(tmp_path / "a", model, method, trainable)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    if trains == "neither":
        assert config["peft_type"] == "LORA_JAX" and "biases of all" in config["reason"]
    else:
        assert config["bias"] == trains
    again, loaded = load_adapter(tmp_path / "a", model, params)
    same(loaded, trainable)
    assert again == method


def test_a_module_trained_in_part_is_saved_whole(tmp_path):
    model, params = random_model(attention_bias=True)
    method = lj.LoRA(rank=2, train=(r"out/bias$",))
    trainable = trained(method, params)
    with pytest.raises(lj.UserError, match="give save_adapter params="):
        save_adapter(tmp_path / "a", model, method, trainable)
    save_adapter(tmp_path / "a", model, method, trainable, params=params)
    again, loaded = load_adapter(tmp_path / "a", model, params)
    assert again == method
    same(loaded, trainable)  # what PEFT needs besides is left out again
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "numpy") as file:
        stored = file.get_tensor("base_model.model.model.layers.1.self_attn.o_proj.weight")
    kernel = partition.flatten(params)["layers[0:3]/attention/out/kernel"]
    np.testing.assert_array_equal(stored, kernel[1].T)


def test_names_that_peft_would_understand_otherwise():
    every = ["m.a_norm", "m.norm", "m.0.q", "m.1.q", "m.10.q"]
    assert short_names(["m.norm"], every) == ["m.norm"]  # "norm" would be a_norm too
    assert short_names(["m.0.q", "m.1.q", "m.10.q"], every) == ["q"]
    pattern = pattern_of({"m.0.q": 2, "m.1.q": 4, "m.10.q": 2}, 2)
    assert pattern == {"m.1.q": 4}
    assert [lookup(pattern, m, 2) for m in every[2:]] == [2, 4, 2]
