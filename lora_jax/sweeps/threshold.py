"""The smallest size that is good enough (d90, r90): pure functions of (size, seed, metric) rows.

The metric over the size is fitted by the closest non-decreasing curve, and the threshold is where
this, interpolated in log size, meets the target. What the runs do not show is not extrapolated.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lora_jax.errors import UserError

Statistic = Literal["mean", "median", "best"]
Status = Literal["reached", "not reached", "reached by the smallest"]


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run: its size (d, r, parameters, …), seed and metric."""

    size: float
    seed: int
    metric: float


@dataclasses.dataclass(frozen=True)
class Target:
    """The metric that is enough.

    Published: fraction · full, with `full` a fixed number or full fine-tuning's own metrics.
    Where chance is high that is degenerate; with `head_only` it is a fraction of the gain:
    head_only + fraction · (full - head_only). Of several seeds' metrics the mean counts, and the
    bootstrap draws them again.

    Attributes:
      full: full fine-tuning's metric, one a seed.
      head_only: of training the head alone; (): no gain is asked for.
      fraction: 0.9 for d90.
      higher_is_better: False for a loss, which only has a gain.
    """

    full: tuple[float, ...]
    head_only: tuple[float, ...] = ()
    fraction: float = 0.9
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not self.full:
            raise UserError("a target needs the metric of full fine-tuning, or a fixed one")
        if not self.higher_is_better and not self.head_only:
            raise UserError("a fraction of a loss means nothing: give head_only for its gain")
        if not np.isfinite([*self.full, *self.head_only]).all():
            raise UserError(
                f"a run without a metric is no baseline (full: {self.full}, head_only: "
                f"{self.head_only}): lower its learning rate, or leave its seed out"
            )
        if not self.head_only and np.mean(self.full) <= 0:
            raise UserError(
                f"full fine-tuning has {np.mean(self.full):.4g}: a fraction of what is not above 0 "
                "means nothing; give head_only for its gain"
            )
        if self.head_only:
            gain = float(np.mean(self.full) - np.mean(self.head_only))
            if (gain if self.higher_is_better else -gain) <= 0:
                raise UserError(
                    f"full fine-tuning ({np.mean(self.full):.4g}) gains nothing over the head "
                    f"alone ({np.mean(self.head_only):.4g}): there is no fraction of it"
                )

    @property
    def value(self) -> float:
        """The target in the metric's own units."""
        return self._of(float(np.mean(self.full)), float(np.mean(self.head_only or (0.0,))))

    def _of(self, full: Any, head: Any) -> Any:
        return head + self.fraction * (full - head)

    def drawn(self, rng: np.random.Generator, count: int, level: float) -> np.ndarray:
        """Values for `count` resamples of the baselines' seeds."""
        full = resampled(rng, np.asarray(self.full), count, level)
        head = resampled(rng, np.asarray(self.head_only or (0.0,)), count, level)
        return self._of(full, head)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """What the runs show.

    Attributes:
      target: the metric asked for.
      status: whether the fitted curve meets it between two sizes that were run.
      size: where; None unless it is "reached".
      tested: the smallest size run whose own metric (the statistic over its seeds) is enough, as
        published; None: no such.
      low, high: ends of the interval; 0: the smallest size run may do, inf: the largest may not.
        None: a size has fewer than two seeds.
      reached: share of the resamples that met the target at all.
    """

    target: float
    status: Status
    size: float | None
    tested: float | None
    low: float | None
    high: float | None
    reached: float | None


@dataclasses.dataclass(frozen=True)
class Curve:
    """Sizes, ascending, with the statistic over their seeds, and the monotone fit to it."""

    sizes: np.ndarray
    metrics: np.ndarray
    weights: np.ndarray
    fitted: np.ndarray


def curve(
    runs: Sequence[Run], *, higher_is_better: bool = True, statistic: Statistic = "mean"
) -> Curve:
    """The monotone fit, each size weighted by its number of seeds. UserError without runs."""
    groups = _by_size(runs)
    values = np.array([_statistic(x, statistic, higher_is_better) for x in groups.values()])
    weights = np.array([len(x) for x in groups.values()], float)
    sign = 1.0 if higher_is_better else -1.0
    return Curve(np.array(list(groups)), values, weights, sign * isotonic(sign * values, weights))


def isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The non-decreasing sequence closest to `values` in weighted squares (pool adjacent
    violators: Ayer et al. 1955)."""
    blocks: list[tuple[float, float, int]] = []  # (mean, weight, length)
    for value, weight in zip(values, weights, strict=True):
        block = (float(value), float(weight), 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, w, length = blocks.pop()
            total = w + block[1]
            block = ((mean * w + block[0] * block[1]) / total, total, length + block[2])
        blocks.append(block)
    return np.repeat([b[0] for b in blocks], [b[2] for b in blocks])


def crossing(sizes: np.ndarray, fitted: np.ndarray, target: float) -> float:
    """Where a non-decreasing curve meets the target, linear in log size between its points.

    0 where the smallest size is above it already, inf where the largest is still below.
    """
    at = int(np.searchsorted(fitted, enough(target)))  # the first that is not below
    if at == 0:
        return 0.0
    if at == len(fitted):
        return math.inf
    share = min((target - fitted[at - 1]) / (fitted[at] - fitted[at - 1]), 1.0)
    return float(sizes[at - 1] * (sizes[at] / sizes[at - 1]) ** share)


def enough(target: float) -> float:
    """The least metric that meets a target: a mean of equal numbers need not be one of them, and
    an ulp must not decide."""
    return target - 1e-12 * max(1.0, abs(target))


def threshold(
    runs: Sequence[Run],
    target: Target,
    *,
    statistic: Statistic = "mean",
    level: float = 0.95,
    resamples: int = 1000,
    pair: bool | None = None,
    seed: int = 0,
) -> Threshold:
    """The threshold, and its bootstrap interval over seeds.

    Args:
      statistic: over the seeds of a size.
      level: of the interval. For the mean it is as wide as so few seeds ask for (`stretch`): in
        simulations with three to ten seeds, 0.95 covers 91 to 97 % of the time, and with two
        some 90 %. For the median
        and the best, plain percentiles: too narrow with few seeds.
      pair: True: seeds are drawn for all sizes at once, which is right where one seed's runs
        share data order and subspace; all sizes must then have the same seeds. False: within each
        size. None: paired if the seeds are the same.
      seed: of the resampling.
    """
    up, sign = target.higher_is_better, 1.0 if target.higher_is_better else -1.0
    fit = curve(runs, higher_is_better=up, statistic=statistic)
    found = crossing(fit.sizes, sign * fit.fitted, sign * target.value)
    status: Status = "reached"
    if not 0 < found < math.inf:
        status = "not reached" if found else "reached by the smallest"
    meeting = fit.sizes[sign * fit.metrics >= enough(sign * target.value)]
    low = high = reached = None
    groups = _by_size(runs)
    if min(map(len, groups.values())) > 1:
        rng = np.random.default_rng(seed)
        drawn = _resampled_metrics(rng, runs, groups, resamples, statistic, up, pair, level)
        targets = target.drawn(rng, resamples, level)
        places = np.sort([
            crossing(fit.sizes, isotonic(sign * m, fit.weights), sign * t)
            for m, t in zip(drawn, targets, strict=True)
        ])  # fmt: skip
        cut = math.floor((1.0 - level) / 2 * (resamples - 1))
        low, high = float(places[cut]), float(places[-1 - cut])
        reached = float(np.mean(places < math.inf))
    return Threshold(
        target.value, status, found if status == "reached" else None,
        float(meeting[0]) if meeting.size else None, low, high, reached,
    )  # fmt: skip


def _by_size(runs: Sequence[Run]) -> dict[float, np.ndarray]:
    """Metrics by size, sizes ascending, seeds in order.

    UserError for what would be compared wrongly: NaN is neither below nor above a target.
    """
    if not runs:
        raise UserError("a threshold needs runs")
    seen = [(r.size, r.seed) for r in runs]
    if len(set(seen)) < len(seen):
        raise UserError("two runs of one size and seed: keep one of them")
    if min(r.size for r in runs) <= 0:
        raise UserError("sizes must be above 0: they are compared by their logarithms")
    for r in runs:
        if not math.isfinite(r.metric):
            raise UserError(
                f"the run of size {r.size:g}, seed {r.seed}, has the metric {r.metric}: say what "
                "it counts as, such as the metric at chance (`Smallest(…, diverged=…)`)"
            )
    ordered = sorted(runs, key=lambda r: (r.size, r.seed))
    sizes = sorted({r.size for r in runs})
    return {s: np.array([r.metric for r in ordered if r.size == s]) for s in sizes}


def _statistic(x: np.ndarray, statistic: Statistic, higher_is_better: bool) -> Any:
    """Over the last axis."""
    if statistic == "best":
        return x.max(-1) if higher_is_better else x.min(-1)
    return np.median(x, -1) if statistic == "median" else x.mean(-1)


def resampled(rng: np.random.Generator, values: np.ndarray, count: int, level: float) -> np.ndarray:
    """Means of `count` resamples [count], spread so that their percentiles make an interval."""
    n = len(values)
    picked = rng.integers(n, size=(count, n))
    return values.mean() + stretch(n, level) * (values[picked].mean(-1) - values.mean())


def stretch(n: int, level: float) -> float:
    """By how much the deviations of resampled means of n values are too small for an interval.

    A bootstrap's spread is too small by sqrt((n - 1) / n), and its percentiles are those of a
    normal distribution where Student's t is due (Hesterberg 2015, arXiv:1411.5279).
    t is expanded in 1 / (n - 1); of a single value nothing is known, and nothing is stretched.
    """
    if n < 2:
        return 1.0
    z, nu = statistics.NormalDist().inv_cdf((1.0 + level) / 2), n - 1
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    return math.sqrt(n / (n - 1)) * t / z


def _resampled_metrics(
    rng: np.random.Generator,
    runs: Sequence[Run],
    groups: Mapping[float, np.ndarray],
    count: int,
    statistic: Statistic,
    up: bool,
    pair: bool | None,
    level: float,
) -> np.ndarray:
    """[count, sizes]: the statistic of every size in each resample."""
    seeds = {s: {r.seed for r in runs if r.size == s} for s in groups}
    alike = len({frozenset(x) for x in seeds.values()}) == 1
    if pair and not alike:
        raise UserError("pair=True needs the same seeds at every size; run what is missing")
    together = None
    columns = []
    for values in groups.values():
        n = len(values)
        picked = rng.integers(n, size=(count, n)) if together is None else together
        if alike and pair is not False:
            together = picked
        drawn = _statistic(values[picked], statistic, up)
        if statistic == "mean":
            drawn = values.mean() + stretch(n, level) * (drawn - values.mean())
        columns.append(drawn)
    return np.stack(columns, 1)
