"""Processes that are killed, at any moment and within a save, and go on to the same result."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_worker
import tiny

from lora_jax.training import Checkpoints
from lora_jax.training.reports import read_metrics


def start(folder):
    here = Path(__file__).parent
    root = here.parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{here}"}
    return subprocess.Popen(
        [sys.executable, str(here / "kill_worker.py"), str(folder)],
        env=environment,
        stderr=subprocess.DEVNULL,
    )


def lines(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def wait_for(process, condition):
    began = time.monotonic()
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() - began < 300
        time.sleep(0.0005)


def saving(folder):
    return any(folder.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def test_killed_runs_end_as_an_undisturbed_one(tmp_path):
    calm = kill_worker.run(tmp_path / "calm", pause=0.0)
    folder, chance = tmp_path / "killed", random.Random(0)
    folder.mkdir()
    # Between steps, within a save, and softly.
    for at, how in ((5, signal.SIGKILL), (18, signal.SIGKILL), (36, signal.SIGTERM)):
        process = start(folder)
        wait_for(process, lambda at=at: lines(folder) >= at)
        if at == 18:
            wait_for(process, lambda: saving(folder))
        else:
            time.sleep(chance.uniform(0, 0.06))
        process.send_signal(how)
        assert process.wait(120) == (143 if how == signal.SIGTERM else -how)
        if at == 18:
            assert saving(folder), "the kill missed the save"
        if how == signal.SIGTERM:
            rows = read_metrics(folder / "metrics.jsonl")
            with Checkpoints(folder / "checkpoints") as checkpoints:
                assert checkpoints.latest == rows[-1]["step"] < kill_worker.STEPS
    assert start(folder).wait(300) == 0

    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.latest == kill_worker.STEPS
        found = checkpoints.restore(calm)
    tiny.same(found.state, calm)
    wanted = read_metrics(tmp_path / "calm" / "metrics.jsonl")
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, kill_worker.STEPS + 1))
    assert [row["loss"] for row in rows] == [row["loss"] for row in wanted]
