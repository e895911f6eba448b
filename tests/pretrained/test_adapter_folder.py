"""Adapter folders beyond PEFT's form: exact methods, any method's tree, and the base they fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import shutil
import typing

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_llama import random_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_peft import METHODS, same, trained

import lora_jax as lj
from lora_jax import methods, partition, pretrained
from lora_jax.methods import base
from lora_jax.models import FAMILIES
from lora_jax.pretrained import load_adapter, method_json, own_form, save_adapter, save_pretrained

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Shift(base.Method):
    """A method that PEFT does not know, with a tree of every kind of node."""

    size: float = 0.5
    rules: tuple[tuple[str, int], ...] = ()
    inner: base.Method | None = None

    def init(self, key, params):
        return {
            "sites/adapter": {"down": jnp.ones((2, 3)), "up": [jnp.zeros(3), (jnp.int8(4), None)]},
            "layers[0:3]/gate": jnp.full((3, 1), self.size, jnp.bfloat16),
            "scale": jnp.float16(2.5),
            "step": 3,
        }


@pytest.fixture
def shift(monkeypatch):
    monkeypatch.setattr(base, "METHODS", dict(base.METHODS))
    monkeypatch.setattr(method_json, "METHODS", base.METHODS)
    return base.register("shift")(Shift)


def header(folder):
    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        return file.metadata()


def rewrite(folder, **metadata):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {**header(folder), **metadata})


# The method, exactly.


def test_fields_that_peft_lacks_are_kept(tmp_path, tiny):
    _, model, params = tiny
    method = lj.LoRA(
        rank=((r"layers/1/", 3), (".*", 2)), alpha=1 / 3, init_scale=0.1,
        layouts=((r"attention", "bio"),), targets=(r"query$", r"attention/value$"),
    )  # fmt: skip
    trainable = trained(method, params)
    save_adapter(tmp_path / "a", model, method, trainable)
    again, loaded = load_adapter(tmp_path / "a", model, params)
    assert again == method and hash(again) == hash(method)
    same(loaded, trainable)


def test_an_edited_config_is_believed_over_the_header(tmp_path, tiny):
    _, model, params = tiny
    method = lj.LoRA(rank=2, alpha=8)
    save_adapter(tmp_path / "a", model, method, trained(method, params))
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text())))  # the same content
    assert load_adapter(tmp_path / "a", model, params)[0] == method
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 4}))
    assert load_adapter(tmp_path / "a", model, params)[0].alpha == 4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "lora2"}, "trained with the method 'lora2'.*did you mean lora"),
        ({"version": 2}, "later lora_jax"),
        ({"fields": {"rnak": 2}}, "no field 'rnak'.*did you mean rank"),
    ],
)
def test_headers_that_cannot_be_read(tmp_path, tiny, change, match):
    _, model, params = tiny
    method = lj.LoRA(rank=2)
    save_adapter(tmp_path / "a", model, method, trained(method, params))
    told = {**json.loads(header(tmp_path / "a")["lora_jax.method"]), **change}
    rewrite(tmp_path / "a", **{"lora_jax.method": json.dumps(told)})
    with pytest.raises(lj.UserError, match=match):
        load_adapter(tmp_path / "a", model, params)
    rewrite(tmp_path / "a", **{"lora_jax.method": "[]"})
    with pytest.raises(lj.UserError, match="damaged"):
        load_adapter(tmp_path / "a", model, params)


def test_methods_that_cannot_be_described(shift):
    assert method_json.from_json(
        method_json.to_json(shift(np.float32(0.5), (("a", 1),), lj.LoRA(rank=3))), "x"
    ) == shift(0.5, (("a", 1),), lj.LoRA(rank=3))
    with pytest.raises(lj.UserError, match=r"shift.rules holds a ArrayImpl"):
        method_json.to_json(shift(rules=(("a", jnp.ones(2)),)))

    class Unregistered(lj.LoRA):
        pass

    with pytest.raises(lj.UserError, match="register"):
        method_json.to_json(Unregistered())


# Our own form.


def test_any_tree_of_any_method(tmp_path, shift):
    model, params = random_model()
    method = shift(0.25, (("a", 1),))
    trainable = method.init(KEY, params)
    save_adapter(tmp_path / "a", model, method, trainable)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["method"]) == ("LORA_JAX", "shift")
    again, loaded = load_adapter(tmp_path / "a", model, params)
    assert again == method and list(loaded) == list(trainable)
    assert jax.tree.structure(loaded) == jax.tree.structure(trainable)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(trainable), strict=True):
        assert type(a) is type(b)
        if hasattr(b, "dtype"):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("train", [(".*",), (r"^head", r"final_norm")])
def test_full_fine_tuning(tmp_path, tiny, tokens, train):
    _, model, params = tiny
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    method = lj.FullFineTuning(train=train)
    trainable = jax.tree.map(lambda x: 2 * x, method.init(KEY, params))
    save_adapter(tmp_path / "a", model, method, trainable)
    again, loaded = load_adapter(tmp_path / "a", model, params)
    assert again == method
    same(loaded, trainable)
    assert {x.dtype.name for x in loaded.values()} == {"bfloat16"}
    wide, params = random_model(vocab_size=40)
    with pytest.raises(lj.UserError, match=r"is \[(16, )?32(, 16)?\], the model's is \[.*40"):
        load_adapter(tmp_path / "a", wide, params)


def test_layers_must_be_cut_alike(tmp_path, tiny):
    _, model, params = tiny
    cut = partition.split_stacks(params, {"layers": [1, 2]})
    method = lj.FullFineTuning(train=(r"layers/1/mlp",))
    trainable = method.init(KEY, cut)
    save_adapter(tmp_path / "a", model, method, trainable)
    same(load_adapter(tmp_path / "a", model, cut)[1], trainable)
    with pytest.raises(lj.UserError, match=r"split_stacks\(params, \{'layers': \[1, 2\]\}\)"):
        load_adapter(tmp_path / "a", model, params)


def test_lora_of_a_network_that_transformers_lacks(tmp_path):
    """Its files have our names, so there is no form of PEFT's; and nothing to warn of."""
    model = pretrained.build_model({"model_type": "mlp", "image_shape": (4, 4, 1), "widths": (6,)})
    params = model.init(KEY, jnp.zeros((1, 4, 4, 1)))["params"]
    method = lj.LoRA(rank=2, targets=r"hidden_0$", train=("^head/",))
    trainable = jax.tree.map(lambda x: x + 1, method.init(KEY, params))
    save_adapter(tmp_path / "a", model, method, trainable)
    again, loaded = load_adapter(tmp_path / "a", model, params)
    assert again == method
    same(loaded, trainable)


