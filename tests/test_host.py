"""A program keeps the memory that a step frees, if nothing speaks against it."""

import subprocess
import sys

import pytest

from lora_jax import host

LARGE = 200_000_000
FAULTS = f"""
import ctypes, resource
from lora_jax import host
print(int(host.keep_memory()))
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    piece = libc.malloc({LARGE})
    ctypes.memset(piece, 1, {LARGE})
    libc.free(ctypes.c_void_p(piece))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment):
    """(whether memory is kept, pages that the kernel gave for the last of five equal pieces)."""
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, text=True,
                          stdout=subprocess.PIPE, env=environment)  # fmt: skip
    kept, count = done.stdout.split()
    return bool(int(kept)), int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_kept_memory_is_not_asked_of_the_kernel_again():
    kept, count = faults(JAX_PLATFORMS="cpu")
    if not kept:
        pytest.skip("this C library is not glibc")
    assert count < 100
    # The default, and what another setting of the user's has to stay.
    kept, count = faults(JAX_PLATFORMS="cpu", MALLOC_ARENA_MAX="4")
    assert not kept and count > LARGE // 2**22


def test_an_accelerator_s_host_gives_its_memory_back(monkeypatch):
    for name in ("MALLOC_ARENA_MAX", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert not host.keep_memory()
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert not host.keep_memory()


FILES = """
import resource, sys
from lora_jax import host
hard = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
print(host.allow_open_files(500), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
print(host.allow_open_files(50))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="of POSIX systems")
@pytest.mark.parametrize(("hard", "allowed"), [(600, 500), (300, 300)])
def test_more_files_may_be_open_up_to_the_administrators_limit(hard, allowed):
    done = subprocess.run([sys.executable, "-c", FILES, str(hard)], check=True, text=True,
                          stdout=subprocess.PIPE)  # fmt: skip
    assert done.stdout.split() == [str(allowed)] * 3
