"""`lora-jax analyze` on runs, adapter folders and models, and PEFT's own numbers."""

import dataclasses
import json
import re
import shutil
import warnings

import jax
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import analysis, atomic, cli, inside, partition, pretrained, runs
from lora_jax.errors import UserError
from lora_jax.experiment import from_dict, to_dict
from lora_jax.inside import comparing, opening, plots, report

HF = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40,
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def noise(tree, seed, size=0.1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + np.float32(size) * rng.normal(size=x.shape).astype("f"), tree)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """`base`, and adapters of it: `r2`, `r4` (another seed) and `dora`."""
    root = tmp_path_factory.mktemp("analyze")
    model = pretrained.build_model(HF)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    pretrained.save_pretrained(
        root / "base", model, jax.tree.map(lambda x: np.zeros(x.shape, "f"), shapes)
    )
    params = noise(jax.tree.map(lambda x: np.zeros(x.shape, "f"), shapes), 0, 0.3)
    pretrained.save_pretrained(root / "base", model, params)
    model, params = pretrained.load_pretrained(root / "base")
    for seed, (name, method) in enumerate({
        "r2": lj.LoRA(rank=2, alpha=4.0, targets="query|down|embed"),
        "r4": lj.LoRA(rank=4, alpha=3.0, scaling="rslora", targets="query|down|embed"),
        "dora": lj.METHODS["dora"](rank=2, alpha=4.0, targets="query"),
    }.items()):  # fmt: skip
        trainable = noise(method.init(jax.random.key(seed), params), seed + 1)
        pretrained.save_adapter(root / name, model, method, trainable, params=params)
    return root


def run(*words):
    return cli.main(["analyze", "--quiet", *map(str, words)])


def finished_run(folder, config, seed):
    """A workdir as a run leaves it, its adapter moved at random rather than trained."""
    experiment = from_dict(config)
    folder.mkdir()
    atomic.write_json(folder / "config.json", to_dict(experiment))
    atomic.write_json(folder / runs.RESULT, {"status": "finished"})
    model, params = pretrained.load_pretrained(experiment.model.source)
    trainable = noise(experiment.method.init(jax.random.key(seed), params), seed)
    pretrained.save_adapter(folder / "adapter", model, experiment.method, trainable, params=params)


def test_a_run_against_another(tiny_config, tmp_path, capsys):
    """From two runs of another seed to tables and plots."""
    for seed in (0, 1):
        config = tiny_config(method={"targets": "query|down"})
        finished_run(tmp_path / f"s{seed}", config, seed)
    capsys.readouterr()
    out = tmp_path / "out"
    assert run(tmp_path / "s0", "--against", tmp_path / "s1", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "4 matrices" in printed and "attention/query" in printed and "captured" in printed
    frame = pd.read_csv(out / "matrices.csv")
    bench, method, trainable = runs.load_run(tmp_path / "s0")
    again = inside.adapter(method, trainable, bench.params)
    pd.testing.assert_frame_equal(frame, again.astype({"layer": int}), rtol=1e-4)
    against = pd.read_csv(out / "against.csv")
    assert len(against) == 4 and against["a_all"].between(0, 1).all()
    grid = pd.read_csv(out / "similarity.csv").set_index(["path", "i", "j"])["phi"]
    pd.testing.assert_series_equal(
        grid[:, 2, 2], against.set_index("path")["a_all"], check_names=False
    )
    expected = {"maps", "spectra", "energy", "similarity", "similarity_to_base", "against_maps",
                "against_energy"}  # fmt: skip
    assert {p.stem for p in out.glob("*.png")} == expected
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in out.glob("*.png"))
    # The run's own adapter, without its base: the same spectra under PEFT's names.
    alone = inside.matrices(inside.open_updates(tmp_path / "s0" / "adapter"))
    assert set(alone["module"]) == {"self_attn.q_proj", "mlp.down_proj"}
    assert "norm_w" not in alone
    np.testing.assert_allclose(sorted(alone["norm"]), sorted(frame["norm"]), rtol=1e-5)
    # An adapter's folder beside a run is read on the run's base.
    assert run(tmp_path / "s0" / "adapter", "--against", tmp_path / "s1", "--no-weights") == 0
    assert "intruders" not in capsys.readouterr().out


def test_a_random_start_is_no_base_to_read(tiny_images, tmp_path):
    """A shape's `source` is not where its weights are from; nothing is loaded for the other."""
    config = tiny_images(method={"kind": "lora", "rank": 2, "targets": "hidden_0", "train": ()})
    del config["method"]["dimension"]
    experiment = from_dict(config)
    folder = tmp_path / "run"
    folder.mkdir()
    atomic.write_json(folder / "config.json", to_dict(experiment))
    assert opening.is_run(folder) and opening.base_of(folder) is None
    atomic.write_json(
        folder / "config.json",
        {
            **to_dict(experiment),
            "model": {
                **to_dict(experiment)["model"],
                "shape": None,
                "source": "here",
                "init_seed": None,
            },
        },
    )
    assert opening.base_of(folder) == "here"