def test_models_without_a_name_table(tmp_path):
    params = {"w": jnp.ones((4, 3))}
    method = lj.LoRA(rank=2, targets="w$")
    trainable = method.init(KEY, params)
    with pytest.warns(UserWarning, match="names of a function are unknown"):
        save_adapter(tmp_path / "a", lambda p, x: x @ p["w"], method, trainable)
    again, loaded = load_adapter(tmp_path / "a", None, params)
    assert again == method
    same(loaded, trainable)


def test_a_method_made_from_lora_is_not_taken_for_lora(tmp_path, tiny, shift):
    _, model, params = tiny

    @base.register("lora_with_a_twist")
    @dataclasses.dataclass(frozen=True)
    class Twisted(lj.LoRA):
        pass

    method = Twisted(rank=2)
    trainable = method.init(KEY, params)
    save_adapter(tmp_path / "a", model, method, trainable)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA_JAX"
    again, loaded = load_adapter(tmp_path / "a", model, params)
    assert type(again) is Twisted
    same(loaded, trainable)


def test_the_most_particular_method_reads_a_file_of_peft(tmp_path, tiny, shift, monkeypatch):
    _, model, params = tiny
    monkeypatch.setattr("lora_jax.pretrained.peft.METHODS", base.METHODS)

    @base.register("particular", peft={"peft_type": "LORA", "use_rslora": True})
    @dataclasses.dataclass(frozen=True)
    class Particular(lj.LoRA):
        pass

    for scaling, cls in (("standard", lj.LoRA), ("rslora", Particular)):
        method = lj.LoRA(rank=2, scaling=scaling)
        save_adapter(tmp_path / scaling, model, method, trained(method, params))
        file = tmp_path / scaling / "adapter_model.safetensors"
        save_file(load_file(file), file)
        assert type(load_adapter(tmp_path / scaling, model, params)[0]) is cls


def test_what_our_own_form_cannot_hold(tmp_path):
    for value, match in ((KEY, "random key"), ("text", "is a str")):
        with pytest.raises(lj.UserError, match=match):
            own_form.tensors_of({"x": {"y": value}})
    with pytest.raises(lj.UserError, match="two arrays"):
        own_form.tensors_of({"x": {"y": np.ones(1)}, "x.y": np.ones(1)})
    with pytest.raises(lj.UserError, match="enable jax_enable_x64"):
        own_form.read(*own_form.tensors_of({"x": np.ones(2)}), {}, "here")
    for tree in (None, "[]", '{"x": "lost"}', "{"):
        with pytest.raises(lj.UserError, match="damaged"):
            own_form.read({}, tree, {}, "here")


