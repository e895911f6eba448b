"""A mistake is told before the first update, and leaves no workdir behind it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import cli, config, experiment, pretrained, runs
from lora_jax.data import loader
from lora_jax.sweeps.sweep import Options, Sweep
from lora_jax.workbench import Workbench

EVALUATION = {
    "a split that a file has not": ({"data": {"validation": "validation[:8]"}}, "names a split"),
    "no records": ({"data": {"validation": "[:0]"}}, "has no records to evaluate on"),
    "a field that is not there": (
        {"data": {"task": {"references_field": "answers"}}}, "answers",
    ),
    "too little text": (
        {"evaluation": {"forgetting": {"kind": "files", "path": "SHORT"}}}, "does not fill one",
    ),
}  # fmt: skip


def built(tiny_config, tmp_path, sections):
    (tmp_path / "short.txt").write_text("no")
    raw = tiny_config()
    for section, entries in sections.items():
        for name, value in entries.items():
            if isinstance(value, dict):
                value = {**(raw[section].get(name) or {}), **value}
                value = {k: str(tmp_path / "short.txt") if v == "SHORT" else v
                         for k, v in value.items()}  # fmt: skip
            raw[section][name] = value
    return experiment.from_dict(raw)


@pytest.mark.parametrize("name", EVALUATION)
def test_a_mistake_that_only_evaluation_meets(name, tiny_config, tmp_path):
    sections, message = EVALUATION[name]
    wrong = built(tiny_config, tmp_path, sections)
    with pytest.raises(lj.UserError, match=message):
        runs.run(wrong, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    base = experiment.to_dict(wrong)
    with pytest.raises(lj.UserError, match=message):
        Sweep(base, {"seed": [{"seed": 0}]}, tmp_path / "sweep", Options(), False).run()
    assert not (tmp_path / "sweep").exists()


def test_the_mended_command_goes_on_in_the_same_workdir(tiny_config, tmp_path, capsys):
    text = json.dumps(tiny_config())
    (tmp_path / "c.py").write_text(
        f"import json\ndef get_config():\n    return json.loads({text!r})"
    )
    command = ["run", str(tmp_path / "c.py"), "--workdir", str(tmp_path / "run"), "--quiet"]
    assert cli.main([*command, "--config.method.targets=nope"]) == 2
    assert "matches nothing" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["resumed_at"] == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.patience=-1", "training.patience=-1 must be at least 0"),
        ("data.batch_size=0", "data.batch_size=0 must be at least 1"),
        ("data.seed=-1", "data.seed=-1 must be at least 0"),
        ("evaluation.batch_size=0", "evaluation.batch_size=0 must be at least 1"),
        ("evaluation.base_shots=(0,-1)", "base_shots"),
        ("training.label_smoothing=1.0", r"must be in \[0, 1\)"),
        ("method.foo.bar=1", "method has no key 'foo'"),
    ],
)
def test_numbers_that_make_no_sense(override, message, tiny_config):
    with pytest.raises(lj.UserError, match=message):
        experiment.from_dict(tiny_config(), [override])


def test_no_records_to_train_on_is_said_as_that():
    with pytest.raises(lj.UserError, match="no records to train on"):
        loader.batches([], batch_size=2, length=8, seed=0, pad_id=0, buckets=(4,))


def test_a_run_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert runs._commit() is None


def test_several_processes_are_refused(monkeypatch, tiny_config, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(lj.UserError, match="2 processes"):
        runs.run(experiment.from_dict(tiny_config()), tmp_path / "run", progress=False)


# Another adapter to start from.


@pytest.fixture(scope="module")
def adapter(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model, params = lj.load_pretrained(tiny_config()["model"]["source"])
    method = lj.LoRA(rank=2, alpha=4.0, targets="all-linear")
    start = method.init(jax.random.key(0), params)
    lj.save_adapter(folder, model, method, jax.tree.map(lambda x: x + 0.05, start), params=params)
    return folder


def test_a_start_keeps_its_function_or_is_refused(adapter, tiny_config):
    def begun(*overrides):
        words = [*overrides, f"training.start_from={adapter}"]
        bench = Workbench(made := experiment.from_dict(tiny_config(), words))
        start = runs.begin(bench, made)
        return bench, start.method.combine(bench.params, start.state.trainable)

    bench, variables = begun()
    method, trainable = lj.load_adapter(adapter, bench.model, bench.params)
    tokens = jnp.arange(6)[None]
    apply = lj.adapt(bench.model.apply)
    wanted = apply(method.combine(bench.params, trainable), tokens)
    np.testing.assert_allclose(apply(variables, tokens), wanted, atol=1e-5)
    begun("method.dropout=0.1")  # of training alone
    pissa = ["method.kind=pissa", "method.rank=2", "method.alpha=4.0", "method.targets=all-linear"]
    for words in (["method.alpha=64.0"], ["method.scaling=rslora"], pissa):
        with pytest.raises(lj.UserError, match="computes something else, at"):
            begun(*words)


# The start token.


def test_prompts_of_ones_own_and_examples_open_as_in_training(tiny_config, monkeypatch):
    """A tokenizer whose texts start with a token of their own."""
    bench = Workbench(experiment.from_dict(tiny_config(evaluation={"base_shots": (0, 2)})))
    tokenizer = bench.tokenizer
    start = tokenizer.encode("<")[0]
    monkeypatch.setattr(tokenizer, "add_bos", True)
    monkeypatch.setattr(tokenizer, "bos_id", start)
    asked = []

    def generate(model, variables, prompts, *, prefix=(), eos_id, **options):
        asked.append((list(prefix), [list(p) for p in prompts], eos_id))
        return [[1]] * len(prompts)

    monkeypatch.setattr("lora_jax.training.generate", generate)
    bench.answers({"params": bench.params}, ["3 and"])
    assert asked[-1][1][0][0] == start and asked[-1][1][0][1:] == tokenizer.encode("3 and")
    bench.evaluate_base(0)
    (none, alone, _), (examples, behind, ends) = asked[-2:]
    assert not none and all(p[0] == start for p in alone)
    assert examples[0] == start and examples.count(start) == 1
    assert [[start, *p] for p in behind] == alone
    assert tokenizer.eos_id in ends and tokenizer.encode("\n")[-1] in ends


# On a mesh, evaluation gives what it gives without.


def test_evaluating_on_a_mesh(tiny_config):
    sections = {"evaluation": {"batch_size": 4, "max_new_tokens": 3}}
    alone = Workbench(experiment.from_dict(tiny_config(**sections)))
    spread = Workbench(experiment.from_dict(tiny_config(**sections, mesh={"data": 2, "fsdp": 2})))
    method = alone.experiment.method
    trainable = method.init(jax.random.key(0), alone.params)
    trainable = jax.tree.map(lambda x: np.asarray(x) + 0.05, trainable)
    found = [b.evaluate(method.combine(b.params, trainable)) for b in (alone, spread)]
    assert found[0] == found[1]
    placed = [
        lj.training.evaluation.placed(batch, spread.mesh) for batch in spread.evaluation_batches
    ]
    assert all(not x["tokens"].sharding.is_fully_replicated for x in placed)


# What the command says.


def test_the_command_says_where_it_stopped(monkeypatch, tmp_path, capsys):
    def stop(args, overrides):
        raise lj.training.Interrupted(7, tmp_path)

    monkeypatch.setattr(cli, "_list", stop)
    assert cli.main(["list"]) == 143
    assert capsys.readouterr().err == f"interrupted after step 7; saved in {tmp_path}\n"


def test_damaged_files_are_named(tmp_path, tiny_config, tiny_base, capsys):
    import gzip
    import shutil

    whole = gzip.compress(b'{"a": "1", "b": "2"}\n' * 400)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:12] + b"\xff" * 20 + whole[32:])
    from lora_jax.data.sources import Files

    with pytest.raises(lj.UserError, match="cannot be read"):
        Files(str(tmp_path / "cut.jsonl.gz")).open()
    with pytest.raises(lj.UserError, match="unknown encoding 'utf-9'"):
        Files(str(tiny_base / "data.jsonl"), encoding="utf-9").open()
    shutil.copytree(tiny_base / "base", tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    file.write_text(file.read_text()[:200])
    with pytest.raises(lj.UserError, match="is not a whole tokenizer file"):
        pretrained.load_tokenizer(tmp_path / "base")
    with pytest.raises(lj.UserError, match="no task 'sst3'; did you mean sst2"):
        config.load_file("configs/glue.py:task=sst3")
