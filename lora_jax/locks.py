"""One process at a time at work in a workdir."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from lora_jax.errors import UserError

FILE = ".lock"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes `folder` if need be and keeps other processes out of it; one that is left as empty as
    it was made is removed.

    Where the file system has locks, the lock is gone when its process ends, killed or not.

    Raises UserError where it is held, by another process or this one.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / FILE)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(
            f"another process, or this one, is at work in {folder}: wait until it ends, or choose "
            "another workdir"
        ) from None
    try:
        yield
    finally:
        # While it is held: later the file may be another process's.
        with contextlib.suppress(OSError):
            if made and all(path.name == FILE for path in folder.iterdir()):
                (folder / FILE).unlink()
        lock.release()
        with contextlib.suppress(OSError):  # not empty: something came in, or another process
            for path in made:
                path.rmdir()
