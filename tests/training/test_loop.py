"""Whole runs: resuming, interruption, bad losses, logs, checkpoints."""

import functools
import json
import os
import resource
import signal

import jax
import jax.numpy as jnp
import pytest
import tiny

from lora_jax.errors import UserError
from lora_jax.training import (
    Checkpoints,
    Interrupted,
    MeshConfig,
    OptimizerConfig,
    chunked_loss,
    fit,
    init_state,
    make_mesh,
    make_optimizer,
    make_step,
)
from lora_jax.training.reports import read_metrics, truncate_metrics

TX = make_optimizer(OptimizerConfig(learning_rate=1e-2), 8)
PARAMS = tiny.params()
METHOD = tiny.METHOD.__class__(rank=4, alpha=8, dropout=0.3)
STEP = make_step(functools.partial(chunked_loss, tiny.MODEL), METHOD, TX)


def evaluate(frozen, state):
    return {"loss": float(state.step) % 5}


def train(folder, *, state=None, data=None, steps=8, **options):
    with Checkpoints(folder / "checkpoints", metric="loss") as checkpoints:
        return fit(
            STEP,
            PARAMS,
            state or init_state(METHOD, PARAMS, TX),
            data or tiny.Batches(),
            steps=steps,
            workdir=folder,
            checkpoints=checkpoints,
            log_every=2,
            progress=False,
            **options,
        )


