"""The training loop: batches in, a trained state out; logs, evaluates, saves and resumes."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lora_jax import partition
from lora_jax.errors import Interrupted, UserError
from lora_jax.training import mesh as meshes
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.reports import Reporter, line_of
from lora_jax.training.spectra import Row
from lora_jax.training.step import State


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What came of a run.

    Attributes:
        state: after the last step.
        metrics: of the last evaluation.
        best_step: of the best checkpoint, if `checkpoints` have a metric and an evaluation gave it;
            `checkpoints.restore_trainable(state.trainable, best_step)` is its trainable tree.
        best_metrics: of the evaluation at `best_step`; empty without one.
        seconds: wall time of this process's part of the run.
        tokens_per_second: real tokens (no padding) a second, without the first step's compilation.
        converged: whether `patience` was at an end.
        resumed_at: updates that earlier processes had done.
    """

    state: State
    metrics: dict[str, float]
    best_step: int | None
    best_metrics: dict[str, float]
    seconds: float
    tokens_per_second: float
    converged: bool
    resumed_at: int


class Terminated:
    """Notes SIGTERM and the first Ctrl-C; the second Ctrl-C stops at once, as ever.

    Python allows handlers in the main thread only: elsewhere nothing is noted.

    Attributes:
        seen: the signal's number; 0: none came.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Terminated:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # Whoever started a job in the background may have had it ignore Ctrl-C.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.seen = number
        if number == signal.SIGINT:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)
            signal.signal(number, self._old.pop(number))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def fit(
    step: Callable[[Any, State, Any], tuple[State, dict[str, jax.Array]]],
    frozen: Any,
    state: State,
    data: Iterator[Mapping[str, Any]],
    *,
    steps: int,
    workdir: str | Path | None = None,
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[Any, State], Mapping[str, float]] | None = None,
    inspect: Callable[[Any, State], Sequence[Row]] | None = None,
    eval_every: int = 0,
    save_every: int = 0,
    log_every: int = 10,
    patience: int = 0,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> FitResult:
    """Trains until `steps` updates are done, from the latest checkpoint if there is one.

    Args:
        step: from `make_step`; `state` is donated to it, do not use it afterwards.
        data: batches without end. With `get_state()` and `set_state()` (JSON-able) it resumes
            where it was; without, a resumed run is a UserError.
        workdir: gets metrics.jsonl, spectra.jsonl and TensorBoard events; None: nothing is written.
        evaluate: (frozen, state) -> metrics, each `eval_every` steps (0: never) and at the end.
            They are logged as `eval/<name>`; checkpoints know them without the prefix.
        inspect: (frozen, state) -> `spectra.rows`, logged when `evaluate` is due, and at the end
            without it too.
        save_every: also save each so many steps (0: only at evaluations and at the end).
        log_every: steps that are averaged for a line of the log.
        patience: it ends before `steps` once so many evaluations in a row were no better than the
            best before them, by the metric of `checkpoints`; 0: never.

    Raises:
        UserError: the loss or its gradient is not finite, the data ended, or a checkpoint could
            not be written.
        Interrupted: SIGTERM or Ctrl-C; the state is saved first.
    """
    began = time.perf_counter()
    start, metrics = 0, {}
    if checkpoints is not None and checkpoints.latest is not None:
        restored = checkpoints.restore(state)
        _delete(state)
        state, start, metrics = restored.state, restored.step, restored.metrics
        _resume_data(data, restored.data)
    with Reporter(workdir, start=start, steps=steps, progress=progress) as reporter:
        loop = _Loop(data, checkpoints, reporter, start)
        if evaluate is not None and start and not metrics and _due(start, eval_every):
            # It was stopped at this step, before the evaluation that was due.
            if inspect is not None:
                loop.inspect(start, inspect, frozen, state)
            metrics = loop.evaluate(start, evaluate, frozen, state)
            loop.save(start, state, metrics)
        done = converged(checkpoints, patience * eval_every)
        number = start
        with Terminated() as terminated:
            for number in range(start + 1, steps + 1):
                if done:
                    break
                batch = loop.next_batch(number)
                placed = batch if mesh is None else meshes.place_batch(batch, mesh)
                state, values = step(frozen, state, placed)
                loop.took(number, batch, values)
                last = number == steps
                # Asked once: a signal that comes later in this round is met by the next one.
                stopping = bool(terminated.seen) and not last
                evaluating = evaluate is not None and (last or _due(number, eval_every))
                saving = last or evaluating or _due(number, save_every) or stopping
                if saving or _due(number, log_every):
                    loop.flush(number)
                if inspect is not None and (last or evaluating) and not stopping:
                    loop.inspect(number, inspect, frozen, state)
                if evaluating and not stopping:
                    metrics = loop.evaluate(number, evaluate, frozen, state)
                    loop.save(number, state, metrics)
                    done = converged(checkpoints, patience * eval_every)
                elif saving:
                    loop.save(number, state, None)
                if stopping:
                    raise Interrupted(number, loop.settle(), terminated.seen)
            if terminated.seen:  # during the last round: what follows, the next process does
                raise Interrupted(number, loop.settle(), terminated.seen)
        loop.settle()
    best = None if checkpoints is None else checkpoints.best
    best_metrics = {} if checkpoints is None or best is None else checkpoints.metrics(best)
    seconds = time.perf_counter() - began
    return FitResult(state, metrics, best, best_metrics, seconds, loop.speed(), done, start)


def _delete(state: State) -> None:
    """What the first step would do to it, donated: its caller may hold it until the run's end."""
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and not partition.is_key(leaf):
            leaf.delete()