def test_an_adapter_that_was_never_trained(work, tmp_path):
    """B is zero: it has directions of A alone, and figures of what there is."""
    model, params = pretrained.load_pretrained(work / "base")
    method = lj.LoRA(rank=2, alpha=4.0, targets="query")
    trainable = method.init(jax.random.key(0), params)
    pretrained.save_adapter(tmp_path / "new", model, method, trainable, params=params)
    for side, drawn in (("a", True), ("out", False)):
        out = tmp_path / side
        words = ("--base", work / "base", "--side", side, "--out", out, "--against", work / "r2")
        assert run(tmp_path / "new", *words) == 0
        assert (out / "similarity.png").exists() == drawn
        assert (out / "similarity_to_base.png").exists() == drawn


def test_a_base_of_another_shape_is_named(work):
    found = inside.open_updates(work / "r2")
    wider = [
        dataclasses.replace(x, shape=(x.shape[0], 99), factors=(x.factors[0], np.ones((2, 99))))
        for x in found
    ]
    with pytest.raises(UserError, match=r"in one and \[\d+, 99\] in the other.*same base"):
        inside.compare(found, wider)


def test_frozen_copies_in_a_file_were_not_trained(work, tmp_path, caplog):
    """PEFT saves the embedding beside factors on it; a saved head is another matter."""
    shutil.copytree(work / "r2", tmp_path / "r2")
    file = tmp_path / "r2" / opening.TENSORS
    tensors = load_file(file)
    for name in ("embed_tokens.base_layer", "lm_head"):
        tensors[f"base_model.model.model.{name}.weight"] = np.ones((40, 16), np.float32)
    save_file(tensors, file)
    assert len(inside.open_updates(tmp_path / "r2")) == 5
    assert "lm_head" in caplog.text and "base_layer" not in caplog.text


def test_a_map_of_an_infinite_amplification(work):
    """Where the base is zero, as a start may be, any update is infinitely more: a scale of
    colours that reached so far would show all others as one."""
    found = inside.open_updates(work / "r2", base=work / "base", modules="query")
    zero = np.zeros(found[0].shape, np.float32)
    frame = inside.matrices([dataclasses.replace(found[0], weight=lambda: zero), *found[1:]])
    assert np.isinf(frame["amplification"][0])
    images = [image for axes in plots.maps(frame).axes for image in axes.images]
    assert images and all(np.isfinite(image.get_clim()).all() for image in images)


def test_a_folder_with_and_without_its_base(work, capsys):
    on_base = inside.open_updates(work / "r4", base=work / "base")
    alone = inside.open_updates(work / "r4")
    assert len(on_base) == len(alone) == 5
    names = {"embed": "model.embed_tokens", "layers/1/mlp/down": "model.layers.1.mlp.down_proj"}
    by_path = {x.path: x for x in alone}
    for x in on_base:
        if x.path in names:
            y = by_path[names[x.path]]
            assert (x.shape, x.rank) == (y.shape, y.rank)
            np.testing.assert_allclose(x.singular_values(), y.singular_values(), rtol=1e-5)
            for side in ("a", "out"):
                u, v = x.directions(side), y.directions(side)
                assert analysis.similarity(u, v, 2, 2) == pytest.approx(1.0, abs=1e-5)
    assert run(work / "r2", "--against", work / "r4", "--modules", "down") == 0
    printed = capsys.readouterr().out
    assert "2 matrices" in printed and "2 of them in common" in printed


def test_a_model_trained_whole(work, tmp_path, capsys):
    model, params = pretrained.load_pretrained(work / "base")
    method, trainable = pretrained.load_adapter(work / "r2", model, params)
    pretrained.save_pretrained(tmp_path / "merged", model, method.merge(params, trainable))
    assert run(tmp_path / "merged", "--base", work / "base") == 2
    assert "--dense" in capsys.readouterr().err
    found = inside.open_updates(tmp_path / "merged", base=work / "base", dense=True)
    frame = inside.compare(inside.open_updates(work / "r2", base=work / "base"), found)
    assert len(found) == len(frame) == 5  # all others are as they were
    np.testing.assert_allclose(frame["captured"], 1.0, rtol=1e-4)
    words = (
        "--against",
        tmp_path / "merged",
        "--dense",
        "--base",
        work / "base",
        "--modules",
        "down",
    )
    assert run(work / "r2", *words, "--out", tmp_path / "out") == 0
    assert "in_all" in pd.read_csv(tmp_path / "out" / "against.csv")