def test_interrupted_and_resumed_equals_undisturbed(tmp_path):
    undisturbed = train(tmp_path / "a")

    class Killed(tiny.Batches):
        def __next__(self):
            if self.at == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    with pytest.raises(Interrupted) as stop:
        train(tmp_path / "b", data=Killed())
    assert stop.value.code == 143 and stop.value.step == 5
    assert (tmp_path / "b/checkpoints/5").is_dir() and stop.value.where.name == "5"
    # As after a kill -9: lines past the checkpoint, the last one cut short.
    with (tmp_path / "b/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    first = init_state(METHOD, PARAMS, TX)
    resumed = train(tmp_path / "b", state=first)
    tiny.same(resumed.state, undisturbed.state)
    # Who holds it until the end, holds no memory.
    assert all(x.is_deleted() for x in jax.tree.leaves(first.trainable))
    rows = read_metrics(tmp_path / "b/metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8]
    assert rows[-1]["loss"] == read_metrics(tmp_path / "a/metrics.jsonl")[-1]["loss"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Stopped(tiny.Batches):
    """Sends this process a signal while it gives the batch of a step."""

    def __init__(self, step, number):
        super().__init__()
        self.step, self.number = step, number

    def __next__(self):
        if self.at == self.step - 1:
            os.kill(os.getpid(), self.number)
        return super().__next__()


def test_a_stop_in_the_last_round_is_a_stop(tmp_path):
    """What follows a training may be long: an evaluation, or a sweep's other members."""
    with pytest.raises(Interrupted, match=r"after step 8; saved in .*checkpoints/8"):
        train(tmp_path, data=Stopped(8, signal.SIGTERM))
    assert train(tmp_path).resumed_at == 8


def test_an_evaluation_that_a_stop_came_before_is_made_up_for(tmp_path):
    """A checkpoint without its metrics counted as an evaluation that was no better."""
    seen = []

    def better(frozen, state):
        seen.append(int(state.step))
        return {"loss": -float(state.step)}

    options = {"evaluate": better, "eval_every": 2, "patience": 1}
    with pytest.raises(Interrupted):
        train(tmp_path, data=Stopped(4, signal.SIGTERM), **options)
    resumed = train(tmp_path, **options)
    assert seen == [2, 4, 6, 8] and not resumed.converged
    assert (resumed.best_step, resumed.resumed_at) == (8, 4)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if "eval/loss" in r] == [2, 4, 6, 8]


def test_ctrl_c_saves_and_a_second_one_stops_at_once(tmp_path, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _stop_by_ctrl_c(tmp_path, capsys)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a job in the background
        train(tmp_path / "ignored", data=Stopped(5, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)


def _stop_by_ctrl_c(tmp_path, capsys):
    with pytest.raises(Interrupted, match=r"after step 5; saved in .*checkpoints/5") as stop:
        train(tmp_path, data=Stopped(5, signal.SIGINT))
    assert stop.value.code == 130 and "Ctrl-C again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    class Twice(Stopped):
        def __next__(self):
            batch = super().__next__()
            if self.at == self.step:
                os.kill(os.getpid(), self.number)
            return batch

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "again", data=Twice(3, signal.SIGINT))


def test_a_finished_run_does_nothing_more(tmp_path):
    first = train(tmp_path, steps=3, evaluate=evaluate)
    again = train(tmp_path, steps=3, evaluate=evaluate, data=tiny.Batches())
    tiny.same(first.state, again.state)
    assert again.metrics == first.metrics == {"loss": 3.0}


def test_not_finite_names_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"step 6: the loss is nan.*checkpoints/4\."):
        train(tmp_path, data=tiny.Batches(poison_at=6), save_every=4)
    with pytest.raises(UserError, match="no checkpoint before it"):
        train(tmp_path / "new", data=tiny.Batches(poison_at=2))


def test_a_rate_beyond_all_bounds_is_named(tmp_path):
    tx = make_optimizer(OptimizerConfig(name="sgd", learning_rate=1e38, schedule="constant"), 8)
    step = make_step(functools.partial(chunked_loss, tiny.MODEL), METHOD, tx)
    with pytest.raises(UserError, match=r"step \d: the loss is .*Lower the learning rate"):
        fit(
            step, PARAMS, init_state(METHOD, PARAMS, tx), tiny.Batches(), steps=8,
            workdir=tmp_path, progress=False,
        )  # fmt: skip


def test_best_and_latest_are_kept(tmp_path):
    seen = {}

    def keeping(frozen, state):
        seen[int(state.step)] = jax.tree.map(jnp.copy, state.trainable)
        return evaluate(frozen, state)

    result = train(tmp_path, evaluate=keeping, eval_every=1)  # losses 1 2 3 4 0 1 2 3
    assert (result.best_step, result.best_metrics, result.metrics) == (5, {"loss": 0}, {"loss": 3})
    with Checkpoints(tmp_path / "checkpoints", metric="loss") as checkpoints:
        tiny.same(checkpoints.restore_trainable(result.state.trainable, 5), seen[5])
        tiny.same(checkpoints.restore_trainable(result.state.trainable), seen[8])
        with pytest.raises(UserError, match="is only in the checkpoint"):
            checkpoints.restore_trainable({}, 5)
    with Checkpoints(tmp_path / "other", metric="loss", mode="max") as checkpoints:
        for step, value in ((1, 2.0), (2, 7.0), (3, float("nan")), (4, 3.0)):
            checkpoints.save(step, {"x": jnp.zeros(2)}, metrics={"loss": value})
        checkpoints.wait()
        assert (checkpoints.best, checkpoints.latest) == (2, 4)
        with pytest.raises(UserError, match="'loss' .*did you mean lost"):
            checkpoints.save(5, {"x": jnp.zeros(2)}, metrics={"lost": 1.0})
    with Checkpoints(tmp_path / "checkpoints", metric="loss") as checkpoints:
        assert (checkpoints.best, checkpoints.latest) == (5, 8)
    names = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert names == {"5", "8"}


def test_logs(tmp_path):
    train(tmp_path, steps=4, evaluate=evaluate)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [2, 4, 4]
    assert {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"} <= set(rows[0])
    assert rows[-1] == {"step": 4, "eval/loss": 4.0}
    assert list((tmp_path / "tensorboard").iterdir())


def test_data_that_ends_or_cannot_resume(tmp_path):
    with pytest.raises(UserError, match="data ended before step 4"):
        train(tmp_path / "a", data=tiny.Batches(stop_at=3))
    train(tmp_path / "b", data=(tiny.batch(i) for i in range(9)), steps=2)
    with pytest.raises(UserError, match="cannot resume"):
        train(tmp_path / "b", data=(tiny.batch(i) for i in range(9)), steps=4)


def test_truncation_leaves_a_missing_file(tmp_path):
    truncate_metrics(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_restore_errors_name_the_leaf(tmp_path):
    state = init_state(METHOD, PARAMS, TX)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        other = METHOD.__class__(rank=2, alpha=8)
        with pytest.raises(UserError, match=r"query/kernel/a was float32\[2, 16, 4\], now .*2\]"):
            checkpoints.restore(init_state(other, PARAMS, TX))
        fewer = state.replace(trainable={})
        with pytest.raises(UserError, match="is only in the checkpoint"):
            checkpoints.restore(fewer)
        with pytest.raises(UserError, match="no checkpoint of step 9"):
            checkpoints.restore(state, 9)


def test_half_written_checkpoints_are_removed(tmp_path):
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(8, {"x": jnp.zeros(2)})  # waits for the removal
    assert not (tmp_path / "7.orbax-checkpoint-tmp").exists()


def test_saved_before_donation_and_restored_on_another_mesh(tmp_path):
    state = init_state(METHOD, PARAMS, TX)
    expected = jax.tree.map(jnp.copy, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, data="{}")
        STEP(PARAMS, state, tiny.batch(0))  # donates what is being saved
        like = init_state(METHOD, PARAMS, TX, seed=5, mesh=make_mesh(MeshConfig(tensor=4)))
        restored = checkpoints.restore(like)
    tiny.same(jax.device_get(restored.state.trainable), jax.device_get(expected.trainable))
    assert jax.tree.map(lambda x: x.sharding, restored.state.trainable) == jax.tree.map(
        lambda x: x.sharding, like.trainable
    )
    assert restored.data == "{}"


def test_a_save_that_fails_leaves_the_last_good_one(tmp_path):
    """As on a full disk: the system refuses to let any file grow."""
    state = {"x": jax.random.normal(jax.random.key(0), (200, 200))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(UserError, match=r"step 2 could not be written.*/1 is whole"):
                checkpoints.save(2, state)
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        tiny.same(checkpoints.restore(state).state, state)
        checkpoints.save(3, state)
        checkpoints.wait()
        assert checkpoints.latest == 3


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the checkpoint directory"):
        Checkpoints(tmp_path / "file" / "checkpoints")
