"""Which sizes to run next in a search for a threshold: a log grid, then ever closer around it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from lora_jax.errors import UserError
from lora_jax.sweeps.threshold import Run, Statistic, Target, crossing, curve, enough


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Where a search looks, and how closely.

    Attributes:
      low, high: the smallest and largest size, whole numbers; nothing outside is run.
      points: sizes of the first round, evenly spaced in log size.
      ratio: the search ends when the target lies between sizes this close to each other.
      parts: into how many parts a round cuts that interval: 2 is bisection; a pack of many
        members may as well cut it finer.
    """

    low: int
    high: int
    points: int = 6
    ratio: float = 1.1
    parts: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.low < self.high:
            raise UserError(f"a ladder needs 1 <= low < high, not {self.low} and {self.high}")
        if self.points < 2 or self.parts < 2 or self.ratio <= 1:
            raise UserError("a ladder needs points >= 2, parts >= 2 and a ratio above 1")

    def grid(self) -> list[int]:
        """The first round."""
        return _between(self.low, self.high, self.points - 1, ends=True)


def next_sizes(
    runs: Sequence[Run], target: Target, ladder: Ladder, statistic: Statistic = "mean"
) -> list[int]:
    """The sizes of the next round, ascending; none are left once the search is over.

    It ends too where the largest size is below the target, or the smallest above it: there is
    nothing to close in on. Runs of sizes beyond the ladder do not count.
    """
    runs = [r for r in runs if ladder.low <= r.size <= ladder.high]
    done = {r.size for r in runs}
    if missing := [s for s in ladder.grid() if s not in done]:
        return missing
    fit = curve(runs, higher_is_better=target.higher_is_better, statistic=statistic)
    sign = 1.0 if target.higher_is_better else -1.0
    found = crossing(fit.sizes, sign * fit.fitted, sign * target.value)
    if not 0 < found < math.inf:
        return []
    # The curve is below the target at every size under the crossing.
    above = int((sign * fit.fitted < enough(sign * target.value)).sum())
    left, right = int(fit.sizes[above - 1]), int(fit.sizes[above])
    if right <= left * ladder.ratio:
        return []
    return _between(left, right, ladder.parts, ends=False)


def rounds(
    run: Callable[[list[int]], Sequence[Run]],
    target: Target,
    ladder: Ladder,
    runs: Sequence[Run] = (),
    statistic: Statistic = "mean",
) -> Iterator[list[Run]]:
    """All runs so far, after each round; `run` trains every seed of the sizes it is given.

    Args:
      runs: what is there already, of an interrupted search: all seeds of a size, or none.
    """
    have = list(runs)
    while sizes := next_sizes(have, target, ladder, statistic):
        new = list(run(sizes))
        if {r.size for r in new} != set(sizes):
            raise UserError(f"sizes {sizes} were asked for, not {sorted({r.size for r in new})}")
        have += new
        yield have


def _between(left: int, right: int, parts: int, *, ends: bool) -> list[int]:
    """Whole numbers that cut [left, right] in parts equal in log size."""
    cuts = [round(left * (right / left) ** (i / parts)) for i in range(parts + 1)]
    return sorted(c for c in set(cuts) if ends or left < c < right)
