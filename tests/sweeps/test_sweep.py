"""A sweep through the command line: packs, members that are ordinary runs, resuming, a kill."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref

import jax
import numpy as np
import pandas as pd
import pytest
import tokenizers

from lora_jax import cli, host
from lora_jax.errors import UserError
from lora_jax.experiment import from_dict
from lora_jax.methods import LoRA
from lora_jax.sweeps import sweep, train
from lora_jax.sweeps.grid import Member
from lora_jax.sweeps.slots import Slot
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.reports import read_metrics
from lora_jax.workbench import Workbench

GRID = """
import json
def get_config(arg=""):
    return json.loads({config!r})
def sweep_rank():
    for rank in {ranks}:
        yield {{"method.rank": rank, "method.alpha": 2.0 * rank}}
def sweep_rate():
    for rate in (1e-3, 1e-2):
        yield {{"optimizer.learning_rate": rate}}
"""


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def write(path, config, ranks):
    path.write_text(GRID.format(config=json.dumps(config), ranks=ranks))
    return str(path)


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """(folder of a finished sweep of four members, what the command printed, its config file)."""
    folder = tmp_path_factory.mktemp("sweep")
    config = tiny_config(training={"steps": 4, "log_every": 2, "save_every": 2})
    file = write(folder / "grid.py", config, (1, 3))
    status = cli.main(
        ["sweep", file, "--workdir", str(folder / "s"), "--mode", "packed", "--quiet"]
    )
    assert status == 0
    return folder, file


def test_a_sweep_is_one_program(finished):
    folder, _ = finished
    result = json.loads((folder / "s" / "result.json").read_text())
    assert (result["members"], result["packs"], result["programs_compiled"]) == (4, 1, 1)
    assert result["seconds"] > 0
    frame = pd.read_csv(folder / "s" / "results.csv")
    assert sorted(frame["method.rank"]) == [1, 1, 3, 3]
    assert set(frame["status"]) == {"finished"}
    assert {"optimizer.learning_rate", "exact_match", "trainable_params"} <= set(frame.columns)
    assert (folder / "s" / "report.html").exists()
    assert (folder / "s" / "update_spectra.png").exists()


def test_the_updates_of_all_members_are_a_table(finished):
    folder, _ = finished
    updates = pd.read_csv(folder / "s" / "updates.csv")
    ranks = pd.read_csv(folder / "s" / "results.csv").set_index("member")["method.rank"]
    assert len(updates) == 4 * 14 and set(updates["step"]) == {4}
    assert (updates["rank"] == updates["member"].map(ranks)).all()
    assert set(updates["layer"]) == {0, 1} and "attention/query" in set(updates["module"])
    # Each member's own file has one line: it was evaluated at the end alone.
    for name in ranks.index:
        assert len(read_metrics(folder / "s" / "members" / name / "spectra.jsonl")) == 1


def test_members_are_ordinary_runs_with_adapters_of_their_own_rank(finished, capsys):
    folder, _ = finished
    frame = pd.read_csv(folder / "s" / "results.csv")
    for _, row in frame.iterrows():
        member = folder / "s" / "members" / row["member"]
        peft = json.loads((member / "adapter" / "adapter_config.json").read_text())
        assert peft["r"] == row["method.rank"]
    assert cli.main(["eval", str(member)]) == 0
    assert json.loads(capsys.readouterr().out)["exact_match"] == row["exact_match"]


def test_again_runs_nothing_and_a_larger_grid_what_is_new(finished, tiny_config, capsys):
    folder, file = finished
    command = ["sweep", file, "--workdir", str(folder / "s"), "--mode", "serial", "--quiet"]
    first = json.loads((folder / "s" / "result.json").read_text())
    assert cli.main(command) == 0
    assert "4 members, 0 to run" in capsys.readouterr().out
    again = json.loads((folder / "s" / "result.json").read_text())
    # What there was to run took something, also after a command that ran nothing.
    assert (again["packs"], again["programs_compiled"], again["modes"]) == (1, 1, ["packed"])
    assert again["seconds"] > first["seconds"] and again["update_seconds"] > 0
    # What an older version's result does not say is not added to.
    del again["update_seconds"]
    (folder / "s" / "result.json").write_text(json.dumps(again))
    config = tiny_config(training={"steps": 4, "log_every": 2, "save_every": 2})
    write(folder / "grid.py", config, (1, 3, 2))
    assert cli.main(command) == 0
    assert "6 members, 2 to run" in capsys.readouterr().out
    assert len(pd.read_csv(folder / "s" / "results.csv")) == 6
    larger = json.loads((folder / "s" / "result.json").read_text())
    assert (larger["members"], larger["packs"], larger["modes"]) == (6, 2, ["packed", "serial"])


MANY = {
    "rank": [{"method.rank": rank} for rank in (1, 2)],
    "seed": [{"seed": seed} for seed in range(6)],
}


def test_planning_asks_a_method_for_its_shapes_once(tiny_config, tmp_path, monkeypatch):
    """And not each member: tracing a start takes longer than a step."""
    asked, init = [], LoRA.init

    def counted(self, key, params):
        asked.append(self.rank)
        return init(self, key, params)

    monkeypatch.setattr(LoRA, "init", counted)
    options = sweep.Options(dry=True, mode="serial")
    made = sweep.Sweep(tiny_config(), MANY, tmp_path / "s", options, progress=False)
    assert made.run()["members"] == 12
    assert sorted(asked) == [1, 1, 2]  # shapes of both, and the start that the program is made of


def test_results_are_read_once_and_few_checkpoints_are_written_at_a_time(
    tiny_config, tmp_path, monkeypatch
):
    reads, read = [], sweep.search.result
    monkeypatch.setattr(sweep.search, "result", lambda *a: reads.append(a) or read(*a))
    monkeypatch.setattr(train, "SAVES", 2)
    saving, most = set(), []
    save, wait = Checkpoints.save, Checkpoints.wait

    def saved(self, *args, **options):
        save(self, *args, **options)
        saving.add(self.directory)
        most.append(len(saving))

    def waited(self):
        wait(self)
        saving.discard(self.directory)

    monkeypatch.setattr(Checkpoints, "save", saved)
    monkeypatch.setattr(Checkpoints, "wait", waited)
    config = tiny_config(training={"steps": 2, "save_every": 1})
    options = sweep.Options(mode="packed")
    sweep.Sweep(config, {"seed": MANY["seed"]}, tmp_path / "s", options, progress=False).run()
    assert len(reads) == 6
    assert max(most) == 2 and len(most) == 12
    assert len(pd.read_csv(tmp_path / "s" / "results.csv")) == 6


def test_a_members_start_is_held_by_the_pack_alone(tiny_config, tmp_path):
    experiment = from_dict(tiny_config())
    slot = Slot(Workbench(experiment), Member("m", {}, experiment), tmp_path / "m", [])
    leaves = [weakref.ref(x) for x in jax.tree.leaves(slot.take_state().opt_state)]
    gc.collect()
    held = [leaf() for leaf in leaves if leaf() is not None]
    slot.close()  # also where the test fails: its log is open
    assert leaves and not held


def test_as_many_at_once_as_files_may_be_open(tiny_config, tmp_path, monkeypatch, capsys):
    limit = train.OTHER_FILES + 2 * train.FILES_A_SLOT
    monkeypatch.setattr(host, "allow_open_files", lambda wanted: limit)
    options = sweep.Options(dry=True, mode="packed")
    sweep.Sweep(
        tiny_config(), {"seed": MANY["seed"]}, tmp_path / "s", options, progress=False
    ).run()
    said = capsys.readouterr().out
    assert "2 members at once: this process may open 264 files" in said
    assert "pack of 6 members: packed, 2 at a time" in said


def test_errors_name_the_nearest(finished, capsys):
    _, file = finished
    assert cli.main(["sweep", file, "--workdir", "unused", "--only", "rnak"]) == 2
    assert "did you mean rank" in capsys.readouterr().err


def test_memory_that_is_too_small_is_said(finished, tmp_path, capsys):
    _, file = finished
    command = ["sweep", file, "--workdir", str(tmp_path), "--memory", "1KiB", "--quiet"]
    assert cli.main([*command, "--mode", "serial"]) == 2
    assert "smaller batch" in capsys.readouterr().err


def test_killed_sweeps_go_on_and_end_alike(tiny_config, tmp_path):
    """kill -9 in the middle: the same command ends with the undisturbed sweep's numbers."""
    config = tiny_config(training={"steps": 60, "log_every": 1, "save_every": 3})
    file = write(tmp_path / "grid.py", config, (2,))
    options = sweep.Options(mode="packed")
    sweep.sweep(file, tmp_path / "whole", options=options, progress=False)
    code = (
        "import sys; from lora_jax.sweeps import sweep as s;"
        f"s.sweep({file!r}, {str(tmp_path / 'cut')!r}, options=s.Options(mode='packed'),"
        "progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    saved = tmp_path / "cut" / "members"
    while process.poll() is None and not list(saved.glob("*/checkpoints/[0-9]*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    sweep.sweep(file, tmp_path / "cut", options=options, progress=False)
    whole, cut = (pd.read_csv(tmp_path / n / "results.csv") for n in ("whole", "cut"))
    for name in whole["member"]:
        lines = [losses(tmp_path / n / "members" / name) for n in ("whole", "cut")]
        assert lines[0] == lines[1] and len(lines[0]) == 60
        lines = [(tmp_path / n / "members" / name / "spectra.jsonl").read_text()
                 for n in ("whole", "cut")]  # fmt: skip
        assert lines[0] == lines[1] and lines[0].count("\n") == 1
    columns = ["member", "exact_match"]
    pd.testing.assert_frame_equal(
        whole[columns].sort_values("member", ignore_index=True),
        cut[columns].sort_values("member", ignore_index=True),
    )


def test_optuna_suggests_members_of_one_pack(tiny_config, tmp_path):
    pytest.importorskip("optuna")
    file = write(tmp_path / "grid.py", tiny_config(training={"steps": 2}), (1, 2))
    result = sweep.sweep(
        file,
        tmp_path / "s",
        options=sweep.Options(mode="packed", slots=2, optuna=3),
        progress=False,
    )
    assert result["packs"] == 1
    assert 1 <= len(pd.read_csv(tmp_path / "s" / "results.csv")) <= 3


def test_members_in_buckets_of_other_lengths(tmp_path, monkeypatch):
    """Members at other places of the data have rows of other lengths: padded, they are alike."""
    import jax

    from lora_jax import pretrained, runs
    from lora_jax.experiment import from_dict
    from lora_jax.sweeps import pack
    from lora_jax.sweeps.sweep import Options, Sweep

    hf = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 40, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "hidden_act": "gelu", "max_position_embeddings": 32, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "pad_token_id": 0,
    }  # fmt: skip
    model = pretrained.build_model(hf)
    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    (tmp_path / "base").mkdir()
    pretrained.save_pretrained(tmp_path / "base", model, params)
    words = {n: i for i, n in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(38))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    draw = np.random.default_rng(0)
    texts = [[f"w{draw.integers(38)}" for _ in range(n)] for n in (*draw.integers(1, 9, 59), 15)]
    lines = [json.dumps({"text": " ".join(words), "label": len(words) % 2}) for words in texts]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    config = {
        "model": {"source": str(tmp_path / "base")},
        "method": {"kind": "lora", "rank": 2, "train": ["^head/"]},
        "data": {
            "source": {"kind": "files", "path": str(tmp_path / "texts.jsonl"), "split": "[:50]"},
            "task": {"kind": "classification", "labels": ["0", "1"]},
            "validation": "[50:]", "batch_size": 4, "length": 16, "packing": False,
            "buckets": [4, 8],
        },
        "optimizer": {"learning_rate": 1e-2},
        "training": {"steps": 8, "log_every": 1},
    }  # fmt: skip
    seeds = {"seed": [{"seed": s, "data.seed": s} for s in range(2)]}
    monkeypatch.setattr(pack.Program, "seconds_a_step", lambda self: 1.0)
    sweep = Sweep(config, seeds, tmp_path / "s", Options(mode="packed"), progress=False)
    result = sweep.run()
    assert 4 < result["expected_seconds"] < 8  # some of the 8 batches fit into the shorter rows
    assert 1 < result["programs_compiled"] <= 3 and result["modes"] == ["packed"]
    for member in sweep.members[:1]:
        assert member.experiment == from_dict(
            json.loads((sweep.folder / member.name / "config.json").read_text())
        )
        runs.run(member.experiment, tmp_path / member.name, progress=False)
        alone, packed = (
            [r["loss"] for r in read_metrics(f / member.name / "metrics.jsonl") if "loss" in r]
            for f in (tmp_path, sweep.folder)
        )
        np.testing.assert_allclose(packed, alone, rtol=1e-4)


def test_examples_in_the_base_models_prompt_are_drawn_by_each_members_data(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep, "evaluate_base", lambda _, seed: ({"base_seed": seed}, []))
    config = tiny_config(training={"steps": 1}, evaluation={"base_shots": (0, 1)})
    seeds = {"data": [{"data.seed": 3}, {"data.seed": 5}]}
    ran = sweep.Sweep(config, seeds, tmp_path, sweep.Options(mode="packed"), progress=False)
    ran.run()
    for member in ran.members:
        result = json.loads((tmp_path / "members" / member.name / "result.json").read_text())
        assert result["metrics"]["base_seed"] == member.experiment.data.seed


def test_members_are_checked_as_single_runs_are(tiny_config, tmp_path):
    config = tiny_config(training={"steps": 1, "keep": "best"})
    ran = sweep.Sweep(config, {"seed": [{"seed": 0}]}, tmp_path, sweep.Options(), progress=False)
    with pytest.raises(UserError, match="keep='best' needs training.eval_every"):
        ran.run()


def test_the_best_state_is_kept_and_evaluated_no_more_often_than_needed(
    tiny_config, tmp_path, monkeypatch
):
    """One member is best at its end, the other before."""
    asked, kept = [], {}
    rates = {"rate": [{"optimizer.learning_rate": rate} for rate in (1e-3, 1e-2)]}

    def evaluate(self, indices):
        slots = [(self._at(i).experiment.optimizer.learning_rate, self._at(i)) for i in indices]
        asked.extend((rate, slot.step) for rate, slot in slots)
        principal = self.bench.task.principal  # exact_match
        return [{principal: 1.0 / s.step if r == 1e-3 else float(s.step)} for r, s in slots]

    def finish(self, trainable, metrics, extra):
        kept[self.experiment.optimizer.learning_rate] = self, trainable, extra["best_step"]
        return real(self, trainable, metrics, extra)

    real = Slot.finish
    monkeypatch.setattr(train.Trainer, "_evaluate", evaluate)
    monkeypatch.setattr(Slot, "finish", finish)
    config = tiny_config(training={"steps": 4, "eval_every": 2, "keep": "best"})
    sweep.Sweep(config, rates, tmp_path, sweep.Options(mode="packed"), progress=False).run()
    assert sorted(asked) == [(1e-3, 2), (1e-3, 4), (1e-3, 4), (1e-2, 2), (1e-2, 4)]
    assert {rate: best for rate, (_, _, best) in kept.items()} == {1e-3: 2, 1e-2: 4}
    for slot, trainable, best in kept.values():
        with Checkpoints(slot.folder / "checkpoints") as checkpoints:
            saved = checkpoints.restore_trainable(slot.own.trainable, best)
        jax.tree.map(np.testing.assert_array_equal, trainable, saved)