# The folder and its base.


def test_saving_again_replaces_the_folder_whole(tmp_path, tiny):
    _, model, params = tiny
    first, second = METHODS["plain"], lj.FullFineTuning(train=(r"^head",))
    save_adapter(tmp_path / "a", model, first, trained(first, params))
    (tmp_path / "a" / "README.md").write_text("mine")
    save_adapter(tmp_path / "a", model, second, second.init(KEY, params))
    assert load_adapter(tmp_path / "a", model, params)[0] == second
    shutil.move(tmp_path / "a", tmp_path / ".a.old")  # a save that was killed
    assert load_adapter(tmp_path / "a", model, params)[0] == second
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"]  # fmt: skip


def test_the_base_is_remembered_and_another_one_is_refused(tmp_path, tiny, monkeypatch):
    folder, _, _ = tiny
    monkeypatch.chdir(tmp_path)
    model, params = lj.load_pretrained("base")
    monkeypatch.chdir("/")
    method = lj.LoRA(rank=2)
    trainable = trained(method, params)
    save_adapter(tmp_path / "a", model, method, trainable)
    sha = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert header(tmp_path / "a")["lora_jax.base_sha256"] == sha
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    same(load_adapter(tmp_path / "a", model, params)[1], trainable)

    changed, _ = random_model(seed=5)
    save_pretrained(tmp_path / "other", changed, jax.tree.map(lambda x: x + 1, params))
    other = lj.load_pretrained(tmp_path / "other")
    sha2 = hashlib.sha256((tmp_path / "other" / "model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(lj.UserError) as error:
        load_adapter(tmp_path / "a", *other)
    assert all(part in str(error.value) for part in (sha[:12], sha2[:12], "force=True"))
    same(load_adapter(tmp_path / "a", *other, force=True)[1], trainable)
    same(load_adapter(tmp_path / "a", *other, base_sha256=sha)[1], trainable)
    # A file that is rewritten in place is hashed anew.
    save_pretrained(folder, changed, jax.tree.map(lambda x: x - 1, params))
    with pytest.raises(lj.UserError, match="another|force=True"):
        load_adapter(tmp_path / "a", model, params)


def test_a_model_that_was_not_loaded_has_no_base(tmp_path, tiny):
    folder, model, params = tiny
    method = lj.LoRA(rank=2)
    save_adapter(tmp_path / "a", model, method, trained(method, params))
    assert "lora_jax.base_sha256" not in header(tmp_path / "a")
    load_adapter(tmp_path / "a", *lj.load_pretrained(folder))
    save_adapter(tmp_path / "a", model, method, trained(method, params), base_sha256="ab" * 32)
    load_adapter(tmp_path / "a", model, params)  # nothing to compare it with


def test_a_base_that_is_gone_does_not_lose_the_adapter(tmp_path, tiny):
    folder, _, _ = tiny
    model, params = lj.load_pretrained(folder)
    shutil.rmtree(folder)
    method = lj.LoRA(rank=2)
    with pytest.warns(UserWarning, match="cannot be read any more"):
        save_adapter(tmp_path / "a", model, method, trained(method, params))
    assert "lora_jax.base_sha256" not in header(tmp_path / "a")


def test_where_a_model_came_from_is_no_part_of_it(tmp_path, tiny):
    folder, built, _ = tiny
    model, params = lj.load_pretrained(folder)
    assert model.config.source == str(folder) and built.config.source is None
    assert model == built and hash(model) == hash(built)
    assert model.config.source not in repr(model)
    save_pretrained(tmp_path / "again", model, params)
    assert "source" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert pickle.loads(pickle.dumps(model.config)).source == str(folder)


def test_every_family_remembers_its_source():
    for family in FAMILIES.values():
        config = typing.get_type_hints(family.config_from_hf)["return"]
        fields = {f.name: f for f in dataclasses.fields(config)}
        assert not fields["source"].compare


def test_the_registered_names_are_in_the_header(tmp_path, tiny):
    _, model, params = tiny
    for name in ("lora", "full"):
        method = methods.METHODS[name]()
        save_adapter(tmp_path / name, model, method, method.init(KEY, params))
        told = json.loads(header(tmp_path / name)["lora_jax.method"])
        assert (told["version"], told["method"]) == (1, name)
