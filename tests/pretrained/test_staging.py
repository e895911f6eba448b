"""Folders that are replaced whole, also when the process dies or the disk fills up."""

from __future__ import annotations

import errno
import os
import shutil
import stat

import numpy as np
import pytest
from safetensors import SafetensorError

import lora_jax as lj
from lora_jax.pretrained import staging
from lora_jax.pretrained.staging import read_whole, staged, write_tensors


class Killed(BaseException):
    """Stands for the end of the process: nothing that changes the disk runs after it."""


def write(target, text):
    with staged(target) as stage:
        (stage / "config").write_text(text)
        (stage / "tensors").write_text(text)


def read(folder):
    return (folder / "config").read_text(), (folder / "tensors").read_text()


def killed_at(monkeypatch, number):
    """From the `number`-th change of the disk on, every change raises; returns the counter."""
    count = [0]
    for module, name in ((os, "rename"), (shutil, "rmtree")):
        original = getattr(module, name)

        def change(*args, original=original, **kwargs):
            count[0] += 1
            if count[0] >= number:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, change)
    return count


@pytest.mark.parametrize("number", range(1, 7))
def test_a_reader_always_sees_one_whole_folder(tmp_path, monkeypatch, number):
    target = tmp_path / "a"
    write(target, "old")
    (target / "notes").write_text("mine")
    (target / "more").mkdir()
    with monkeypatch.context() as patch:
        count = killed_at(patch, number)
        try:
            write(target, "new")
            assert number > count[0]  # past the last change: nothing was killed
        except Killed:
            pass
    seen = read_whole(target, read)
    assert seen in (("old", "old"), ("new", "new"))
    write(target, "third")
    assert read_whole(target, read) == ("third", "third")
    assert (target / "notes").read_text() == "mine" and (target / "more").is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_kill_points_are_all_of_them(tmp_path, monkeypatch):
    write(tmp_path / "a", "old")
    (tmp_path / "a" / "notes").write_text("mine")
    (tmp_path / "a" / "more").mkdir()
    count = killed_at(monkeypatch, 100)
    write(tmp_path / "a", "new")
    # Old aside, new in, two files after it, old removed, and the stage (gone already).
    assert count[0] == 6


def test_a_folder_left_aside_is_put_back_by_a_reader_or_read_where_it_lies(tmp_path, monkeypatch):
    target = tmp_path / "a"
    write(target, "old")
    os.rename(target, tmp_path / ".a.old")
    assert staging.is_there(target) and not staging.is_there(tmp_path / "b")
    with monkeypatch.context() as patch:

        def readonly(*args):
            raise OSError(errno.EROFS, "read-only")

        patch.setattr(os, "rename", readonly)
        assert read_whole(target, read) == ("old", "old")
    assert read_whole(target, read) == ("old", "old")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_reader_that_is_overtaken_reads_again(tmp_path):
    target = tmp_path / "a"
    write(target, "old")
    overtaken = []

    def slow(folder):
        config = (folder / "config").read_text()
        if not overtaken:
            overtaken.append(True)
            write(target, "new")
        return config, (folder / "tensors").read_text()

    assert read_whole(target, slow) == ("new", "new")


def test_a_reader_that_puts_the_old_folder_back_does_not_stop_the_writer(tmp_path, monkeypatch):
    target = tmp_path / "a"
    write(target, "old")
    rename, done = os.rename, []

    def interleaved(source, to):
        if str(to) == str(target) and str(source).endswith(".tmp") and not done:
            done.append(read_whole(target, read))
        rename(source, to)

    monkeypatch.setattr(os, "rename", interleaved)
    write(target, "new")
    assert done == [("old", "old")] and read_whole(target, read) == ("new", "new")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_and_changes_nothing(tmp_path, error):
    write(tmp_path / "a", "old")
    with pytest.raises(lj.UserError, match="no space left.*as it was before; free some space"):  # noqa: SIM117
        with staged(tmp_path / "a") as stage:
            (stage / "config").write_text("new")
            raise error
    assert read(tmp_path / "a") == ("old", "old")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_other_errors_pass_through(tmp_path):
    for error in (OSError(errno.EIO, "broken"), SafetensorError("other"), KeyError("x")):
        with pytest.raises(type(error)), staged(tmp_path / "a"):
            raise error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_moved_is_kept(tmp_path, monkeypatch):
    write(tmp_path / "a", "old")
    rename = os.rename

    def busy(source, to):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, to)

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(lj.UserError, match="cannot be replaced.*busy.*new folder inside"):
        write(tmp_path / "a", "new")
    assert read(tmp_path / "a") == ("old", "old")


def test_what_dead_processes_left_is_removed_and_what_live_ones_write_is_not(tmp_path):
    host = staging.socket.gethostname()
    for name in (f".a.{host}-999999999.tmp", f".a.{host}-{os.getppid()}.tmp", ".a.other-7.tmp"):
        (tmp_path / name).mkdir()
    write(tmp_path / "a", "new")
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == sorted(["a", f".a.{host}-{os.getppid()}.tmp", ".a.other-7.tmp"])


def test_files_may_be_read_by_whom_the_folder_may_be(tmp_path):
    (tmp_path / "a").mkdir(mode=0o755)
    with staged(tmp_path / "a") as stage:
        stage.chmod(0o755)
        write_tensors(stage / "x.safetensors", {"x": np.ones(2)})
    assert stat.S_IMODE((tmp_path / "a" / "x.safetensors").stat().st_mode) == 0o644


def test_links_and_files_as_targets(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and read(tmp_path / "real") == ("new", "new")
    (tmp_path / "file").write_text("x")
    with pytest.raises(lj.UserError, match="is a file; give a folder"):
        write(tmp_path / "file", "new")
