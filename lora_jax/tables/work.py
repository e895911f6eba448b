"""How a cell of a table is measured: by training, by a function, or not, with the reason.

A cell is done once: what it gave is kept in its folder, and a training is resumed where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lora_jax import config as configs
from lora_jax.atomic import write_json
from lora_jax.data.examples import higher_is_better
from lora_jax.errors import UserError
from lora_jax.experiment import to_dict
from lora_jax.plan.sketch import Sketch
from lora_jax.statistics import Summary
from lora_jax.sweeps import grid, search
from lora_jax.sweeps.sweep import Options, Sweep
from lora_jax.training import MeshConfig

Overrides = Mapping[str, Any]
_LOST = "diverged, and left out: seed "


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a cell gave.

    Attributes:
      values: the metric by seed.
      trainable_params: of the model that gave it; None where nothing trains.
      seconds: that the calls took which ended; the time of an interrupted one is not known.
      seeds: that it was asked for; `values` lacks those that diverged, and a number that no seed
        changes stands at the first of them.
      place: folder of the runs: cells that are metrics of the same runs share it.
      known_from: in place of that, the file that had it, and which runs there: see `kept`.
      chosen: what was chosen for it on the first seed (`{"optimizer.learning_rate": 2e-3}`).
      reason: why there is nothing, if there is nothing.
      failed: whether it was to be there, and the same command may give it another time.
      summary: where the runs of all seeds give one number with an interval of its own, that; the
        values are then empty. None: the table summarises the values.
      beyond: of a threshold that lies beyond the sizes run: the last of them, and 0 or infinity.
        The summary then has an interval and no value.
      notes: what the runs showed besides, for the footnotes.
      software: versions and device that it was measured with, where that is known.
    """

    values: Mapping[int, float]
    trainable_params: int | None = None
    seconds: float = 0.0
    chosen: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reason: str = ""
    failed: bool = False
    place: str = ""
    summary: Summary | None = None
    beyond: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    known_from: str = ""
    seeds: tuple[int, ...] = ()
    software: tuple[str, ...] = ()

    def and_more(self, other: Measured) -> Measured:
        """With a training's runs of other seeds."""
        values = {**self.values, **other.values}
        seeds = tuple(sorted({*self.seeds, *other.seeds}))
        notes = [x for x in self.notes + other.notes if not x.startswith(_LOST)]
        return dataclasses.replace(
            other if other.found else self,
            values=values,
            seconds=self.seconds + other.seconds,
            seeds=seeds,
            software=tuple(dict.fromkeys(self.software + other.software)),
            notes=(*dict.fromkeys(notes), *_lost(values, seeds)),
            place=other.place,
        )

    @property
    def where(self) -> str:
        """The same for metrics of the same runs."""
        return self.place or self.known_from

    @property
    def found(self) -> bool:
        """Whether the runs gave something: a number, or that it lies beyond them."""
        return bool(self.values) or self.summary is not None or self.beyond is not None

    def of(self, seeds: Sequence[int]) -> Measured | None:
        """Of these seeds alone; None where it was not asked for all of them."""
        alike, enough = set(seeds) == set(self.seeds), set(seeds) <= set(self.seeds)
        if not (enough if self.values else alike):
            return None
        values = {seed: x for seed, x in self.values.items() if seed in seeds}
        notes = tuple(x for x in self.notes if not x.startswith(_LOST))
        if notes != self.notes:
            notes += _lost(values, seeds)
        return dataclasses.replace(self, values=values, seeds=tuple(seeds), notes=notes)


def _lost(values: Mapping[int, float], seeds: Sequence[int]) -> tuple[str, ...]:
    """A training's note of the seeds that gave no number, where others did."""
    lost = [str(seed) for seed in seeds if seed not in values]
    return (f"{_LOST}{', '.join(lost)}",) if values and lost else ()


def fullest(*several: Mapping[str, Measured]) -> dict[str, Measured]:
    """By name, what has the most seeds; of equals the first."""
    found: dict[str, Measured] = {}
    for name, measured in (item for some in several for item in some.items()):
        if name not in found or len(measured.seeds) > len(found[name].seeds):
            found[name] = measured
    return found


