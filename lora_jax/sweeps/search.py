"""Searches that stop members early or choose the next ones; the slots they free take new members.

Grid and random search only choose members beforehand (`grid.cross`, `grid.sample`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError
from lora_jax.runs import RESULT
from lora_jax.sweeps.grid import Member
from lora_jax.training.reports import METRICS_FILE, read_metrics


@dataclasses.dataclass
class Halving:
    """Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934), by stopping.

    At each rung (`first`, `first`·eta, … updates, below the last step) a member goes on if it is
    among the best 1/eta of all that reached the rung so far, at least one; the others stop.

    Attributes:
      first: updates of the first rung; a multiple of training.eval_every, as eta is whole.
      eta: how many times fewer go on.
      higher_is_better: of the task's principal metric.
    """

    first: int
    eta: int
    higher_is_better: bool
    seen: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.first < 1 or self.eta < 2:
            raise UserError(f"halving needs first >= 1 and eta >= 2, not {self.first}, {self.eta}")

    def check(self, members: Sequence[Member]) -> None:
        """UserError where the members are not evaluated at the rungs."""
        for member in members:
            every = member.experiment.training.eval_every
            if not every or self.first % every:
                raise UserError(
                    f"halving at {self.first} updates needs training.eval_every to divide it, "
                    f"not {every}"
                )
            if self.first >= member.experiment.training.steps:
                raise UserError(
                    f"halving at {self.first} updates comes too late: training.steps is "
                    f"{member.experiment.training.steps}"
                )

    def is_rung(self, step: int) -> bool:
        while step > self.first and step % self.eta == 0:
            step //= self.eta
        return step == self.first

    def recall(self, members: Sequence[Member], folder: Path, metric: str) -> None:
        """Takes up what the workdirs of an interrupted sweep say of the rungs."""
        for member in members:
            path = folder / member.name / METRICS_FILE
            for row in read_metrics(path) if path.exists() else ():
                if f"eval/{metric}" in row and self.is_rung(int(row["step"])):
                    rung = self.seen.setdefault(int(row["step"]), {})
                    rung[member.name] = row[f"eval/{metric}"]

    def recalled(self, member: Member, step: int) -> tuple[str, float] | None:
        """(why it stops, its metric) of a member that an interrupted sweep left at this step."""
        value = self.seen.get(step, {}).get(member.name)
        reason = None if value is None else self._reason(member, step)
        return None if value is None or reason is None else (reason, value)

    def __call__(self, evaluated: list[tuple[Member, int, float]]) -> list[str | None]:
        """Of what was evaluated at one time, [(member, updates done, principal metric)]: why each
        stops here; None: it goes on."""
        for member, step, value in evaluated:
            if self.is_rung(step):
                self.seen.setdefault(step, {})[member.name] = value
        return [self._reason(member, step) for member, step, value in evaluated]

    def _reason(self, member: Member, step: int) -> str | None:
        if not self.is_rung(step):
            return None
        seen = self.seen[step]
        # Of equal ones, which are common early on, those that came first have the better place.
        ranked = sorted(seen, key=lambda name: self._cost(seen[name]))
        place = ranked.index(member.name) + 1
        if place <= max(1, len(ranked) // self.eta):
            return None
        return f"stopped by halving after {step} updates, {place} of {len(ranked)} so far"

    def _cost(self, value: float) -> float:
        """What is not a number (a correlation of constant answers) is last, not in between."""
        if math.isnan(value):
            return math.inf
        return -value if self.higher_is_better else value


def import_optuna() -> Any:
    """The package; UserError where it is missing."""
    try:
        import optuna
    except ImportError:
        raise UserError("search by Optuna needs the package optuna: pip install optuna") from None
    return optuna


class Optuna:
    """Members chosen by Optuna, one categorical parameter for each `sweep_*` generator.

    The grid is finite, so the pack that holds all of it is compiled before the first suggestion.

    Args:
      grid: the member at each position of the generators, (position in each) -> member.
      sizes: how many overrides each generator yields, by its name.
      known: results so far, which a suggestion of the same member is told at once.
      trials: suggestions, repeated ones included.
    """

    def __init__(
        self,
        grid: Mapping[tuple[int, ...], Member],
        sizes: Mapping[str, int],
        *,
        known: Mapping[str, float | None],
        trials: int,
        seed: int,
        higher_is_better: bool,
        metric: str,
    ):
        self._optuna = import_optuna()
        self._study = self._optuna.create_study(
            direction="maximize" if higher_is_better else "minimize",
            sampler=self._optuna.samplers.TPESampler(seed=seed),
        )
        self._grid, self._sizes = dict(grid), dict(sizes)
        self._trials, self._metric = trials, metric
        self._open: dict[str, list[Any]] = {}
        self._known: dict[str, float | None] = dict(known)

    def __iter__(self) -> Iterator[Member]:
        for _ in range(self._trials):
            trial = self._study.ask()
            place = tuple(trial.suggest_categorical(k, range(n)) for k, n in self._sizes.items())
            member = self._grid[place]
            name = member.name
            if name in self._known:
                self._tell(trial, self._known[name])
            elif name in self._open:
                self._open[name].append(trial)
            else:
                self._open[name] = [trial]
                yield member

    def done(self, member: Member, result: Mapping[str, Any]) -> None:
        """Tells the study what a member reached: see `reached`."""
        value = reached(result, self._metric)
        self._known[member.name] = value
        for trial in self._open.pop(member.name, []):
            self._tell(trial, value)

    def _tell(self, trial: Any, value: float | None) -> None:
        failed = self._optuna.trial.TrialState.FAIL
        if value is None:
            self._study.tell(trial, state=failed)
        else:
            self._study.tell(trial, value)


def reached(result: Mapping[str, Any], metric: str) -> float | None:
    """A member's metric; None where it ended early, by divergence or halving: no value of fewer
    updates stands beside those of all."""
    return result["metrics"].get(metric) if result["status"] == "finished" else None


def result(folder: Path, member: Member) -> dict[str, Any] | None:
    """What a member's workdir says, if it is finished."""
    path = folder / member.name / RESULT
    return json.loads(path.read_text()) if path.exists() else None
