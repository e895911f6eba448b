"""Best learning rates and scores of arms, from a table of members, with paired intervals.

The table has a row a member: arm, rate, seed, value; a higher value is better, and it is NaN where
the member diverged. The rates of an arm are evenly spaced in their logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from lora_jax.statistics import Summary, mean, paired

NEAR = 0.5
"""Decades that still count as near."""


def rates(low: float, high: float) -> tuple[float, ...]:
    """Half a decade apart, from exponents of ten."""
    return tuple(float(f"{10 ** (low + i / 2):.2g}") for i in range(round(2 * (high - low)) + 1))


def curves(frame: pd.DataFrame, arm: str) -> pd.DataFrame:
    """value by rate (rows) and seed (columns); a rate that diverged with any seed is left out."""
    own = frame[frame["arm"] == arm].pivot(index="rate", columns="seed", values="value")
    return own.dropna()


def best_rates(frame: pd.DataFrame, arm: str) -> dict[int, float]:
    """log10 of the best rate by seed: the vertex of the parabola through the best of the grid and
    its neighbours, or the best itself where it is at an end."""
    table = curves(frame, arm)
    x = np.log10(table.index.to_numpy(float))
    found = {}
    for seed in table:
        y = table[seed].to_numpy(float)
        i = int(np.argmax(y))
        found[seed] = float(x[i])
        if 0 < i < len(y) - 1:
            bend = y[i - 1] - 2 * y[i] + y[i + 1]
            step = (x[i + 1] - x[i - 1]) / 2
            found[seed] += float(step * 0.5 * (y[i - 1] - y[i + 1]) / bend) if bend else 0.0
    return found


def at_an_end(frame: pd.DataFrame, arm: str) -> bool:
    """Whether the rate that is best in the mean is the grid's least or greatest: only a bound."""
    means = curves(frame, arm).mean(axis=1)
    every = frame.loc[frame["arm"] == arm, "rate"]
    return bool(means.idxmax() in (every.min(), every.max()))


def scores(frame: pd.DataFrame, arm: str) -> dict[int, float]:
    """By seed, the value at the rate that is best in the mean over the other seeds."""
    table = curves(frame, arm)
    return {s: float(table.loc[table.drop(columns=s).mean(axis=1).idxmax(), s]) for s in table}


def gap(frame: pd.DataFrame, one: str, other: str) -> Summary | None:
    """The difference of two arms' scores, over seeds."""
    return paired(scores(frame, one), scores(frame, other))


def shift(frame: pd.DataFrame, ranks: Mapping[str, int]) -> Summary:
    """Decades that the best rate moves from the least to the greatest rank, over seeds.

    Of each seed, from the line through the best rates of all ranks over the rank's logarithm.

    Args:
      ranks: by arm.
    """
    found = [best_rates(frame, arm) for arm in ranks]
    x = np.log2(np.array(list(ranks.values()), float))
    slopes = [float(np.polyfit(x, [rates[seed] for rates in found], 1)[0]) for seed in found[0]]
    return mean([slope * (x.max() - x.min()) for slope in slopes])


def above(frame: pd.DataFrame, arms: Mapping[str, int], reference: str) -> Summary | None:
    """Decades from another arm's best rate up to that of some arms, their mean, by seed."""
    found = [best_rates(frame, arm) for arm in arms]
    middle = {seed: float(np.mean([rates[seed] for rates in found])) for seed in found[0]}
    return paired(middle, best_rates(frame, reference))


def cost_of_one_rate(frame: pd.DataFrame, arms: Mapping[str, int]) -> Summary | None:
    """What one rate for all arms loses against a rate for each, both chosen on the other seeds."""
    tables = {arm: curves(frame, arm) for arm in arms}
    each = {arm: scores(frame, arm) for arm in arms}
    own, shared = {}, {}
    for seed in next(iter(each.values())):
        rest = [table.drop(columns=seed).mean(axis=1) for table in tables.values()]
        one = pd.concat(rest, axis=1).dropna().mean(axis=1).idxmax()
        shared[seed] = float(np.mean([table.loc[one, seed] for table in tables.values()]))
        own[seed] = float(np.mean([x[seed] for x in each.values()]))
    return paired(own, shared)


# What an interval says.


def within(x: Summary | None, target: float, bounded: bool = False) -> str:
    """Whether it lies within, or outside of, `NEAR` around the target.

    Undecided too where it is of best rates that are bounds alone (`at_an_end`).
    """
    if x is None or math.isnan(x.low) or bounded:
        return "undecided"
    if target - NEAR <= x.low and x.high <= target + NEAR:
        return "yes"
    return "no" if x.high < target - NEAR or x.low > target + NEAR else "undecided"


def better(x: Summary | None, one: str, other: str) -> str:
    """Which of two is better by their difference, where its interval leaves out zero.

    The same difference with every seed is a coincidence of few records, and decides nothing: its
    interval has no width.
    """
    if x is None or math.isnan(x.low) or x.low <= 0 <= x.high or (x.n > 1 and x.std == 0):
        return "undecided"
    return one if x.low > 0 else other
