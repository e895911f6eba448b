"""Folders that are replaced whole: a reader finds the old files or the new ones, never a mix."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lora_jax.errors import UserError

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TRIES = 50  # swaps and reads that another process may undo before we give up


def write_sorted_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object with sorted keys."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file that transformers and PEFT read, with the folder's permissions."""
    save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
    # safetensors makes files that only their owner can read, whatever the umask says.
    path.chmod(path.parent.stat().st_mode & 0o666)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of `target` when all its files are whole.

    Files of other names that `target` holds are kept. If the body raises, `target` is as it was.
    A process that dies in the swap leaves the old folder as `.<name>.old` beside it; the next
    `staged` or `read_whole` puts it back, or clears it away where the new one is in place.

    Raises:
      UserError: `target` is a file or cannot be replaced, or the disk is full.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a folder")
    _remove_abandoned(target)
    stage = target.parent / f".{target.name}.{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        yield stage
        if target.exists():
            shutil.copymode(target, stage)
        _swap(stage, target)
    except (OSError, SafetensorError) as error:
        if not _disk_is_full(error):
            raise
        raise UserError(
            f"no space left to write {target}, which is as it was before; free some space, or "
            "save to a folder on another disk"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _disk_is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(f"os error {number}" in str(error) for number in _FULL)


def _remove_abandoned(target: Path) -> None:
    """Stages of processes of this machine that were killed while they wrote."""
    prefix = f".{target.name}.{socket.gethostname()}-"
    for stage in target.parent.glob(f"{_literal(prefix)}*.tmp"):
        number = stage.name.removeprefix(prefix).removesuffix(".tmp")
        if number.isdigit() and (int(number) == os.getpid() or not _alive(int(number))):
            shutil.rmtree(stage)


def _literal(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _swap(stage: Path, target: Path) -> None:
    """Old aside, new in, the old one's other files after it."""
    old = _aside(target)
    for _ in range(_TRIES):
        _repair(target)
        try:
            if target.exists():
                os.rename(target, old)
            os.rename(stage, target)
        except OSError as error:
            # A reader put the old folder back in between, or another process saves here too.
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                continue
            if old.exists() and not target.exists():
                os.rename(old, target)
            raise UserError(
                f"{target} cannot be replaced ({error.strerror}); save to a new folder inside it"
            ) from error
        _repair(target)
        return
    raise UserError(f"{target} is being written by other processes; save to another folder")


def _repair(target: Path) -> None:
    """Ends what an earlier swap began."""
    old = _aside(target)
    if not old.exists():
        return
    if not target.exists():
        os.rename(old, target)
        return
    for entry in old.iterdir():
        if not (target / entry.name).exists():
            os.rename(entry, target / entry.name)
    shutil.rmtree(old)


def is_there(target: Path) -> bool:
    """Whether `target` is a folder, or one that a killed save left aside."""
    return target.is_dir() or _aside(target.resolve()).is_dir()


def read_whole(target: Path, read: Callable[[Path], T]) -> T:
    """`read(folder)` on one state of `target`, also while another process replaces it."""
    target = target.resolve()
    for _ in range(_TRIES):
        folder = _readable(target)
        before = _identity(folder)
        try:
            result = read(folder)
        except (UserError, OSError):
            if _identity(_readable(target)) == before:
                raise
            continue
        if _identity(folder) == before:
            return result
    raise UserError(f"{target} is being replaced again and again; read it when that has ended")


def _readable(target: Path) -> Path:
    old = _aside(target)
    if target.exists() or not old.exists():
        return target
    try:
        os.rename(old, target)
    except OSError as error:
        # On a disk that cannot be written the old folder is read where it lies.
        return old if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else target
    return target


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        stat = folder.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino
