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

    The system lets go of the lock when a process ends, killed or not. Within a process the lock may
    be taken again.

    Raises UserError where another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / FILE, is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(
            f"another process is at work in {folder}: wait until it ends, or choose another workdir"
        ) from None
    try:
        yield
    finally:
        lock.release()
        if made and all(path.name == FILE for path in folder.iterdir()):
            (folder / FILE).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a parent that another one has begun to use
                for path in made:
                    path.rmdir()
