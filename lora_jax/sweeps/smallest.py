"""Searches for the smallest size that is good enough: rounds of packed runs, then the threshold.

Any method whose size is one number (d of a subspace, the rank of LoRA, …) can be searched. Each
run is an ordinary member of a sweep, so what was run once is not run again: an interrupted search
goes on, and another target asks only for the sizes it lacks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.atomic import write_json
from lora_jax.errors import UserError
from lora_jax.sweeps import search
from lora_jax.sweeps.ladder import Ladder, rounds
from lora_jax.sweeps.sweep import Options, Sweep
from lora_jax.sweeps.threshold import Run, Statistic, Target, Threshold, threshold

FILE = "smallest.json"


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
      name: of what was searched, for plots: "d90", "r90".
      size: the config field that was varied.
      target: the metric that is enough, and how it was had.
      runs: all runs, of every size and seed.
      threshold: what they show.
      parameters: trainable parameters by size, as counted.
      converged: share of the runs that ended by their patience; the others by their last step.
      statistic: over the seeds of a size.
    """

    name: str
    size: str
    target: Target
    runs: tuple[Run, ...]
    threshold: Threshold
    parameters: Mapping[float, int]
    converged: float
    statistic: Statistic = "mean"

    def parameters_at(self, size: float) -> float:
        """Trainable parameters at a size between those that were run, straight from one to the
        next; 0 and infinity stay what they are."""
        if not 0 < size < math.inf:
            return size
        known = sorted(self.parameters.items())
        below = max((p for p in known if p[0] <= size), default=known[0])
        above = min((p for p in known if p[0] >= size), default=known[-1])
        if below[0] == above[0]:
            return float(below[1])
        share = (size - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1])

    def save(self, path: Path) -> None:
        """As JSON; infinity is written as text, since JSON has none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, json.loads(json.dumps(dataclasses.asdict(self)), parse_constant=str))


def load(path: Path) -> Found:
    """What `Found.save` wrote."""
    raw = json.loads(path.read_text())
    limits: dict[str, Any] = {k: float(v) if isinstance(v, str) and k != "status" else v
              for k, v in raw["threshold"].items()}  # fmt: skip
    target: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in raw["target"].items()
    }
    return Found(
        raw["name"], raw["size"], Target(**target), tuple(Run(**r) for r in raw["runs"]),
        Threshold(**limits), {float(k): v for k, v in raw["parameters"].items()}, raw["converged"],
        raw["statistic"],
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Smallest:
    """A search.

    Args:
      base: a complete config.
      size: the field that is varied, by dotted path.
      ladder: which sizes.
      seeds: what each seed sets, by dotted path; the number of the seed is its place.
      metric: of the results; None: the task's principal one.
      diverged: what a run without a metric counts as, such as chance; None: an error.
      name: of the threshold.
    """

    base: Mapping[str, Any]
    size: str
    ladder: Ladder
    seeds: Sequence[Mapping[str, Any]]
    metric: str | None = None
    statistic: Statistic = "mean"
    diverged: float | None = None
    name: str = "d90"

    def run(
        self, target: Target, folder: Path, options: Options | None = None, progress: bool = True
    ) -> Found:
        """Trains what is missing in `folder`; the same call continues.

        Raises UserError for options that leave members out or choose among them.
        """
        options = options or Options()
        chosen = ("random", "halving", "optuna", "dry")
        if odd := [name for name in chosen if getattr(options, name) not in (None, False)]:
            raise UserError(
                f"a search for a threshold runs every seed of its sizes to the end: no {odd[0]}"
            )
        results: list[tuple[float, int, dict[str, Any]]] = []
        asked: list[int] = []

        def run(sizes: list[int]) -> list[Run]:
            asked.extend(sizes)
            # All sizes so far: those that are done are not run, and the tables show them too.
            sweep = Sweep(self.base, self._overrides(asked), folder, options, progress)
            if sweep.waiting:
                sweep.run()
            metric = self.metric or sweep.task.principal
            new = []
            for member, (size, seed) in zip(sweep.grid, self._places(asked), strict=True):
                if size in sizes:
                    result = search.result(sweep.folder, member)
                    assert result is not None  # the sweep has just ended
                    results.append((size, seed, result))
                    new.append(Run(size, seed, self._metric(result, metric, size, seed)))
            return new

        runs: list[Run] = []
        for runs in rounds(run, target, self.ladder, statistic=self.statistic):
            print(f"{self.name}: {len(runs)} runs of sizes {sorted({r.size for r in runs})}")
        found = threshold(runs, target, statistic=self.statistic)
        counts = {s: r["trainable_params"] for s, _, r in results if "trainable_params" in r}
        ended = [bool(r.get("converged")) for _, _, r in results]
        return Found(
            self.name, self.size, target, tuple(runs), found, counts, sum(ended) / len(ended),
            self.statistic,
        )  # fmt: skip

    def _overrides(self, sizes: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
        return {"size": [{self.size: s} for s in sizes], "seed": [dict(s) for s in self.seeds]}

    def _places(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        return [(size, seed) for size in sizes for seed in range(len(self.seeds))]

    def _metric(self, result: Mapping[str, Any], metric: str, size: float, seed: int) -> float:
        """Of a run; a member that ended early (`status`) has diverged."""
        ended = result["status"] != "finished"
        value = None if ended else result["metrics"].get(metric)
        if value is not None and math.isfinite(value):
            return float(value)
        if not ended and value is None:
            raise UserError(f"the runs give no metric {metric!r}; they have "
                            f"{', '.join(result['metrics'])}")  # fmt: skip
        if self.diverged is None:
            raise UserError(
                f"the run with {self.size}={size}, seed {seed}, diverged: lower the learning rate, "
                "or say what such a run counts as (diverged=…)"
            )
        return self.diverged
