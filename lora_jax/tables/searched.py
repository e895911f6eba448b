"""A cell that is the smallest size which is good enough: d90, r90 and the like."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.atomic import write_json
from lora_jax.data.examples import higher_is_better
from lora_jax.errors import UserError
from lora_jax.experiment import to_dict
from lora_jax.methods.subspace import Subspace
from lora_jax.statistics import Summary
from lora_jax.sweeps import grid
from lora_jax.sweeps.ladder import Ladder
from lora_jax.sweeps.smallest import FILE, Found, Smallest
from lora_jax.sweeps.sweep import Options
from lora_jax.sweeps.threshold import Statistic, Target, Threshold
from lora_jax.tables.work import Measured, Overrides, Trained, hashed, named, told

_SPENT = "seconds.json"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Runs whose metric the target is a fraction of, or above which the gain is counted.

    They are shared by all cells of a table whose baselines have the same config and settings.

    Args:
      overrides: of the config.
      grid: as of `Trained`.
      vary: what a seed sets besides `seed`; None: as for the cell itself.
      config: as of `Trained`; None: the cell's. One that names no method of a cell lets cells of
        several methods share its runs.
    """

    overrides: Overrides
    grid: Sequence[Overrides] = ()
    vary: Sequence[str] | None = None
    config: str | None = None


@dataclasses.dataclass(frozen=True)
class Searched:
    """The threshold, with its bootstrap interval over seeds; see `sweeps.threshold`.

    Args:
      config, overrides: as of `Trained`; of the method that is searched.
      ladder: which sizes.
      full: full fine-tuning: its runs, or a fixed metric (1.0: 0.9 is then absolute).
      head_only: the head alone. Where given, the target is a fraction of the *gain* over it.
      size: the field that is varied.
      name: of the threshold, in plots and files: "d90".
      fraction: of `full`, or of the gain.
      vary: what a seed sets besides `seed`.
      diverged: what a run without a metric counts as.
      grid: tried on the first seed at the ladder's middle; the best of them is taken for all sizes.
      mode: of the sweep.
    """

    config: str
    ladder: Ladder
    full: Baseline | float
    overrides: Overrides = dataclasses.field(default_factory=dict)
    head_only: Baseline | None = None
    size: str = "method.dimension"
    name: str = "d90"
    metric: str | None = None
    fraction: float = 0.9
    statistic: Statistic = "mean"
    vary: Sequence[str] = ("data.seed", "training.dropout_seed")
    diverged: float | None = None
    grid: Sequence[Overrides] = ()
    mode: Any = "auto"

    def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
        began = time.perf_counter()
        # Cells that differ in their target alone share their runs.
        place = folder / self._place()
        chosen = self._chosen(place, seeds, progress)
        experiment = grid.configured(self.config, {**self.overrides, **chosen})
        task = experiment.data.task
        baselines = folder.parent / "baselines"
        full = (
            self._runs(self.full, baselines, seeds, progress)
            if isinstance(self.full, Baseline)
            else (float(self.full),)
        )
        head = () if self.head_only is None else self._runs(
            self.head_only, baselines, seeds, progress
        )  # fmt: skip
        try:
            up = higher_is_better(task, self.metric or task.principal)
            target = Target(full, head, self.fraction, up)
        except UserError as error:  # what the baselines gave, and they would give it again
            place.mkdir(parents=True, exist_ok=True)
            spent = self._spent(place, time.perf_counter() - began, 0)
            return Measured({}, None, spent, chosen, str(error))
        search = Smallest(
            to_dict(experiment), self.size, self.ladder,
            [{"seed": s, **dict.fromkeys(self.vary, s)} for s in seeds],
            metric=self.metric, statistic=self.statistic, diverged=self.diverged, name=self.name,
        )  # fmt: skip
        found = search.run(target, place, Options(mode=self.mode), progress)
        file = place / f"{self._target()}_{FILE}"
        found.save(file)
        spent = self._spent(place, time.perf_counter() - began, len(found.runs))
        return Measured(
            {}, _parameters(found), spent, chosen, _reason(found.threshold, self.ladder),
            place=str(file), summary=_summary(found.threshold, len(seeds)),
            beyond=_beyond(found.threshold, self.ladder),
            notes=(
                _note(found, self.head_only is not None, experiment.training),
                _outside(experiment.method),
            ),
        )  # fmt: skip

    def _runs(
        self, baseline: Baseline, folder: Path, seeds: Sequence[int], progress: bool
    ) -> tuple[float, ...]:
        vary = self.vary if baseline.vary is None else baseline.vary
        work = Trained(
            baseline.config or self.config, metric=self.metric, overrides=baseline.overrides,
            grid=baseline.grid, vary=vary,
        )  # fmt: skip
        values = work.measure(folder, seeds, progress).values
        if not values:
            raise UserError(f"no run of the baseline in {folder} ended with a metric")
        return tuple(values.values())

    def _place(self) -> str:
        return hashed([told(self.config), named(self.overrides), self.size, self.vary, self.grid])

    def _chosen(self, place: Path, seeds: Sequence[int], progress: bool) -> Overrides:
        if len(self.grid) < 2:
            return self.grid[0] if self.grid else {}
        middle = round(math.sqrt(self.ladder.low * self.ladder.high))
        overrides = {**self.overrides, self.size: middle}
        work = Trained(
            self.config, metric=self.metric, overrides=overrides, grid=self.grid, vary=self.vary
        )
        tried = work.measure(place / "grid", seeds[:1], progress)
        if not tried.chosen:
            raise UserError(f"{self.size}={middle}: {tried.reason}")
        return tried.chosen

    def _spent(self, place: Path, seconds: float, runs: int) -> float:
        """Seconds of this threshold's calls that added runs; one that only reads took none."""
        path = place / f"{self._target()}_{_SPENT}"
        before: Mapping[str, float] = json.loads(path.read_text()) if path.exists() else {}
        if runs <= before.get("runs", -1):
            return float(before["seconds"])
        total = before.get("seconds", 0.0) + seconds
        write_json(path, {"runs": runs, "seconds": total})
        return total

    def _target(self) -> str:
        """Of all that makes another threshold of the same runs: each has a file of its own."""
        ends = (self.full, self.head_only)
        return hashed([ends, self.fraction, self.metric, self.statistic,
                      self.ladder, self.diverged, self.name])  # fmt: skip


