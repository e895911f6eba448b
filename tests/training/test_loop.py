"""Whole runs: resuming, interruption, bad losses, logs, checkpoints."""

import functools
import json
import os
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


def train(folder, *, data=None, steps=8, **options):
    with Checkpoints(folder / "checkpoints", metric="loss") as checkpoints:
        return fit(
            STEP,
            PARAMS,
            init_state(METHOD, PARAMS, TX),
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
    resumed = train(tmp_path / "b")
    tiny.same(resumed.state, undisturbed.state)
    rows = read_metrics(tmp_path / "b/metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8]
    assert rows[-1]["loss"] == read_metrics(tmp_path / "a/metrics.jsonl")[-1]["loss"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


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


def test_best_and_latest_are_kept(tmp_path):
    train(tmp_path, evaluate=evaluate, eval_every=1)  # losses 1 2 3 4 0 1 2 3
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