def test_a_model_of_another_vocabulary(tmp_path, work, capsys):
    model = pretrained.build_model({**HF, "vocab_size": 41})
    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    pretrained.save_pretrained(tmp_path / "tuned", model, params)
    assert run(tmp_path / "tuned", "--base", work / "base", "--dense") == 2
    message = capsys.readouterr().err
    assert "'embed/embedding' is [41, 16] as trained and [40, 16] in the base" in message


def test_the_comparison_tracks_pairs_as_they_are_done(work, monkeypatch):
    events, compared = [], comparing._row

    def row(mine, theirs):
        events.append("row")
        return compared(mine, theirs)

    def shown(found, what, options):
        for x in found:
            if what == "comparison":
                events.append("shown")
            yield x

    monkeypatch.setattr(comparing, "_row", row)
    monkeypatch.setattr(report, "_shown", shown)
    assert run(work / "r2", "--against", work / "r4") == 0
    assert events == ["shown", "row"] * 5


def test_adapters_of_layers_that_are_cut(work, tmp_path):
    """Opened on a base whose layers are whole: it is cut as the adapter needs it."""
    model, params = pretrained.load_pretrained(work / "base")
    for name, method, modules in (
        ("ft_top", lj.METHODS["ft_top"](layers=1), "layers/1/"),
        ("subspace", lj.METHODS["subspace"](dimension=6, targets="layers/1/.*kernel"), "layers/1/"),
        ("lora", lj.LoRA(rank=2, targets="query", train=("layers/0/mlp/up/",)), "query|0/mlp/up"),
    ):
        cut = method.arrange(params)
        trainable = noise(method.init(jax.random.key(0), cut), 1)
        pretrained.save_adapter(tmp_path / name, model, method, trainable, params=cut)
        found = inside.open_updates(tmp_path / name, base=work / "base", dense=True)
        assert {x.path for x in found} >= {"layers/1/attention/query"}
        assert all(re.search(modules, x.path) for x in found)
        after = partition.flatten(method.merge(cut, trainable))
        before = partition.flatten(cut)
        for x in found:
            at = f"layers[{x.layer}:{x.layer + 1}]/{x.module}/kernel"
            delta = np.asarray(after[at] - before[at])[0]
            s = np.linalg.svd(delta, compute_uv=False)
            np.testing.assert_allclose(
                x.singular_values(), s[: len(x.singular_values())], atol=1e-5
            )
    # PEFT's files, with a module of one layer in modules_to_save.
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.layers.0.mlp.up_proj"]
    # As PEFT writes it, which knows no method of ours.
    file = tmp_path / "lora" / opening.TENSORS
    save_file(load_file(file), file)
    assert len(inside.open_updates(tmp_path / "lora", base=work / "base", dense=True)) == 3


def test_a_prefix_beside_a_module_of_one_layer(work, tmp_path):
    model, params = pretrained.load_pretrained(work / "base")
    method = lj.METHODS["prefix_tuning"](length=2, train=("layers/1/mlp/up/",))
    cut = method.arrange(params)
    trainable = noise(method.init(jax.random.key(0), cut), 1)
    pretrained.save_adapter(tmp_path / "prefix", model, method, trainable, params=cut)
    names = [n for n in load_file(tmp_path / "prefix" / opening.TENSORS) if "up_proj" in n]
    assert names == ["base_model.model.layers.1.mlp.up_proj.weight"]
    found = inside.open_updates(tmp_path / "prefix", base=work / "base", dense=True)
    assert [x.path for x in found] == ["layers/1/mlp/up"]


