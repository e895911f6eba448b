"""One slot's bookkeeping: the member it holds, its workdir, its place in the data, its logs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_jax.atomic import write_json
from lora_jax.experiment import to_dict
from lora_jax.runs import (
    RESULT,
    begin,
    claim,
    environment,
    finish,
    open_checkpoints,
)
from lora_jax.sweeps.grid import Member
from lora_jax.training import State
from lora_jax.training.loop import converged, real_tokens
from lora_jax.training.reports import Reporter, line_of
from lora_jax.training.spectra import Row
from lora_jax.workbench import Batch, Workbench


class Cursor:
    """A place in the data of one seed, shared by the slots that are at the same place."""

    def __init__(self, bench: Workbench, seed: int, step: int, saved: str | None):
        self.seed, self.step = seed, step
        self._iterator = bench.batches(seed)
        if saved is not None:
            self._iterator.set_state(json.loads(saved))
        self.batch: Batch = {}
        self.tokens = 0

    def advance(self) -> None:
        self.batch = next(self._iterator)
        self.tokens = real_tokens(self.batch)
        self.step += 1

    def place(self) -> str:
        return json.dumps(self._iterator.get_state())

    @property
    def fingerprint(self) -> str:
        return str(self._iterator.fingerprint)


def cursor_for(
    cursors: Iterable[Cursor], bench: Workbench, seed: int, step: int, saved: str | None
) -> Cursor:
    """One of `cursors` that is at this place, or a new one."""
    for cursor in cursors:
        if (cursor.seed, cursor.step) == (seed, step):
            return cursor
    return Cursor(bench, seed, step, saved)


class Slot:
    """A member in training. Its workdir is that of an ordinary run.

    Attributes:
      own: abstract state of the member alone, without padding: what its checkpoints hold.
      step: updates done.
    """

    def __init__(self, bench: Workbench, member: Member, folder: Path, cursors: Iterable[Cursor]):
        self.bench, self.member, self.folder = bench, member, folder
        self.experiment = member.experiment
        start = begin(bench, self.experiment)
        claim(folder, to_dict(self.experiment))
        # Of the start only the method stays: its state is as large as all that trains.
        self.method, state = start.method, start.state
        self.own = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        self.checkpoints = open_checkpoints(folder, bench)
        self.step, saved = 0, None
        if self.checkpoints.latest is not None:
            restored = self.checkpoints.restore(state)
            state, self.step, saved = restored.state, restored.step, restored.data
        self._state: State | None = state
        self.converged = self._converged()
        self._resumed = self.step
        self.cursor = cursor_for(cursors, bench, self.experiment.data.seed, self.step, saved)
        steps = self.experiment.training.steps
        self.reporter = Reporter(folder, start=self.step, steps=steps, progress=False)
        self.diverged_at: int | None = None
        self._began = self._since = time.perf_counter()
        self._rows: list[dict[str, float]] = []
        self._tokens = self._all_tokens = 0
        self._seconds = 0.0

    # What is due after the step just done.

    @property
    def last(self) -> bool:
        return self.step >= self.experiment.training.steps or self.converged

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    @property
    def evaluating(self) -> bool:
        return self.due(self.experiment.training.eval_every) or self.last

    @property
    def saving(self) -> bool:
        return self.evaluating or self.due(self.experiment.training.save_every)

    @property
    def logging(self) -> bool:
        return self.saving or self.due(self.experiment.training.log_every)

    # Logs.

    def took(self) -> None:
        """A step was begun with the cursor's batch."""
        self.step += 1
        self._tokens += self.cursor.tokens

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of one step, in order of steps."""
        self._rows.append({k: float(v) for k, v in values.items()})
        finite = values["finite"] and math.isfinite(values["loss"])
        if not finite and self.diverged_at is None:
            self.diverged_at = step

    def log(self) -> None:
        """One line of the steps since the last: the loss averaged over their tokens."""
        if not self._rows:
            return
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        line = line_of(self._rows, self._tokens, seconds)
        if math.isfinite(line["loss"]):
            self.reporter.log(self.step, line)
        self._all_tokens += self._tokens
        self._seconds += seconds
        self._rows, self._tokens = [], 0

    def evaluated(self, metrics: Mapping[str, float], spectra: Sequence[Row]) -> None:
        """Logs an evaluation, unless it was before a kill."""
        if self.step > self._resumed:
            self.reporter.log_spectra(self.step, spectra)
            self.reporter.log(self.step, {f"eval/{n}": v for n, v in metrics.items()})

    # State.

    def take_state(self) -> State:
        """The state to begin with, once: from then on the pack holds it."""
        state, self._state = self._state, None
        assert state is not None
        return state

    def save(self, state: State, metrics: Mapping[str, float] | None) -> None:
        """A checkpoint of the member alone: any pack, or a single run, can go on from it."""
        self.checkpoints.save(self.step, state, data=self.cursor.place(), metrics=metrics)
        self.converged = self._converged()

    def _converged(self) -> bool:
        t = self.experiment.training
        return converged(self.checkpoints, t.patience * t.eval_every)

    @property
    def best_is_earlier(self) -> bool:
        """Whether the state to be kept is another than the one after the last update."""
        if self.experiment.training.keep != "best":
            return False
        return self.checkpoints.best not in (None, self.step)

    def best(self) -> State:
        """The state of the best evaluation."""
        return self.checkpoints.restore(self.own, self.checkpoints.best).state

    def finish(
        self, trainable: Any, metrics: dict[str, float], extra: dict[str, Any]
    ) -> dict[str, Any]:
        """Writes adapter and result: the workdir is an ordinary finished run."""
        self.close()
        speed = self._all_tokens / self._seconds if self._seconds else 0.0
        return finish(
            self.bench, self.experiment, self.method, self.folder, trainable,
            metrics=metrics, fingerprint=self.cursor.fingerprint,
            extra={
                "tokens_per_second": speed,
                "seconds": time.perf_counter() - self._began,
                "converged": self.converged,
                "resumed_at": self._resumed,
                **extra,
            },
        )  # fmt: skip

    def abandon(self, status: str, metrics: dict[str, float]) -> dict[str, Any]:
        """Ends a member without an adapter: it diverged, or a search stopped it."""
        self.close()
        result = {
            "status": status,
            "metrics": metrics,
            "trainable_params": self.method.count(self.bench.params).total,
            "seconds": time.perf_counter() - self._began,
            "resumed_at": self._resumed,
            "seed": self.experiment.seed,
            "config": to_dict(self.experiment),
            **environment(),
        }
        write_json(self.folder / RESULT, result)
        return result

    def close(self) -> None:
        self.checkpoints.wait()
        self.checkpoints.close()
        self.reporter.__exit__(None, None, None)
