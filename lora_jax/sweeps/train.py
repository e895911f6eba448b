"""The loop over a pack: steps, logs, evaluations, checkpoints, and members in and out of slots."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from lora_jax.data.bucketing import alike
from lora_jax.sweeps import padding
from lora_jax.sweeps.grid import Member
from lora_jax.sweeps.pack import Program
from lora_jax.sweeps.search import Halving
from lora_jax.sweeps.slots import Slot
from lora_jax.training import Interrupted, State, Terminated, loss
from lora_jax.training.spectra import Row

Done = Callable[[Member, dict[str, Any]], None]

SAVES = 8
"""Checkpoints of a pack that are written at one time: each holds a state, threads and files."""
FILES_A_SLOT = 4
"""Open as long as a member trains: its log, and its TensorBoard events with their queue."""
OTHER_FILES = 256
"""Open besides, at most: the base, the data, the saves under way."""


class Trainer:
    """Trains members through the slots of one program, in their order.

    Args:
      program: members come and go in its slots.
      folder: of a member's workdir.
      done: told of each member's result as soon as it is written.
      base: a member's metrics of the base model, which its result repeats.
      stopper: of a search; asked at each evaluation but the last.
      progress: told after each step, with the number of live slots.
    """

    def __init__(
        self,
        program: Program,
        members: Iterable[Member],
        *,
        folder: Callable[[Member], Path],
        done: Done,
        base: Callable[[Member], dict[str, float]],
        stopper: Halving | None = None,
        progress: Callable[[int], None] = lambda live: None,
    ):
        self.program, self.bench = program, program.bench
        # Pulled one by one as slots become free: a search may decide late.
        self._waiting = iter(members)
        self._folder, self._done, self._base = folder, done, base
        self._stopper, self._progress = stopper, progress
        self._slots: list[Slot | None] = [None] * program.shape.slots
        self._states = program.empty()
        self._pending: list[tuple[dict[int, int], dict[str, jax.Array]]] = []
        self._saves: collections.deque[Slot] = collections.deque()
        self._ended: tuple[int, Path | None] = (0, None)  # the last: its step and folder
        # Seconds in updates alone: a step is dispatched, and waited for when it is read.
        self.update_seconds = 0.0

    def run(self) -> None:
        """Until every member has a result. SIGTERM or Ctrl-C saves all slots and raises
        Interrupted."""
        try:
            with Terminated() as terminated:
                self._fill()
                while self._live():
                    self._step()
                    self._attend()
                    self._fill()
                    if terminated.seen:
                        break
                if terminated.seen:  # also where it came as the last member ended: others follow
                    self._interrupt(terminated.seen)
        finally:
            for index in self._live():
                self._at(index).close()

    def _live(self) -> list[int]:
        return [i for i, slot in enumerate(self._slots) if slot is not None]

    def _at(self, index: int) -> Slot:
        slot = self._slots[index]
        assert slot is not None
        return slot

    def _fill(self) -> None:
        for index in range(len(self._slots)):
            while self._slots[index] is None:
                member = next(self._waiting, None)
                if member is None:
                    return
                self._enter(index, member)

    def _enter(self, index: int, member: Member) -> None:
        cursors = [self._at(i).cursor for i in self._live()]
        slot = Slot(self.bench, member, self._folder(member), cursors)
        self._slots[index] = slot
        padded = padding.pad(slot.take_state(), self.program.shape.state)
        self._states = self.program.put(self._states, index, padded)
        if slot.last:  # killed after its last checkpoint, before its result
            self._end([index])
        elif self._stopper is not None:  # killed between a rung's evaluation and its verdict
            stopped = self._stopper.recalled(member, slot.step)
            if stopped is not None:
                reason, value = stopped
                self._free(index, slot.abandon(reason, {self.bench.task.principal: value}))

    def _step(self) -> None:
        began = time.perf_counter()
        live = self._live()
        for cursor in {id(self._at(i).cursor): self._at(i).cursor for i in live}.values():
            cursor.advance()
        filler = self._at(live[0]).cursor.batch
        held = [filler if slot is None else slot.cursor.batch for slot in self._slots]
        held = alike(held, self.bench.pad_id)
        batches = {name: np.stack([batch[name] for batch in held]) for name in filler}
        mask = np.array([slot is not None and slot.diverged_at is None for slot in self._slots])
        self._states, metrics = self.program.run(self._states, batches, mask)
        for index in live:
            self._at(index).took()
        self._pending.append(({i: self._at(i).step for i in live}, metrics))
        self.update_seconds += time.perf_counter() - began
        self._progress(len(live))

    def _attend(self) -> None:
        """Whatever is due after a step."""
        live = self._live()
        if any(self._at(i).logging for i in live):
            self._read()
        for index in live:
            slot = self._at(index)
            if slot.logging:
                slot.log()
            if slot.diverged_at is not None:
                reason = f"diverged: loss or gradient not finite at step {slot.diverged_at}"
                self._free(index, slot.abandon(reason, {}))
        live = self._live()
        due = [i for i in live if self._at(i).evaluating and not self._at(i).last]
        due = [i for i in due if self._at(i).experiment.training.eval_every]
        found = dict(zip(due, self._evaluate(due), strict=True))
        self._judge(due, list(found.values()))
        for index in live:
            held = self._slots[index]
            if held is not None and held.saving and not held.last and index not in due:
                self._save(held, self._own(index), None)
        ended = [i for i in live if self._slots[i] is not None and self._at(i).last]
        self._end(ended, {i: found[i] for i in ended if i in found})

    def _judge(self, indices: list[int], found: list[dict[str, float]]) -> None:
        """Logs and saves evaluated slots, and frees those that the search stops."""
        self._keep(indices, found)
        if self._stopper is None or not indices:
            return
        slots = [self._at(i) for i in indices]
        principal = self.bench.task.principal
        values = [(s.member, s.step, m[principal]) for s, m in zip(slots, found, strict=True)]
        reasons = self._stopper(values)
        for index, metrics, reason in zip(indices, found, reasons, strict=True):
            if reason is not None:
                self._free(index, self._at(index).abandon(reason, metrics))

    def _read(self) -> None:
        """Hands the metrics of the steps since the last time to their slots."""
        began = time.perf_counter()
        for steps, metrics in jax.device_get(self._pending):
            for index, step in steps.items():
                self._at(index).note(step, {name: x[index] for name, x in metrics.items()})
        self._pending = []
        self.update_seconds += time.perf_counter() - began

    def _own(self, index: int) -> State:
        """A slot's state without padding."""
        return padding.cut(self.program.take(self._states, index), self._at(index).own)

    def _evaluate(self, indices: list[int]) -> list[dict[str, float]]:
        bench = self.bench
        outputs = self.program.outputs(
            bench.output, self._states, indices, bench.evaluation_batches
        )
        return [bench.score(bench.predictions(out)) for out in outputs]

    def _keep(self, indices: list[int], found: list[dict[str, float]]) -> None:
        """Logs and saves evaluated slots."""
        spectra = self._spectra(indices)
        for index, metrics, rows in zip(indices, found, spectra, strict=True):
            slot = self._at(index)
            slot.evaluated(metrics, rows)
            self._save(slot, self._own(index), metrics)

    def _save(self, slot: Slot, state: State, metrics: dict[str, float] | None) -> None:
        """Starts to save, as soon as fewer than `SAVES` are under way."""
        self._saved(slot)
        while len(self._saves) >= SAVES:
            self._saves.popleft().checkpoints.wait()
        slot.save(state, metrics)
        self._saves.append(slot)

    def _saved(self, slot: Slot) -> None:
        """A slot that waits for its own save need not be waited for."""
        if slot in self._saves:
            self._saves.remove(slot)

    def _spectra(self, indices: list[int]) -> list[list[Row]]:
        if not indices or not self.bench.experiment.evaluation.spectra:
            return [[] for _ in indices]
        return self.program.spectra(self._states, indices)

    def _end(
        self, indices: list[int], judged: Mapping[int, dict[str, float]] = MappingProxyType({})
    ) -> None:
        """Evaluates, saves and frees slots whose members are done.

        Args:
          judged: metrics of those among them that were evaluated and saved at this step, at which
            they converged.
        """
        if not indices:
            return
        fresh = [i for i in indices if i not in judged]
        found = {**judged, **dict(zip(fresh, self._evaluate(fresh), strict=True))}
        self._keep(fresh, [found[i] for i in fresh])
        earlier = [i for i in indices if self._at(i).best_is_earlier]
        for index in earlier:
            self._back(index)
        found |= zip(earlier, self._evaluate(earlier), strict=True)
        general = self._general(indices)
        for index, forgot in zip(indices, general, strict=True):
            slot = self._at(index)
            metrics = {**found[index], **forgot, **self._base(slot.member)}
            extra = {"slots": self.program.shape.slots, "best_step": slot.checkpoints.best}
            self._free(index, slot.finish(self._trainable(index), metrics, extra))

    def _back(self, index: int) -> None:
        """A slot's state as it was at the member's best evaluation."""
        kept = padding.pad(self._at(index).best(), self.program.shape.state)
        self._states = self.program.put(self._states, index, kept)

    def _trainable(self, index: int) -> Any:
        """Without padding; a whole state would be three times as much."""
        own = self.program.take(self._states.trainable, index)
        return padding.cut(own, self._at(index).own.trainable)

    def _general(self, indices: list[int]) -> list[dict[str, float]]:
        bench = self.bench
        if not bench.general_batches:
            return [{} for _ in indices]
        sums = self.program.outputs(bench.loss_sums, self._states, indices, bench.general_batches)
        return [{"general_loss": loss.mean_of(out)} for out in sums]

    def _free(self, index: int, result: dict[str, Any]) -> None:
        slot = self._at(index)
        self._saved(slot)
        member = slot.member
        self._slots[index] = None
        self._ended = slot.step, slot.folder
        self._done(member, result)

    def _interrupt(self, number: int) -> None:
        self._read()
        step, where = self._ended
        for index in self._live():
            slot = self._at(index)
            slot.log()
            if slot.diverged_at is None:
                self._save(slot, self._own(index), None)
            where, step = slot.folder, slot.step
        raise Interrupted(step, where, number)
