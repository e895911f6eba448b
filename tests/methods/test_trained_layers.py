"""`train` may name some layers of a stack: a config's base is cut there, and everything goes on."""

import json

import jax
import pytest

import lora_jax as lj
from lora_jax import cli, runs
from lora_jax.experiment import from_dict, to_dict
from lora_jax.partition import flatten
from lora_jax.sweeps.sweep import Options, Sweep

METHODS = {
    "lora": {"kind": "lora", "rank": 2, "targets": "all-linear", "train": ("^layers/1/mlp/",)},
    "full": {"kind": "full", "train": ("^layers/0/",)},
    "adapters": {"kind": "adapter_h", "train": ("^layers/1/attention/",)},
}
TRAINED = {"lora": "layers[1:2]/mlp/up", "full": "layers[0:1]/mlp/up", "adapters": "layers[1:2]/"}


def configured(tiny_config, name):
    return {**tiny_config(training={"steps": 2}), "method": METHODS[name]}


@pytest.mark.parametrize("name", METHODS)
def test_such_a_run_ends_opens_and_is_analysed(name, tiny_config, tmp_path, capsys):
    runs.run(from_dict(configured(tiny_config, name)), tmp_path / "run", progress=False)
    bench, _, trainable = runs.load_run(tmp_path / "run")
    assert {"layers[0:1]", "layers[1:2]"} <= set(bench.params)
    assert any(path.startswith(TRAINED[name]) for path in flatten(trainable))
    assert cli.main(["analyze", str(tmp_path / "run"), "--quiet", "--dense"]) == 0
    assert "layers" in capsys.readouterr().out


def test_members_whose_base_is_cut_alike_share_it(tiny_config, tmp_path):
    """Of two layers either is cut off the other; patterns of no stack cut nothing."""
    trained = ("^layers/0/mlp/", "^layers/1/mlp/", "^final_norm/", "norm/")
    grid = {
        "train": [{"method.train": (pattern,)} for pattern in trained],
        "rank": [{"method.rank": r} for r in (1, 2)],
    }
    base = to_dict(from_dict(configured(tiny_config, "lora")))
    sweep = Sweep(base, grid, tmp_path / "sweep", Options(), False)
    benches = [id(sweep.bench(member)) for member in sweep.members]
    assert len(sweep.members) == 8 and len(set(benches)) == 2
    assert len(set(benches[:4])) == len(set(benches[4:])) == 1
    assert sweep.run()["packs"] == 4
    for member in sweep.members:
        result = json.loads((sweep.folder / member.name / "result.json").read_text())
        assert result["status"] == "finished"


def test_prompts_of_another_length_are_no_part_of_a_shared_base(tiny_config, tmp_path):
    fields = {"kind": "lora_prefix_embedding", "rank": 1, "prefix": 1, "targets": "all-linear"}
    config = {**tiny_config(training={"steps": 2}), "method": fields}
    grid = {"infix": [{"method.infix": n} for n in (0, 1, 1)]}
    sweep = Sweep(to_dict(from_dict(config)), grid, tmp_path / "sweep", Options(), False)
    assert [len(sweep.bench(m).placeholders) for m in sweep.members] == [0, 1]


def test_a_pattern_that_is_none_is_told(tiny_config, tmp_path, capsys):
    config = tmp_path / "config.py"
    made = {**configured(tiny_config, "lora")}
    made["method"] = {**made["method"], "train": ("mlp/(up",)}
    config.write_text(f"def get_config():\n    return {made!r}\n")
    assert cli.main(["run", str(config), "--workdir", str(tmp_path / "run")]) == 2
    assert "is not a regular expression" in capsys.readouterr().err


def test_galore_projects_some_layers(tiny_config, tmp_path):
    fields = {"kind": "galore", "train": (".*",), "targets": "layers/1/.*(query|value)", "rank": 2}
    config = {**tiny_config(training={"steps": 2}), "method": fields}
    runs.run(from_dict(config), tmp_path / "run", progress=False)
    _, method, trainable = runs.load_run(tmp_path / "run")
    assert {path.split("/")[0] for path in method.projected(trainable)} == {"layers[1:2]"}


def test_a_tree_without_such_layers_stays_as_it_is():
    params = {"layers[0:2]": {"w": jax.numpy.ones((2, 3))}, "head": {"w": jax.numpy.ones(3)}}
    assert lj.LoRA(train=("head",)).arrange(params) is params
