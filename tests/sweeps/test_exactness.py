"""A member of a pack equals its own single run, whatever number it differs in."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from lora_jax import runs, training
from lora_jax.sweeps import grid, pack, padding, planner
from lora_jax.sweeps.train import Trainer
from lora_jax.training.reports import read_metrics
from lora_jax.workbench import Workbench

# Each member differs from the others in several numbers; together in every one that may differ.
NUMBERS = [
    {"method.rank": 1, "optimizer.learning_rate": 3e-3},
    {
        "method.rank": 3, "method.scaling": "rslora", "method.alpha": 9.0, "seed": 3,
        "optimizer.weight_decay": 0.1,
    },
    {
        "method.targets": "attention/(query|value)$", "method.start": "gaussian",
        "method.init_scale": 0.5, "optimizer.clip_norm": 0.05, "data.seed": 4,
    },
    {
        "method.targets": "layers/1/mlp/", "method.rank": 4, "method.dropout": 0.3,
        "training.dropout_seed": 5, "optimizer.warmup_steps": 10,
    },
    {"optimizer.b1": 0.8, "optimizer.b2": 0.99, "optimizer.eps": 1e-6, "method.dropout": 0.1},
]  # fmt: skip


def members_of(config, overrides):
    return grid.unique(grid.members(config, overrides))


def program_of(members, slots):
    """(the compiled-to-be program, each member's start on its workbench)."""
    bench = Workbench(members[0].experiment)
    starts = [runs.begin(bench, m.experiment) for m in members]
    like = pack.hull_state(
        starts[0].method, starts[0].tx,
        [s.state.trainable for s in starts], [s.state.numbers for s in starts],
    )  # fmt: skip
    return pack.Program(bench, starts[0], pack.Shape(like, slots)), starts


def train_pack(members, folder, slots=None):
    """Trains members through the slots of one program, in workdirs under `folder`."""
    program, _ = program_of(members, slots or len(members))
    Trainer(
        program, members, folder=lambda m: folder / m.name, done=lambda m, r: None,
        base=lambda m: {},
    ).run()  # fmt: skip
    return program


def losses(folder):
    return np.array(
        [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    )


def compare(config, overrides, tmp_path, rtol, **options):
    members = members_of(config, overrides)
    assert len(members) == len(overrides)
    groups = planner.plan(
        members,
        lambda m: {"x": jax.ShapeDtypeStruct((m.experiment.method.rank,), np.float32)},
        flops_per_second=1e12,
        compile_seconds=1e9,
    )
    assert len(groups) == 1, "these differ in numbers only: one program"
    program = train_pack(members, tmp_path / "pack", **options)
    for member in members:
        alone = single_losses(program.bench, member)
        packed = losses(tmp_path / "pack" / member.name)
        np.testing.assert_allclose(packed, alone, rtol=rtol, err_msg=str(member.overrides))
    return members


def single_losses(bench, member):
    """The losses of the member's own training, one step of its own program after another."""
    start = runs.begin(bench, member.experiment)
    step = training.make_step(bench.loss, start.method, start.tx)
    state, found, data = start.state, [], bench.batches(member.experiment.data.seed)
    for _ in range(member.experiment.training.steps):
        state, metrics = step(start.frozen, state, next(data))
        found.append(float(metrics["loss"]))
    return np.array(found)


def config64(tiny_config, steps):
    return tiny_config(
        model={"dtype": "float64"},
        optimizer={"clip_norm": 1.0, "learning_rate": 1e-2},
        training={"steps": steps},
    )


def test_every_number_in_float64(tiny_config, tmp_path):
    with jax.enable_x64(True):
        compare(config64(tiny_config, 50), NUMBERS, tmp_path, rtol=1e-10)


def test_float32_and_results_as_of_a_run(tiny_config, tmp_path):
    config = tiny_config(optimizer={"learning_rate": 2e-3}, training={"steps": 50})
    overrides = [NUMBERS[0], {"method.rank": 4, "optimizer.weight_decay": 0.3, "data.seed": 2}]
    members = compare(config, overrides, tmp_path, rtol=1e-5, slots=1)  # and one after another
    for member in members:
        runs.run(member.experiment, tmp_path / member.name, progress=False)
        np.testing.assert_allclose(
            losses(tmp_path / "pack" / member.name), losses(tmp_path / member.name), rtol=1e-5
        )
        found = json.loads((tmp_path / "pack" / member.name / "result.json").read_text())
        wanted = json.loads((tmp_path / member.name / "result.json").read_text())
        for name in ("metrics", "trainable_params", "config", "data"):
            assert found[name] == wanted[name]
        same_spectra(tmp_path / "pack" / member.name, tmp_path / member.name)


def same_spectra(packed, alone):
    """The updates' sizes and singular values, one line an evaluation, without padding."""
    (mine,), (theirs,) = (read_metrics(f / "spectra.jsonl") for f in (packed, alone))
    assert mine["step"] == theirs["step"] == 50
    assert len(mine["matrices"]) == 14
    for row, other in zip(mine["matrices"], theirs["matrices"], strict=True):
        assert row["path"] == other["path"] and row["rank"] == other["rank"]
        for name in ("scale", "norm", "relative_norm", "singular_values"):
            np.testing.assert_allclose(row[name], other[name], rtol=1e-3, atol=1e-5)


def test_padding_stays_zero(tiny_config, tmp_path):
    config = tiny_config(optimizer={"weight_decay": 0.1, "learning_rate": 1e-2})
    members = members_of(
        config, [{"method.rank": 1}, {"method.rank": 4}, {"method.targets": "mlp"}]
    )
    program, start = program_of(members, 3)
    like = program.shape.state
    states = program.empty()
    for i, s in enumerate(start):
        states = program.put(states, i, padding.pad(s.state, like))
    batches = {n: np.stack([x] * 3) for n, x in program.batch.items()}
    for _ in range(5):
        states, _ = program.run(states, batches, np.ones(3, bool))
    for i, s in enumerate(start):
        after = padding.take(states, i)
        own = padding.cut(after, s.state)
        assert not np.array_equal(
            jax.tree.leaves(own.trainable)[1], jax.tree.leaves(s.state.trainable)[1]
        )
        again = padding.pad(own, like)
        for x, y in zip(
            jax.tree.leaves(again.trainable), jax.tree.leaves(after.trainable), strict=True
        ):
            np.testing.assert_array_equal(x, y)  # nothing outside of a member's own shapes


def test_a_stop_as_the_last_member_ends_is_a_stop(tiny_config, tmp_path):
    """A table or a search would go on with its next sweep."""
    members = members_of(tiny_config(training={"steps": 2}), [{"seed": 0}, {"seed": 1}])
    program, _ = program_of(members, 1)
    ended = []

    def done(member, result):
        ended.append(member.name)
        if len(ended) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = Trainer(program, members, folder=lambda m: tmp_path / m.name, done=done,
                      base=lambda m: {})  # fmt: skip
    with pytest.raises(training.Interrupted, match="after step 2; saved in") as stop:
        trainer.run()
    assert ended == [m.name for m in members] and stop.value.where == tmp_path / ended[-1]


def test_a_diverging_member_disturbs_nobody(tiny_config, tmp_path):
    config = tiny_config(
        optimizer={"name": "sgd", "learning_rate": 1e-2}, training={"steps": 12, "log_every": 4}
    )
    overrides = [{"method.rank": 1}, {"optimizer.learning_rate": 1e30}, {"method.rank": 3}]
    members = members_of(config, overrides)
    program = train_pack(members, tmp_path / "pack")
    bad = json.loads((tmp_path / "pack" / members[1].name / "result.json").read_text())
    assert bad["status"].startswith("diverged") and bad["metrics"] == {}
    assert bad["trainable_params"] > 0
    assert not (tmp_path / "pack" / members[1].name / "adapter").exists()
    for member in (members[0], members[2]):
        alone = single_losses(program.bench, member).reshape(3, 4)
        rows = losses(tmp_path / "pack" / member.name)  # averaged over four steps
        np.testing.assert_allclose(rows, alone.mean(1), rtol=1e-2)


AXES = [{"sweep": 2, "fsdp": 2}, {"sweep": 2, "tensor": 2}]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_on_a_mesh(tiny_config, axes):
    """The sweep axis composes with the others: losses as on one device, and B leaves zero."""
    config = tiny_config(optimizer={"learning_rate": 2e-3}, training={"steps": 6})
    overrides = [
        {"method.rank": 1},
        {"method.targets": "mlp"},
        {"method.dropout": 0.1},
        {"seed": 1},
    ]
    found, sizes = [], []
    for mesh in ({}, axes):
        members = members_of({**config, "mesh": mesh}, overrides)
        program, starts = program_of(members, len(members))
        states = program.empty()
        for i, start in enumerate(starts):
            states = program.put(states, i, padding.pad(start.state, program.shape.state))
        losses = []
        data = program.bench.batches(0)
        for _ in range(6):
            batch = next(data)
            batches = {n: np.stack([x] * 4) for n, x in batch.items()}
            states, metrics = program.run(states, batches, np.ones(4, bool))
            losses.append(np.asarray(metrics["loss"]))
        found.append(np.array(losses))
        sizes.append([[row["norm"] for row in rows] for rows in program.spectra(states, range(4))])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
    for packed, alone in zip(*sizes, strict=True):
        np.testing.assert_allclose(packed, alone, rtol=1e-3)
    assert (found[0][-1] < found[0][0]).all()


def test_a_probe_times_steps_and_not_their_compiling(tiny_config, monkeypatch):
    program, _ = program_of(members_of(tiny_config(), [{"seed": 0}]), 1)
    compiled, run = [], program.run
    monkeypatch.setattr(
        program, "run", lambda *arguments: compiled.append(program.programs) or run(*arguments)
    )
    assert program.seconds_a_step() > 0 and compiled[0] == 1
