"""A folder whose matrices bitsandbytes quantised loads as the numbers that they stand for."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from random_llama import random_model
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import partition
from lora_jax.pretrained.load import draw
from lora_jax.tensors.nf4 import nf4

ASKED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


GPT2 = {"model_type": "gpt2", "vocab_size": 30, "n_embd": 64, "n_layer": 2, "n_head": 2}


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


def written(folder, model, params, layers, *, nested=True, inputs_first=False):
    """(a folder of bitsandbytes', one with the numbers that it stands for).

    Args:
      inputs_first: the dense layers are (in, out), as GPT-2's, and turned to be quantised.
    """
    lj.save_pretrained(folder / "dense", model, params)
    dense = load_file(folder / "dense" / "model.safetensors")
    quantised = {}
    for name, tensor in dense.items():
        if not (name.endswith("weight") and any(x in name for x in layers)):
            quantised[name] = tensor
            continue
        q = nf4(tensor if inputs_first else tensor.T)
        numbers = np.asarray(q.dense())
        dense[name] = np.ascontiguousarray(numbers if inputs_first else numbers.T)
        quantised |= parts(name, q, nested)
    save_file(dense, folder / "dense" / "model.safetensors")
    shutil.copytree(folder / "dense", folder / "nf4")
    save_file(quantised, folder / "nf4" / "model.safetensors")
    config = json.loads((folder / "dense" / "config.json").read_text())
    asked = json.dumps({**config, "quantization_config": ASKED})
    (folder / "nf4" / "config.json").write_text(asked)
    return folder / "nf4", folder / "dense"


@pytest.fixture(params=[True, False], ids=["nested", "plain"])
def folders(request, tmp_path):
    model, params = random_model(hidden_size=64, intermediate_size=128)
    return written(tmp_path, model, params, ("proj",), nested=request.param)


def test_gpt2s_layers_which_are_turned_load_too(tmp_path):
    model, params = draw(GPT2, 0)
    layers = ("c_attn", "c_proj", "c_fc")
    (_, ours), (_, meant) = map(
        lj.load_pretrained, written(tmp_path, model, params, layers, inputs_first=True)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, meant)


def changed(folder, name, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file)


UP = "model.layers.1.mlp.up_proj.weight"


def test_codes_may_be_kept_as_another_dtype(folders):
    changed(folders[0], UP, lambda x: x.reshape(-1).view(ml_dtypes.bfloat16)[:, None])
    (_, ours), (_, meant) = map(lj.load_pretrained, folders)
    jax.tree.map(np.testing.assert_array_equal, ours, meant)


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("", lambda x: x[:-32].copy(), "4064 bytes of codes and should have 4096"),
        (".absmax", lambda x: x[:-1].copy(), "127 absmax and should have 128"),
        (".quant_state.bitsandbytes__nf4", lambda x: x[:-9].copy(), "damaged: get the file again"),
    ],
)
def test_a_damaged_part_is_named(folders, part, change, match):
    changed(folders[0], UP + part, change)
    with pytest.raises(lj.UserError, match=match):
        lj.load_pretrained(folders[0])


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
