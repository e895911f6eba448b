"""A folder whose matrices bitsandbytes quantised loads as the numbers that they stand for."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from random_llama import random_model
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import partition
from lora_jax.tensors.nf4 import nf4

ASKED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def parts(name, q, nested):
    """What bitsandbytes writes for a weight."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(q.stored)}
    found = {name: np.asarray(q.codes)[:, None], f"{name}.quant_map": np.zeros(16, np.float32)}
    found[f"{name}.absmax"] = np.asarray(q.absmax if nested else q.magnitudes())
    if nested:
        state |= {"nested_blocksize": 256, "nested_offset": float(q.offset)}
        found[f"{name}.nested_absmax"] = np.asarray(q.nested)
        found[f"{name}.nested_quant_map"] = np.zeros(256, np.float32)
    packed = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return found | {f"{name}.quant_state.bitsandbytes__nf4": packed}


@pytest.fixture(params=[True, False], ids=["nested", "plain"])
def folders(request, tmp_path):
    """(a folder of bitsandbytes', one with the numbers that it stands for)."""
    lj.save_pretrained(tmp_path / "dense", *random_model(hidden_size=64, intermediate_size=128))
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    quantised = {}
    for name, tensor in dense.items():
        if "proj" not in name:
            quantised[name] = tensor
            continue
        q = nf4(tensor.T)
        dense[name] = np.ascontiguousarray(np.asarray(q.dense()).T)
        quantised |= parts(name, q, request.param)
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    shutil.copytree(tmp_path / "dense", tmp_path / "nf4")
    save_file(quantised, tmp_path / "nf4" / "model.safetensors")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    asked = json.dumps({**config, "quantization_config": ASKED})
    (tmp_path / "nf4" / "config.json").write_text(asked)
    return tmp_path / "nf4", tmp_path / "dense"


def test_it_loads_as_the_dense_one(folders):
    (_, ours), (_, meant) = map(lj.load_pretrained, folders)
    jax.tree.map(np.testing.assert_array_equal, ours, meant)
    again = partition.flatten(lj.quantize(ours, "nf4"))["layers[0:3]/mlp/up/kernel"]
    wanted = partition.flatten(meant)["layers[0:3]/mlp/up/kernel"]
    assert np.abs(np.asarray(again.dense()) - wanted).max() < 0.01 * np.abs(wanted).max()


def test_its_slices_go_to_their_shards(folders):
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    rules = ((".*/(up|query)/kernel$", PartitionSpec(None, "model")),)
    _, ours = lj.load_pretrained(folders[0], mesh=mesh, shardings=rules)
    _, meant = lj.load_pretrained(folders[1])
    kernel = partition.flatten(ours)["layers[0:3]/mlp/up/kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 64, 64)
    jax.tree.map(np.testing.assert_array_equal, ours, meant)


def test_a_part_that_is_lost_is_named(folders):
    file = folders[0] / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    save_file(tensors, file)
    with pytest.raises(lj.UserError, match=r"no tensor 'model.layers.1.mlp.up_proj.weight.absmax'"):
        lj.load_pretrained(folders[0])
