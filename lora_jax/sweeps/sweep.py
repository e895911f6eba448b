"""A sweep from a config file to a table: grid, packs, one program each, results.

The workdir holds `members/<name>/` (each an ordinary workdir), `results.csv` (grows as members
finish), `updates.csv` (size and spectrum of every update, see `training.spectra`), plots,
`report.html`, and `result.json` at the end. The same command continues
an interrupted sweep; a larger grid in the same workdir runs what is new, and `result.json` then
states the packs, programs and seconds of both commands.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax import config as configs
from lora_jax import locks
from lora_jax.atomic import write_json
from lora_jax.errors import UserError
from lora_jax.experiment import from_dict, to_dict
from lora_jax.progress import drawable
from lora_jax.runs import RESULT, environment, evaluate_base, one_process
from lora_jax.sweeps import grid, planner, report, search, updates
from lora_jax.sweeps.grid import Member
from lora_jax.sweeps.prepare import Mode, Prepared, prepare
from lora_jax.sweeps.train import Done, Trainer
from lora_jax.workbench import Workbench

# Of a sweep's result: what adds up over commands in one workdir.
_SPENT = (
    "packs", "programs_compiled", "modes", "update_seconds", "expected_seconds", "seconds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """How a sweep is run; none of these changes a member's numbers beyond rounding.

    Attributes:
      generators: names of `sweep_*` to use; (): all.
      random: try so many combinations of the grid at random; None: all of them.
      halving: (first rung in updates, eta); None: no member is stopped early.
      optuna: trials that Optuna chooses from the grid; None: off.
      seed: of random and Optuna search.
      mode: as many members of a pack at once as fit ("packed"), one after another through one
        program ("serial"), or as many as a short probe finds fastest ("auto").
      slots: most members at once; None: as many as fit in memory.
      memory: bytes a pack may use on a device; None: what the device has.
      compile_seconds: cost of one more program, for cutting packs.
      dry: plan and print only.
    """

    generators: tuple[str, ...] = ()
    random: int | None = None
    halving: tuple[int, int] | None = None
    optuna: int | None = None
    seed: int = 0
    mode: Mode = "auto"
    slots: int | None = None
    memory: int | None = None
    compile_seconds: float = planner.COMPILE_SECONDS
    dry: bool = False

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise UserError(f"--slots is {self.slots}: train one member at a time or more")
        if self.optuna is None:
            return
        search.import_optuna()  # what is missing is said before anything is compiled
        if self.random is not None:
            raise UserError("random search and Optuna exclude each other")


def sweep(
    spec: str,
    workdir: str | Path,
    *,
    overrides: Sequence[str] = (),
    options: Options = Options(),
    progress: bool = True,
) -> dict[str, Any]:
    """Trains the members of `spec`'s grid; returns what `result.json` holds."""
    base = to_dict(from_dict(configs.load_file(spec), overrides))
    sweeps = grid.generators(spec, options.generators)
    return Sweep(base, sweeps, Path(workdir), options, progress).run()


