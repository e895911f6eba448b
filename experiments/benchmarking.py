"""What the benchmarks share: arms run in turn, medians, ratios of rounds, results in JSON.

Needs numpy alone, so that a process of its own measures one library's memory or start.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arm = Callable[[], None]
"""Runs one update and waits for it."""

REST = 0.5
"""Seconds before an arm's turn: torch's threads were seen to spin on after their step, and to slow
down the next arm by 15 %."""

BUSY = 0.5
"""Load a core, of other programs, above which arms cannot be compared."""


def interleaved(arms: Mapping[str, Arm], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each arm in each round. Arms take turns, so that a slow minute meets them all.

    The order is turned round by round: no arm always runs after the same one. Of a turn the second
    update is timed, as in training updates follow each other.
    """
    for _ in range(warm_up):
        for run in arms.values():
            run()
    names, seconds = list(arms), {name: [] for name in arms}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            time.sleep(REST)
            arms[name]()
            start = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - start)
        took = ", ".join(f"{name} {values[-1]:.3f} s" for name, values in seconds.items())
        print(f"round {number + 1}: {took}", flush=True)
    return seconds


ANSWERS = "BENCHMARK_ANSWERS"  # where `serve` finds what to write to


class Process:
    """An arm in a process of its own, which `serve` answers in: its libraries, threads and
    allocator are then as its users have them.

    Args:
      *command: a file beside this one, and its arguments.
    """

    def __init__(self, *command: object):
        self._name = " ".join(map(str, command))
        file, *args = map(str, command)
        read, write = os.pipe()  # not its stdout: libraries print there
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / file), *args],
            stdin=subprocess.PIPE, text=True, pass_fds=[write],
            env={**os.environ, ANSWERS: str(write)},
        )  # fmt: skip
        os.close(write)
        self._answers = os.fdopen(read)

    def ask(self, what: str, **arguments: Any) -> Any:
        """What the other process's function of that name returns."""
        child = self._child
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps([what, arguments]) + "\n")
            child.stdin.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self._name} ended with status {child.wait()}; see above")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process and waits for it."""
        self._child.communicate()
        self._answers.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answers a `Process` until it closes."""
    answers = os.fdopen(int(os.environ[ANSWERS]), "w")
    for line in sys.stdin:
        what, arguments = json.loads(line)
        print(json.dumps(functions[what](**arguments)), file=answers, flush=True)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(seconds: Mapping[str, list[float]], one: str, other: str) -> dict[str, float] | None:
    """Of `one` to `other`, round by round; None where an arm is left out."""
    if one not in seconds or other not in seconds:
        return None
    return summary([a / b for a, b in zip(seconds[one], seconds[other], strict=True)])


def compiled_figures(compiled: Any, compile_seconds: float) -> dict[str, float]:
    """What XLA says of a compiled step. The body of a loop counts once in FLOPs and bytes."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "compile_seconds": compile_seconds,
        "flops_counting_loops_once": cost["flops"],
        "bytes_accessed_counting_loops_once": cost["bytes accessed"],
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def compile_timed(jitted: Any, *args: Any) -> tuple[Any, float]:
    """(compiled, seconds of tracing, lowering and compiling)."""
    start = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    return compiled, time.perf_counter() - start


def token_batch(rows: int, length: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    """Random tokens int32 [rows, length]: the time of a step does not depend on which."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, vocabulary, (rows, length)).astype(np.int32)


def versions(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed, of Python, and the processor's cores."""
    from importlib import metadata

    found = {"python": platform.python_version(), "cores": str(os.cpu_count())}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def context(device: str, *packages: str) -> dict[str, Any]:
    """What a figure depends on besides the settings: command, device, versions, allocator."""
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "device": device,
        "processor": _processor(),
        "versions": versions(*packages),
        # glibc's settings of how much freed memory it keeps change torch's speed on a CPU.
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def warn_if_busy() -> float | None:
    """The load of the last minute, before arms run; a busy machine slows some arms far more.

    With other programs on the same cores torch's steps were seen to slow down far more than
    XLA's, so that no ratio meant anything.
    """
    if not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY * cores:
        print(f"WARNING: load {load:.1f} on {cores} cores before any arm ran: other programs are "
              "at work, and the ratios below mean nothing", flush=True)  # fmt: skip
    return load


def write_results(path: Path | None, results: Mapping[str, Any]) -> None:
    """The results as JSON, if a path is given; the folder is made."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def verdict(name: str, value: float | None, limit: float, *, least: bool = False) -> str:
    """One line: the figure, the limit (the greatest allowed, or the least), whether it holds."""
    kind = "at least" if least else "limit"
    if value is None:
        return f"{name}: not measured ({kind} {limit:g})"
    holds = value >= limit if least else value <= limit
    return f"{name}: {value:.3f} ({kind} {limit:g}: {'holds' if holds else 'FAILS'})"