def test_what_is_refused_says_what_to_do(work, tmp_path, capsys):
    def error(*words):
        assert run(*words) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "give --base" in error(work / "dora")
    assert "--dense" in error(work / "dora", "--base", work / "base")
    assert run(work / "dora", "--base", work / "base", "--dense") == 0
    capsys.readouterr()
    with pytest.raises(UserError, match=r"no matrix in common.*--base"):
        on_base = inside.open_updates(work / "r2", base=work / "base")
        inside.compare(on_base, inside.open_updates(work / "r4"))
    assert "holds no adapter" in error(work / "base")
    assert "side must be" in error(work / "r2", "--side", "left")
    for option in ("--top", "--directions"):
        assert "one direction or more" in error(work / "r2", option, "0")
    moved = tmp_path / "pissa"
    shutil.copytree(work / "r2", moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    assert "changes the base" in error(moved)  # A·B alone is not what it did


def test_peft_agrees(work, tmp_path):
    """PEFT's own delta weights and its search for intruders, on an adapter it wrote."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    intruders = pytest.importorskip("peft.tuners.lora.intruders")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForCausalLM.from_pretrained(work / "base")
        options = {
            "target_modules": ["q_proj", "up_proj", "o_proj"], "r": 3, "lora_alpha": 5,
            "rank_pattern": {"o_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 7},
            "use_rslora": True,
        }  # fmt: skip
        theirs = peft.get_peft_model(base, peft.LoraConfig(**options))
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.4 * torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path / "theirs")
        deltas = {
            name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
            for name, layer in theirs.named_modules()
            if hasattr(layer, "get_delta_weight")
        }
        lines = []
        intruders.reduce_intruder_dimension(
            theirs, top_k=6, threshold_epsilon=0.6, logging_sink=lines.append
        )
    alone = inside.open_updates(tmp_path / "theirs")
    assert {x.path for x in alone} == set(deltas)
    for x in alone:
        expected = np.linalg.svd(deltas[x.path].numpy(), compute_uv=False)
        np.testing.assert_allclose(x.singular_values(), expected[: x.rank], rtol=1e-4)
    frame = inside.matrices(
        inside.open_updates(tmp_path / "theirs", base=work / "base"), k=6, epsilon=0.6
    )
    counted = {}
    for line in lines:
        if match := re.match(r"base_model\.model\.model\.(layers\.\d+)\S*\.(\w+)_proj: (.*)", line):
            number = re.search(r"\d+", match[3])
            counted[match[1].replace(".", "/"), match[2]] = int(number[0]) if number else 0
    names = {"query": "q", "out": "o", "up": "up"}
    for row in frame.itertuples():
        layer, short = f"layers/{row.layer}", names[row.module.rsplit("/", 1)[1]]
        assert row.intruders == counted[layer, short], row.path
    assert len(counted) == 6 and len(set(counted.values())) > 1


def test_nothing_heavy_is_imported_before_it_is_used():
    import subprocess
    import sys

    code = "import sys; from lora_jax import analysis, inside; "
    code += "print([m for m in ('pandas', 'matplotlib', 'flax') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_classifier_and_its_head(tmp_path, caplog):
    """An adapter for classes brings its number of labels; the head itself is no update."""
    model = pretrained.build_model(HF, {"head": "classification", "num_labels": 3})
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    params = noise(jax.tree.map(lambda x: np.zeros(x.shape, "f"), shapes), 0)
    pretrained.save_pretrained(tmp_path / "base", model, params)
    model, params = pretrained.load_pretrained(tmp_path / "base")
    for name in ("lora", "lora_xs"):  # PEFT's form, and our own
        method = lj.METHODS[name](rank=2, targets="value", train=("^head/",))
        trainable = noise(method.init(jax.random.key(0), params), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pretrained.save_adapter(tmp_path / name, model, method, trainable, params=params)
        found = inside.open_updates(tmp_path / name, base=tmp_path / "base")
        assert [x.path for x in found] == [f"layers/{i}/attention/value" for i in (0, 1)]
        merged = partition.flatten(method.merge(params, trainable))
        for path, x in merged.items():
            if path.endswith("value/kernel"):
                delta = np.asarray(x)[0] - np.asarray(partition.flatten(params)[path])[0]
                s = np.linalg.svd(delta, compute_uv=False)[:2]
                # The last layer is a segment of its own: a scoring head reads one position.
                layer = [x.path for x in found].index(partition.module(partition.expand(path)[0]))
                np.testing.assert_allclose(found[layer].singular_values(), s, rtol=1e-3)
    assert "head/kernel" in caplog.text
    with pytest.raises(UserError, match="lora_xs, in lora_jax's own form"):
        inside.open_updates(tmp_path / "lora_xs")


def test_the_labels_of_a_head_with_a_layer_before_its_scores(tmp_path):
    """BERT's has a dense kernel [d, d], which comes first in the file."""
    hf = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 40, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }  # fmt: skip
    model = pretrained.build_model(hf)
    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    pretrained.save_pretrained(tmp_path / "base", model, params)
    model, params = pretrained.load_pretrained(
        tmp_path / "base", head="classification", num_labels=3
    )
    method = lj.METHODS["lora_xs"](rank=2, targets="value", train=("^head/",))
    trainable = noise(method.init(jax.random.key(0), params), 1)
    pretrained.save_adapter(tmp_path / "xs", model, method, trainable, params=params)
    found = inside.open_updates(tmp_path / "xs", base=tmp_path / "base")
    assert [x.path for x in found] == [f"layers/{i}/attention/value" for i in (0, 1)]
