"""From a config to an adapter through the command line, on a tiny Llama made here."""

import json

import jax
import numpy as np
import pytest

from lora_jax import cli, config, experiment, models, pretrained, runs
from lora_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tiny_config, tmp_path_factory):
    """A folder with `tiny.py`, a config over the tiny base."""
    root = tmp_path_factory.mktemp("experiment")
    config = tiny_config(
        training={"steps": 4, "save_every": 2, "log_every": 1},
        optimizer={"learning_rate": 2e-2},
    )
    text = f"import json\ndef get_config(arg=''):\n    return json.loads({json.dumps(config)!r})\n"
    (root / "tiny.py").write_text(text)
    return root


def test_run_eval_merge_export(folder, capsys):
    work, tiny = folder / "run", str(folder / "tiny.py")
    command = ["run", tiny, "--workdir", str(work), "--quiet", "--config.method.rank=3"]
    assert cli.main(command) == 0
    result = json.loads((work / "result.json").read_text())
    assert result["config"]["method"]["rank"] == 3
    assert result["config"]["optimizer"]["b1"] == 0.9  # the saved config is complete
    assert set(result["metrics"]) == {"exact_match"}
    lines = (work / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for line in lines if "loss" in (row := json.loads(line))]
    assert losses[-1] < losses[0]
    assert cli.main(["eval", str(work)]) == 0
    assert cli.main(["export", str(work), str(folder / "out")]) == 0
    peft = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert peft["peft_type"] == "LORA" and peft["r"] == 3
    assert cli.main(["merge", str(work), str(folder / "merged")]) == 0
    run, method, trainable = runs.load_run(work)
    merged = pretrained.load_pretrained(folder / "merged")[1]
    for a, b in zip(
        jax.tree.leaves(merged), jax.tree.leaves(method.merge(run.params, trainable)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)
    capsys.readouterr()
    assert cli.main(command) == 2  # a finished run is never overwritten
    error = capsys.readouterr().err
    assert "finished run" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rnak=4", "did you mean rank"),
        ("method.kind=lroa", "did you mean lora"),
        ("optimizer.learning_rate=fast", "learning_rate must be float"),
        ("data.loss=some", "must be one of 'completion'"),
        ("data.loss=al", "did you mean all"),
        ("method.kind=[]", "kind is \\[\\]"),
        ("method.train=[1]", "must be str, not 1; in quotes"),
        ("data.buckets=('a',)", "must be int, not 'a'"),
        ("optimizer.groups=('query',2.0)", "must be a list of 2: str, float, not 'query'"),
        ("optimizer.groups=[['query']]", "must be a list of 2"),
        ("model.source=none", "in quotes, \"'none'\", it is text"),
    ],
)
def test_bad_overrides_name_the_nearest(folder, override, message):
    with pytest.raises(UserError, match=message):
        experiment.from_dict(config.load_file(str(folder / "tiny.py")), [override])


@pytest.mark.parametrize("words", [["eval", "runs/q"], ["list"], ["analyze", "runs/q"]])
def test_overrides_without_a_config_are_not_passed_over(words, capsys):
    assert cli.main([*words, "--config.seed=1"]) == 2
    assert "commands that take a config file" in capsys.readouterr().err


def test_quickstart_builds_and_is_complete():
    parsed = experiment.from_dict(config.load_file("configs/quickstart.py:steps=20,seed=3"))
    assert (parsed.training.steps, parsed.seed) == (20, 3)
    again = experiment.from_dict(json.loads(json.dumps(experiment.to_dict(parsed))))
    assert experiment.to_dict(again) == experiment.to_dict(parsed)
    with pytest.raises(UserError, match="did you mean steps"):
        config.load_file("configs/quickstart.py:step=20")


def test_arguments_have_the_types_of_their_defaults():
    defaults = {"folder": "", "steps": 3, "fast": False}
    found = config.parse_arg("folder=2024,fast,steps=4", **defaults)
    assert (found.folder, found.steps, found.fast) == ("2024", 4, True)
    assert config.parse_arg("folder=none", **defaults).folder == "none"
    assert config.literal("{[1]: 2}") == "{[1]: 2}"  # looks like Python and is none
    for arg, message in (("steps", "needs a value"), ("folder", "needs a value"),
                         ("steps=x", "must be int"), ("fast=1", "must be bool")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            config.parse_arg(arg, **defaults)


def test_a_config_file_may_define_dataclasses(tmp_path):
    (tmp_path / "c.py").write_text(
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass A:\n    x: int = 1\n"
        "def get_config():\n    return {'seed': A().x}\n"
    )
    assert config.load_file(str(tmp_path / "c.py")) == {"seed": 1}


def test_importing_the_package_loads_no_heavy_library():
    import subprocess
    import sys

    code = "import lora_jax, sys; print([m for m in ('orbax', 'tensorflow_datasets', 'pandas', "
    code += "'matplotlib', 'grain', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert "llama" in models.FAMILIES


def test_validation_records_may_be_of_a_source_of_their_own(tiny_config, tmp_path):
    """Another file, or another data set: what was learnt, on what it was not learnt from."""
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"q": f"{i}", "b": f"{i}"}) + "\n" for i in range(5)))
    mine = {"kind": "files", "path": str(path), "fields": {"a": "q", "b": "b"}}
    built = experiment.from_dict(
        tiny_config(data={"validation_source": mine, "validation": "[1:3]"})
    )
    assert experiment.from_dict(experiment.to_dict(built)) == built
    bench = runs.Workbench(built)
    assert bench.validation_records == [{"a": "1", "b": "1"}, {"a": "2", "b": "2"}]
    assert len(bench.train_records) == 200
    with pytest.raises(UserError, match=r"data\.validation_source must be a mapping with a kind"):
        experiment.from_dict(tiny_config(data={"validation_source": str(path)}))
    where = "data.validation_source"
    words = [f"{where}.kind=files", f"{where}.path={path}", "data.validation=[:1]"]
    again = runs.Workbench(experiment.from_dict(tiny_config(), words))
    assert again.validation_records == [{"q": "0", "b": "0"}]
    with pytest.raises(UserError, match=rf"{where} is none; set {where}\.kind first"):
        experiment.from_dict(tiny_config(), words[1:])