def _summary(t: Threshold, seeds: int) -> Summary | None:
    """Of a threshold beyond what was run, its interval without a number; None without either."""
    if t.size is None and t.low is None:
        return None
    value, low, high = (math.nan if x is None else x for x in (t.size, t.low, t.high))
    return Summary(value, low, high, math.nan, seeds)


def _beyond(t: Threshold, ladder: Ladder) -> tuple[float, float] | None:
    """See `Measured`."""
    if t.status == "reached":
        return None
    return (ladder.high, math.inf) if t.status == "not reached" else (ladder.low, 0.0)


def _reason(t: Threshold, ladder: Ladder) -> str:
    if (beyond := _beyond(t, ladder)) is None:
        return ""
    at = "the largest" if beyond[1] else "the smallest"
    return f"{t.status}: {at} size run is {beyond[0]}, the target {t.target:.4g}"


def _note(found: Found, gain: bool, training: Any) -> str:
    """The target, and how many runs had converged, by which rule."""
    t = found.target
    full = f"{sum(t.full) / len(t.full):.4g}"
    of = f"the gain from {sum(t.head_only) / len(t.head_only):.4g} to {full}" if gain else full
    level = "95 %" if len({run.seed for run in found.runs}) > 2 else "some 90 %"
    text = (
        f"{found.name}, with its bootstrap interval over seeds ({level}): the target is "
        f"{t.value:.4g}, {t.fraction:g} of {of}"
    )
    if found.threshold.low == 0 or found.threshold.high == math.inf:
        text += "; an end at 0 or inf lies beyond the sizes that were run"
    if not training.patience:
        return f"{text}; every run has {training.steps} updates"
    return (
        f"{text}; a run has converged after {training.patience} evaluations, one each "
        f"{training.eval_every} updates, that are no better than the best before them: "
        f"{found.converged:.0%} of the {len(found.runs)} runs had, the others end at "
        f"{training.steps} updates"
    )


def _outside(method: Any) -> str:
    """What is trained beside the searched size, such as the head, and whether it counts in it."""
    own = "d" if isinstance(method, Subspace) else "the rank"
    if not getattr(method, "train", ()):
        return f"nothing is trained outside of what {own} counts"
    counts = isinstance(method, Subspace) and method.train_counts
    names = ", ".join(method.train)
    return f"{names} trained whole, and {'counted in' if counts else 'no part of'} {own}"


def _parameters(found: Found) -> int | None:
    size = found.threshold.size
    return None if size is None else round(found.parameters_at(size))
