"""Folders: what is written is what is read, slice by slice, and mistakes are all named at once."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from random_llama import random_model
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import partition
from lora_jax.pretrained import base_sha256, load_pretrained, save_pretrained
from lora_jax.pretrained.folder import Folder


def rewrite(folder, change):
    """Rewrites model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def equal(a, b):
    a, b = partition.flatten(a), partition.flatten(b)
    assert list(a) == list(b)
    for path in a:
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, tokens, tied):
    model, params = random_model(tie_word_embeddings=tied)
    save_pretrained(tmp_path / "m", model, params)
    again, loaded = load_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert ("head" in loaded) is not tied
    equal(loaded, params)
    kernel = loaded["layers[0:3]"]["mlp"]["down"]["kernel"]
    stored = load_file(tmp_path / "m" / "model.safetensors")
    np.testing.assert_array_equal(kernel[1], stored["model.layers.1.mlp.down_proj.weight"].T)


def test_segments_are_saved_like_one_stack(tmp_path, tiny):
    folder, model, params = tiny
    save_pretrained(tmp_path / "cut", model, partition.split_stacks(params, {"layers": [1]}))
    equal(load_pretrained(tmp_path / "cut")[1], load_pretrained(folder)[1])


def test_shards_of_a_file_and_their_fingerprint(tmp_path, tiny):
    folder, _, params = tiny
    tensors = load_file(folder / "model.safetensors")
    split = tmp_path / "split"
    split.mkdir()
    (split / "config.json").write_bytes((folder / "config.json").read_bytes())
    weight_map, lines = {}, ""
    for part in range(2):
        name = f"model-0000{part + 1}-of-00002.safetensors"
        chosen = {n: t for i, (n, t) in enumerate(sorted(tensors.items())) if i % 2 == part}
        save_file(chosen, split / name)
        weight_map |= dict.fromkeys(chosen, name)
        lines += f"{hashlib.sha256((split / name).read_bytes()).hexdigest()}  {name}\n"
    index = split / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    equal(load_pretrained(split)[1], params)
    assert base_sha256(split) == hashlib.sha256(lines.encode()).hexdigest()
    whole = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert base_sha256(folder) == whole
    (split / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(lj.UserError, match="model-00002-of-00002"):
        load_pretrained(split)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files(tiny, stored):
    folder, _, params = tiny
    rewrite(folder, lambda t: t.update({n: x.astype(stored) for n, x in t.items()}))
    loaded = load_pretrained(folder)[1]
    want = jax.tree.map(lambda x: x.astype(stored).astype(np.float32), params)
    equal(loaded, want)
    model, low = load_pretrained(folder, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(low)} == {jnp.dtype("bfloat16")}
    assert model.config.dtype == "bfloat16"


def test_bfloat16_is_saved_as_bfloat16(tmp_path, tiny):
    folder, model, _ = tiny
    low = load_pretrained(folder, dtype="bfloat16")[1]
    save_pretrained(tmp_path / "low", model, low)
    assert json.loads((tmp_path / "low" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    equal(load_pretrained(tmp_path / "low", dtype="bfloat16")[1], low)


def test_each_device_reads_only_its_slice(tiny, monkeypatch):
    folder, _, params = tiny
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    sizes: dict[str, set[int]] = {}
    read = Folder.read

    def counted(self, name, index=()):
        out = read(self, name, index)
        sizes.setdefault(name, set()).add(out.size)
        return out

    monkeypatch.setattr(Folder, "read", counted)
    rules = (
        (r"attention/out$", PartitionSpec("fsdp", None)),
        (r"mlp/", PartitionSpec(None, "fsdp")),
    )
    _, loaded = load_pretrained(folder, mesh=mesh, shardings=rules)
    equal(loaded, params)
    gate = loaded["layers[0:3]"]["mlp"]["gate"]["kernel"]
    assert gate.sharding == NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    assert sizes["model.layers.0.mlp.gate_proj.weight"] == {16 * 24 // 4}
    assert sizes["model.layers.2.self_attn.o_proj.weight"] == {16 * 16 // 4}
    assert loaded["final_norm"]["scale"].sharding == NamedSharding(mesh, PartitionSpec())


def test_shardings_as_a_tree_and_as_a_function(tiny):
    folder, _, params = tiny
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    equal(load_pretrained(folder, shardings=jax.tree.map(lambda _: place, params))[1], params)
    equal(load_pretrained(folder, shardings=lambda path, shape: place)[1], params)
    with pytest.raises(lj.UserError, match="need a mesh"):
        load_pretrained(folder, shardings=((".*", PartitionSpec()),))


def test_one_error_lists_every_tensor_that_does_not_fit(tiny):
    folder, _, _ = tiny

    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weigth"] = tensors.pop(
            "model.layers.1.mlp.up_proj.weight"
        )
        tensors["model.norm.weight"] = np.ones(8, np.float32)
        tensors["model.layers.0.mlp.extra"] = np.ones(8, np.float32)

    rewrite(folder, spoil)
    with pytest.raises(lj.UserError) as error:
        load_pretrained(folder)
    text = str(error.value)
    assert "missing (1): model.layers.1.mlp.up_proj.weight (nearest: model.layers.1.mlp.up" in text
    assert "unknown (2)" in text and "model.layers.0.mlp.extra" in text
    assert "model.norm.weight is [8], should be [16]" in text


def test_pickles_are_refused(tiny):
    folder, _, _ = tiny
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(lj.UserError, match="pickle can run code"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rematt": "full"}, "did you mean remat"),
        ({"dtype": "int8"}, "not a floating dtype"),
    ],
)
def test_wrong_options(tiny, options, match):
    with pytest.raises(lj.UserError, match=match):
        load_pretrained(tiny[0], **options)


def test_a_damaged_file_and_a_damaged_config(tiny):
    folder, _, _ = tiny
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(lj.UserError, match="not a whole safetensors file"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(lj.UserError, match="not valid JSON"):
        load_pretrained(folder)


def test_a_failed_save_leaves_the_old_files(tiny, monkeypatch):
    folder, model, params = tiny
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("lora_jax.pretrained.load.write_sorted_json", fails)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(folder, model, doubled)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_unmerged_parameters_are_not_saved(tmp_path, tiny):
    _, model, params = tiny
    method = lj.LoRA(rank=2)
    variables = method.combine(params, method.init(jax.random.key(0), params))
    with pytest.raises(lj.UserError, match="merge first"):
        save_pretrained(tmp_path / "x", model, variables["params"])


def test_a_tied_head_of_another_matrix_is_not_dropped(tmp_path):
    """As transformers, which does not tie two tensors that differ."""
    model, params = random_model(tie_word_embeddings=False)
    save_pretrained(tmp_path, model, params)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(lj.UserError, match="load it with tied=False"):
        load_pretrained(tmp_path)
    equal(load_pretrained(tmp_path, tied=False)[1], params)
    load_pretrained(tmp_path, head="classification", num_labels=2)  # which has no such head
    copied = {"lm_head.weight": np.asarray(params["embed"]["embedding"])}
    rewrite(tmp_path, lambda tensors: tensors.update(copied))
    assert "head" not in load_pretrained(tmp_path)[1]
