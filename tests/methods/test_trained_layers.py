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


def test_members_with_equal_layers_share_a_base(tiny_config, tmp_path):
    layers = [{"method.train": (f"^layers/{i}/mlp/",)} for i in (0, 1)]
    grid = {"layers": layers, "rank": [{"method.rank": r} for r in (1, 2)]}
    base = to_dict(from_dict(configured(tiny_config, "lora")))
    sweep = Sweep(base, grid, tmp_path / "sweep", Options(), False)
    benches = {id(sweep.bench(member)) for member in sweep.members}
    assert len(sweep.members) == 4 and len(benches) == 2
    assert sweep.run()["packs"] == 2
    for member in sweep.members:
        result = json.loads((sweep.folder / member.name / "result.json").read_text())
        assert result["status"] == "finished"


def test_a_tree_without_such_layers_stays_as_it_is():
    params = {"layers[0:2]": {"w": jax.numpy.ones((2, 3))}, "head": {"w": jax.numpy.ones(3)}}
    assert lj.LoRA(train=("head",)).arrange(params) is params
