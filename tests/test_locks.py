"""Two processes in one workdir: the second is told, a killed one leaves nothing that stops."""

import shutil
import subprocess
import sys

import filelock
import pytest

from lora_jax import experiment, locks, runs
from lora_jax.errors import UserError
from lora_jax.sweeps.sweep import Options, Sweep

HOLDER = """
import pathlib, sys, time
from lora_jax import locks
with locks.alone(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_told_and_a_killed_one_is_no_obstacle(tmp_path):
    folder = tmp_path / "a" / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="at work in .*run: wait"), locks.alone(folder):
            raise AssertionError("two at a time")
        process.kill()
    with locks.alone(folder):
        pass
    assert folder.exists()  # this process did not make it


def test_a_folder_goes_if_nothing_came_into_it(tmp_path):
    with locks.alone(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with locks.alone(tmp_path / "a" / "b"):
        (tmp_path / "a" / "c").mkdir()
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "c"]
    with locks.alone(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    with locks.alone(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b" / "kept").exists()


def test_anothers_lock_stays_and_an_error_is_not_hidden(tmp_path, monkeypatch):
    """Between letting go and leaving, another process may have come."""
    folder, release = tmp_path / "run", filelock.FileLock.release
    others = []

    def released(lock, *args, **options):
        release(lock, *args, **options)
        if not others:
            folder.mkdir(exist_ok=True)
            others.append(filelock.FileLock(folder / locks.FILE))
            others[0].acquire(blocking=False)

    with monkeypatch.context() as patched:
        patched.setattr(filelock.FileLock, "release", released)
        with locks.alone(folder):
            pass
    with pytest.raises(UserError, match="at work"), locks.alone(folder):
        pass
    others[0].release()
    with pytest.raises(ValueError, match="what happened"), locks.alone(tmp_path / "gone"):
        shutil.rmtree(tmp_path / "gone")
        raise ValueError("what happened")


def test_a_run_and_a_sweep_hold_their_workdirs(tiny_config, tmp_path, monkeypatch):
    one = experiment.from_dict(tiny_config())
    for folder in ("run", "sweep"):
        (tmp_path / folder).mkdir()
    grid = {"seed": [{"seed": 0}]}

    def swept(**options):
        sweep = Sweep(experiment.to_dict(one), grid, tmp_path / "sweep", Options(**options), False)
        return sweep.run()

    # Another lock of this process on the same file is to the system what another process's is.
    held, told = filelock.FileLock(tmp_path / "run" / locks.FILE), "at work in .*run"
    with held, pytest.raises(UserError, match=told):
        runs.run(one, tmp_path / "run", progress=False)
    with filelock.FileLock(tmp_path / "sweep" / locks.FILE):
        with pytest.raises(UserError, match="at work in .*sweep"):
            swept()
        assert swept(dry=True)["members"] == 1  # a plan disturbs nobody
    assert not (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "sweep" / "members").exists()