class Sweep:
    """See `sweep`.

    Args:
      base: a config.
      sweeps: override dicts by the name of their generator; they cross.
    """

    def __init__(
        self,
        base: Mapping[str, Any],
        sweeps: Mapping[str, Sequence[grid.Overrides]],
        workdir: Path,
        options: Options = Options(),
        progress: bool = True,
    ):
        self.workdir, self.options, self.progress = workdir, options, progress
        self.sweeps = sweeps
        combos = grid.cross(self.sweeps)
        if options.random is not None:
            combos = grid.sample(combos, options.random, options.seed)
        self.grid = grid.members(base, combos)
        self.members = grid.unique(self.grid)
        self.keys = sorted({key for combo in combos for key in combo})
        self._benches: dict[str, list[Workbench]] = {}
        self._bench_of: dict[str, Workbench] = {}
        self._update_seconds = 0.0

    @property
    def folder(self) -> Path:
        return self.workdir / "members"

    @property
    def waiting(self) -> list[Member]:
        """The members without a result."""
        return [m for m in self.members if m.name not in self._results]

    @functools.cached_property
    def _results(self) -> dict[str, dict[str, Any]]:
        """By the member's name: those that are there, each read once, then those that come."""
        found = {m.name: search.result(self.folder, m) for m in self.members}
        return {name: result for name, result in found.items() if result is not None}

    @functools.cached_property
    def task(self) -> Any:
        return self.members[0].experiment.data.task

    def run(self) -> dict[str, Any]:
        one_process()
        if self.options.dry:
            return self._run()
        with locks.alone(self.workdir):
            return self._run()

    def _run(self) -> dict[str, Any]:
        began = time.perf_counter()
        waiting = self.waiting
        print(f"{len(self.members)} members, {len(waiting)} to run", flush=True)
        stopper = self._halving()
        plans = self._plan(waiting)
        ready = [self._prepare(p) for p in plans]
        programs, seconds = _programs(ready), sum(r.seconds for r in ready)
        print(f"in all {len(ready)} packs, {programs} programs, about {seconds:.0f} s", flush=True)
        if self.options.dry:
            return self._summary(ready, began, dry=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for one in ready:
            self._train(one, stopper)
        return self._close(self._summary(ready, began))

    # Planning.

    def _halving(self) -> search.Halving | None:
        if self.options.halving is None:
            return None
        first, eta = self.options.halving
        found = search.Halving(first, eta, self.task.higher_is_better)
        found.check(self.members)
        found.recall(self.members, self.folder, self.task.principal)
        return found

    def bench(self, member: Member) -> Workbench:
        """The workbench of all members with this model, data, evaluation, mesh and training, whose
        methods cut the base alike; each way of cutting it holds a base of its own."""
        config = to_dict(member.experiment)
        shared = {k: config[k] for k in ("model", "data", "evaluation", "mesh", "training")}
        shared["data"]["seed"] = shared["training"]["dropout_seed"] = None
        shared["training"]["start_from"] = None
        key = json.dumps(shared, sort_keys=True)
        own = json.dumps([key, config["method"]], sort_keys=True)
        if own not in self._bench_of:
            benches, method = self._benches.setdefault(key, []), member.experiment.method
            bench = next((one for one in benches if one.serves(method)), None)
            if bench is None:
                bench = Workbench(member.experiment)
                benches.append(bench)
            self._bench_of[own] = bench
        return self._bench_of[own]

    def shapes(self, member: Member) -> Any:
        return self.bench(member).shapes(member.experiment)[0]

    def _plan(self, members: list[Member]) -> list[planner.PackPlan]:
        if not members:
            return []
        o = self.options
        plans = planner.plan(
            members, self.shapes, flops_per_second=matmul_speed(),
            # Optuna suggests from the whole grid: one program must hold all of it.
            compile_seconds=o.compile_seconds if o.optuna is None else math.inf,
        )  # fmt: skip
        if o.optuna is not None and len(plans) > 1:
            raise UserError(
                f"Optuna searches one program, and this grid has {len(plans)} structures: vary "
                "numbers only"
            )
        return plans

    def _prepare(self, plan: planner.PackPlan) -> Prepared:
        o, bench = self.options, self.bench(plan.members[0])
        bench.check_evaluation()
        return prepare(plan, bench, mode=o.mode, slots=o.slots, memory=o.memory)

    # Training.

    def _train(self, one: Prepared, stopper: search.Halving | None) -> None:
        base = _base_metrics(one)
        members, done = self._chosen(one)
        total = sum(m.experiment.training.steps for m in one.plan.members)
        with Progress(
            TextColumn("{task.fields[note]}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("steps"), TimeRemainingColumn(), disable=not drawable(self.progress),
        ) as bar:  # fmt: skip
            line = bar.add_task("pack", total=total, note=f"{len(one.plan.members)} members")
            trainer = Trainer(
                one.program, members, folder=lambda m: self.folder / m.name, base=base,
                done=done, stopper=stopper, progress=lambda n: bar.advance(line, n),
            )  # fmt: skip
            trainer.run()
        self._update_seconds += trainer.update_seconds

    def _chosen(self, one: Prepared) -> tuple[Iterable[Member], Done]:
        """The pack's members in the order to train them, and who is told of their results."""
        o = self.options
        if o.optuna is None:
            return one.plan.members, self._finished
        sizes = {name: len(overrides) for name, overrides in self.sweeps.items()}
        places = itertools.product(*map(range, sizes.values()))
        metric = self.task.principal
        study = search.Optuna(
            dict(zip(places, self.grid, strict=True)), sizes,
            known={n: search.reached(r, metric) for n, r in self._results.items()},
            trials=o.optuna, seed=o.seed, metric=metric,
            higher_is_better=self.task.higher_is_better,
        )  # fmt: skip

        def done(member: Member, result: dict[str, Any]) -> None:
            self._finished(member, result)
            study.done(member, result)

        return study, done

    def _finished(self, member: Member, result: dict[str, Any]) -> None:
        if result["status"] != "finished":
            print(f"{member.name} {member.overrides}: {result['status']}", flush=True)
        self._results[member.name] = result
        report.write_csv(report.frame(self.members, self._results), self.workdir / report.CSV)

    # Results.

    def _summary(
        self, ready: Sequence[Prepared], began: float, dry: bool = False
    ) -> dict[str, Any]:
        return {
            "members": len(self.members),
            "packs": len(ready),
            "programs_compiled": _programs(ready),
            "modes": [r.mode for r in ready],
            "update_seconds": self._update_seconds,
            "expected_seconds": sum(r.seconds for r in ready),
            "seconds": time.perf_counter() - began,
            "dry": dry,
            **environment(),
        }

    def _close(self, result: dict[str, Any]) -> dict[str, Any]:
        frame = report.frame(self.members, self._results)
        report.write_csv(frame, self.workdir / report.CSV)
        metric, higher = self.task.principal, self.task.higher_is_better
        made = updates.updates(self.members, self.folder)
        if not made.empty:
            report.write_csv(made, self.workdir / updates.CSV)
        total = self._with_earlier(result)
        report.write(frame, made, self.keys, metric, higher, total, self.workdir)
        write_json(self.workdir / RESULT, total)
        print(frame.to_string(index=False))
        return result

    def _with_earlier(self, result: dict[str, Any]) -> dict[str, Any]:
        """The result with what earlier commands in this workdir, which ran other members, took."""
        path = self.workdir / RESULT
        if not path.exists():
            return result
        before = json.loads(path.read_text())
        # An older version's result may lack some.
        added = {name: before[name] + result[name] for name in _SPENT if name in before}
        return {**result, **added}


def _base_metrics(one: Prepared) -> Callable[[Member], dict[str, float]]:
    """A member's metrics of the base model: examples in its prompt are drawn by the data's seed."""
    bench = one.program.bench

    def seed(member: Member) -> int:
        return member.experiment.data.seed if bench.experiment.evaluation.base_shots else 0

    found = {s: evaluate_base(bench, s)[0] for s in sorted({seed(m) for m in one.plan.members})}
    return lambda member: found[seed(member)]


def _programs(ready: Sequence[Prepared]) -> int:
    """Compiled for steps so far; other lengths of rows come as the data has them."""
    return sum(r.program.programs + r.probed for r in ready)


@functools.cache
def matmul_speed(size: int = 1024) -> float:
    """FLOPs a second of a float32 matrix product on this device."""
    x = jnp.ones((size, size))
    run = jax.jit(lambda a: a @ a)
    run(x).block_until_ready()
    began = time.perf_counter()
    for _ in range(3):
        x = run(x) / size
    x.block_until_ready()
    return 3 * 2 * size**3 / (time.perf_counter() - began)