def converged(checkpoints: Checkpoints | None, updates: int) -> bool:
    """Whether the best evaluation lies so many updates back or more; False for 0 updates."""
    return bool(updates) and checkpoints is not None and checkpoints.stale() >= updates


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _resume_data(data: Any, saved: str | None) -> None:
    if saved is None or not hasattr(data, "set_state"):
        raise UserError(
            "cannot resume: the data iterator has no get_state/set_state, so batches would repeat; "
            "use lora_jax.data.loader.batches, or another workdir."
        )
    data.set_state(json.loads(saved))


def real_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch that are not padding; of images, how many there are."""
    if "images" in batch:
        return int(np.count_nonzero(batch["weights"]))
    for name in ("segment_ids", "attention_mask"):
        if batch.get(name) is not None:
            return int(np.count_nonzero(batch[name]))
    return int(np.size(batch["tokens"])) if "tokens" in batch else 0


class _Loop:
    """Bookkeeping of `fit`: what was seen since the last line of the log, and since the start."""

    def __init__(
        self, data: Any, checkpoints: Checkpoints | None, reporter: Reporter, start: int
    ) -> None:
        self._data, self._checkpoints, self._reporter = data, checkpoints, reporter
        self._last_good = start if checkpoints is not None and start else None
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._tokens = 0
        self._since = time.perf_counter()
        self._first = True
        self._all_tokens, self._all_seconds = 0, 0.0

    def next_batch(self, number: int) -> Mapping[str, Any]:
        try:
            return next(self._data)
        except StopIteration:
            raise UserError(
                f"the data ended before step {number}; repeat it, or ask for fewer steps."
            ) from None

    def took(self, number: int, batch: Mapping[str, Any], values: dict[str, jax.Array]) -> None:
        if self._first:
            # The first step compiles: it is no measure of speed.
            jax.block_until_ready(values)
            self._first, self._since = False, time.perf_counter()
        else:
            self._tokens += real_tokens(batch)
        self._pending.append((number, values))
        self._reporter.advance(number)

    def flush(self, number: int) -> None:
        """Reads the pending steps' metrics from the device, checks and logs them."""
        if not self._pending:
            return
        rows = [(n, {k: float(v) for k, v in row.items()}) for n, row in self._pending]
        self._pending = []
        for n, row in rows:
            if not row.get("finite", 1.0) or not math.isfinite(row["loss"]):
                raise UserError(self._not_finite(n, row))
        seconds = time.perf_counter() - self._since
        self._all_tokens += self._tokens
        self._all_seconds += seconds
        line = line_of([row for _, row in rows], self._tokens, seconds)
        self._reporter.log(number, line)
        self._tokens, self._since = 0, time.perf_counter()

    def _not_finite(self, number: int, row: Mapping[str, float]) -> str:
        if self._checkpoints is not None:
            self._checkpoints.wait()
        good = (
            f"the last good checkpoint is {self._checkpoints.path(self._last_good)}"
            if self._checkpoints is not None and self._last_good is not None
            else "there is no checkpoint before it"
        )
        return (
            f"step {number}: the loss is {row['loss']} and the gradient norm {row['grad_norm']}; "
            f"{good}. Lower the learning rate, set clip_norm, or lengthen the warm-up."
        )

    def evaluate(self, number: int, evaluate: Any, frozen: Any, state: State) -> dict[str, float]:
        metrics = {name: float(value) for name, value in evaluate(frozen, state).items()}
        self._reporter.log(number, {f"eval/{name}": value for name, value in metrics.items()})
        self._since = time.perf_counter()
        return metrics

    def inspect(self, number: int, inspect: Any, frozen: Any, state: State) -> None:
        self._reporter.log_spectra(number, inspect(frozen, state))
        self._since = time.perf_counter()

    def save(self, number: int, state: State, metrics: Mapping[str, float] | None) -> None:
        if self._checkpoints is None:
            return
        text = json.dumps(self._data.get_state()) if hasattr(self._data, "get_state") else None
        self._checkpoints.save(number, state, data=text, metrics=metrics)
        self._last_good = number
        self._since = time.perf_counter()

    def settle(self) -> Path | None:
        """Waits for the save under way; the newest checkpoint's folder."""
        if self._checkpoints is None:
            return None
        self._checkpoints.wait()
        latest = self._checkpoints.latest
        return None if latest is None else self._checkpoints.path(latest)

    def speed(self) -> float:
        return self._all_tokens / self._all_seconds if self._all_tokens else 0.0