_PLACES = ("data_dir", "folder")
"""Arguments of configs that say where data lie, and not which."""


def told(config: str) -> list[str]:
    """`path/of/config.py:arg` without the folder it lies in, and without those of data: machines,
    and clones on one machine, have their own. What tells one config's runs from another's."""
    path, _, arg = config.partition(":")
    pairs = [x.partition("=") for x in arg.split(",")]
    kept = ["".join(x) for x in pairs if not (x[0] in _PLACES and x[2])]
    return [Path(path).name, *kept]


def named(overrides: Any) -> Any:
    """Overrides, or several, with the names of data's files, without the folders they lie in."""
    if isinstance(overrides, list | tuple):
        return [named(x) for x in overrides]
    if not isinstance(overrides, Mapping):
        return overrides
    return {k: Path(v).name if k.split(".")[-1] == "path" and isinstance(v, str) else named(v)
            for k, v in overrides.items()}  # fmt: skip


def plain(value: Any) -> Any:
    """For `json.dumps(default=)`: works and baselines by what they are told, other mappings than
    dicts, NumPy's numbers."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(config := fields.get("config"), str):
            fields["config"] = told(config)
        return {name: named(x) for name, x in fields.items()}
    return dict(value) if isinstance(value, Mapping) else configs.plain(value)


def hashed(content: Any) -> str:
    """The first 8 hex digits of the SHA-256 of what JSON can hold: names a folder of runs."""
    return hashlib.sha256(json.dumps(content, default=plain).encode()).hexdigest()[:8]


class Work(Protocol):
    def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
        """Does what is missing in `folder`, the row's; UserError where that cannot be done here."""
        ...


@runtime_checkable
class Following(Protocol):
    """Work that reads other rows: it is made from what is there of them, each time anew."""

    def given(self, there: Mapping[str, Measured]) -> Work:
        """With the rows whose runs are there, by name; it measures the others itself."""
        ...


@dataclasses.dataclass(frozen=True)
class Trained:
    """Runs of a config, one a seed, each an ordinary workdir under `members/`.

    Args:
      config: `path/of/config.py:arg`.
      metric: of `result.json`; None: the task's principal one.
      overrides: of the config, by dotted path.
      grid: tried on the first seed, by dotted path; the best of them is run with all seeds. It is
        chosen on the same records as are reported, as the papers do.
      chosen_by: the metric that it is chosen by; None: the one reported. A table of several metrics
        of the same runs names one, so that all are of the same choice.
      vary: what a seed sets besides `seed`: by default the order of the data.
    """

    config: str
    metric: str | None = None
    overrides: Overrides = dataclasses.field(default_factory=dict)
    grid: Sequence[Overrides] = ()
    chosen_by: str | None = None
    vary: Sequence[str] = ("data.seed", "training.dropout_seed")

    @property
    def by_seed(self) -> bool:
        """Whether the runs of a seed are what they are without the others: nothing is chosen."""
        return len(self.grid) < 2

    def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
        base = to_dict(grid.configured(self.config, self.overrides))
        folder = folder / self._place()
        options = Options(mode="auto")
        chosen: Overrides = {}
        seconds = 0.0
        if len(self.grid) > 1:
            tried = [{**one, **self._seed(seeds[0])} for one in self.grid]
            sweep = Sweep(base, {"grid": tried}, folder, options, progress)
            seconds += self._run(sweep)
            metric = self.chosen_by or self.metric or sweep.task.principal
            scored = [
                (self._value(result, metric), at)
                for at, member in enumerate(sweep.grid)
                if (result := _result(sweep, member))["status"] == "finished"
            ]
            if not scored:  # that is what they gave, and they would give it again
                spent = self._spent(folder, seconds)
                return Measured({}, None, spent, {}, "every run of the grid diverged",
                                place=str(folder))  # fmt: skip
            best = max(scored) if higher_is_better(sweep.task, metric) else min(scored)
            chosen = self.grid[best[1]]
        elif self.grid:
            chosen = self.grid[0]
        runs = [{**chosen, **self._seed(seed)} for seed in seeds]
        sweep = Sweep(base, {"seed": runs}, folder, options, progress)
        seconds += self._run(sweep)
        metric = self.metric or sweep.task.principal
        values, params = {}, None
        for seed, member in zip(seeds, sweep.grid, strict=True):
            result = _result(sweep, member)
            if result["status"] != "finished":
                continue
            values[seed], params = self._value(result, metric), result["trainable_params"]
        reason = "" if values else "every run diverged"
        notes = _lost(values, seeds)
        spent = self._spent(folder, seconds)
        return Measured(values, params, spent, chosen, reason, place=str(folder), notes=notes)

    def _place(self) -> str:
        """The same for all metrics of the same runs, and for grids that share some of them."""
        return hashed([told(self.config), named(self.overrides)])

    def _value(self, result: Mapping[str, Any], metric: str) -> float:
        if metric not in result["metrics"]:
            raise UserError(
                f"{self.config} gives no metric {metric!r}; it has {', '.join(result['metrics'])}"
            )
        return float(result["metrics"][metric])

    def _seed(self, seed: int) -> dict[str, Any]:
        return {"seed": seed, **dict.fromkeys(self.vary, seed)}

    @staticmethod
    def _run(sweep: Sweep) -> float:
        """Seconds that it took; nothing where all is there already."""
        return float(sweep.run()["seconds"]) if sweep.waiting else 0.0

    @staticmethod
    def _spent(folder: Path, seconds: float) -> float:
        """Added to what earlier calls took."""
        path = folder / "seconds.json"
        before = json.loads(path.read_text()) if path.exists() else 0.0
        if seconds:
            write_json(path, before + seconds)
        return float(before + seconds)


