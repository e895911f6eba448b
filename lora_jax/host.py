"""What this process uses of its machine. Imports nothing heavy: benchmarks of others use it too."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import resource
import sys
from pathlib import Path

# glibc's numbers of the settings (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> bool:
    """Lets glibc keep the memory that a training step frees, for the next step.

    XLA on a CPU allocates a step's temporaries anew each time. By default glibc maps so large a
    piece from the kernel and gives it back at the end, and the kernel clears every page of it: 9 %
    of a step of MiniLM-L6 on two cores, hardly any of SmolLM2-135M's. Here one heap serves all
    threads and keeps up to 2 GiB that are free at its end. The greatest amount of memory in use
    stays what it was.

    It has to come before JAX starts its threads, so at the beginning of a program; `lora-jax` does
    it. Nothing happens where there is an accelerator (whose host should give back what it read
    weights into), where glibc is not the C library, or where the user's MALLOC_ variables or
    GLIBC_TUNABLES say what is wanted.

    Returns:
      Whether it was done.
    """
    if sys.platform != "linux" or _accelerated() or _user_decides():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    wanted = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26))
    return all(mallopt(name, value) == 1 for name, value in wanted)


def _accelerated() -> bool:
    """Whether JAX will find more than a CPU, without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms != "cpu"
    return any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def _user_decides() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ)


def allow_open_files(wanted: int) -> int:
    """Raises the number of files that this process may have open towards `wanted`.

    Linux starts programs with 1,024 and lets each raise it to the administrator's own limit.

    Returns:
      The number that it may have open now; more than `wanted`, if that was the limit before.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    if soft >= wanted:
        return soft
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    except (ValueError, OSError):  # macOS has a limit of its own besides these
        return soft
    return possible


def peak_bytes() -> int:
    """The most memory that this process held at one time.

    Linux's own count for this program: `ru_maxrss` would be that of the parent process, if it was
    the greater when it started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