def _result(sweep: Sweep, member: grid.Member) -> dict[str, Any]:
    found = search.result(sweep.folder, member)
    assert found is not None  # the sweep has just ended
    return found


@dataclasses.dataclass(frozen=True)
class Computed:
    """What a function gives: counts, times, searches.

    Args:
      function: (folder, seed) -> {"value": …, "trainable_params": maybe}; called once a seed.
      seeded: whether the seed matters; if not, it is called once.
      name: of the file that keeps what it gave; "": the function's.
      metric: for a function that gives several cells at once, {metric: {"value": …}}: which of
        them. It is called once for all cells of its row.
    """

    function: Callable[[Path, int], Mapping[str, Any]]
    seeded: bool = False
    name: str = ""
    metric: str = ""

    @property
    def file(self) -> str:
        """Of what it gave, in the row's folder."""
        return f"{self.name or self.function.__name__}.json"

    def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
        path = folder / self.file
        done = json.loads(path.read_text()) if path.exists() else {}
        for seed in seeds if self.seeded else seeds[:1]:
            if str(seed) not in done:
                began = time.perf_counter()
                found = dict(self.function(folder, seed))
                done[str(seed)] = {**found, "seconds": time.perf_counter() - began}
                folder.mkdir(parents=True, exist_ok=True)
                write_json(path, done)
        asked = map(str, seeds) if self.seeded else done
        rows = {int(seed): self._cell(done[seed]) for seed in asked}
        params = next(
            (r["trainable_params"] for r in rows.values() if "trainable_params" in r), None
        )
        return Measured(
            {seed: r["value"] for seed, r in rows.items()},
            params,
            sum(found["seconds"] for found in done.values()),
            place=str(path),
        )

    def _cell(self, found: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.metric:
            return found
        if self.metric not in found:
            raise UserError(f"no metric {self.metric!r}; there are {', '.join(found)}")
        cell: Mapping[str, Any] = found[self.metric]
        return cell


@dataclasses.dataclass(frozen=True)
class Counted:
    """Trainable parameters, in millions: from the model's shapes alone, nothing is run."""

    config: str
    overrides: Overrides = dataclasses.field(default_factory=dict)

    def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
        experiment = grid.configured(self.config, self.overrides)
        # A count needs no mesh, and no devices for one.
        bench = Sketch(dataclasses.replace(experiment, mesh=MeshConfig()))
        total = experiment.method.count(bench.params).total
        return Measured({seeds[0]: total / 1e6}, total)


@dataclasses.dataclass(frozen=True)
class NotRun:
    """A row of the published table that stands there without a number of ours."""

    reason: str

    def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
        return Measured({}, reason=self.reason)
