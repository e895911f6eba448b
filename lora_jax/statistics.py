"""Summaries over seeds, with intervals: for tables, sweeps and thresholds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

Statistic = Literal["mean", "median"]
LEVEL = 0.95
"""Of all intervals here."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """A statistic of n values.

    Attributes:
      low, high: an interval for it; NaN where n is 1: one value says nothing of its spread.
      std: of the values, with n - 1; NaN where n is 1.
    """

    value: float
    low: float
    high: float
    std: float
    n: int


def mean(values: Sequence[float]) -> Summary:
    """The mean, with Student's t interval: right for values that scatter normally."""
    from scipy import stats  # not before it is needed: it is slow to import

    x = np.asarray(values, np.float64)
    n, value = len(x), float(x.mean())
    if n < 2:
        return Summary(value, math.nan, math.nan, math.nan, n)
    std = float(x.std(ddof=1))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * std / math.sqrt(n)
    return Summary(value, value - half, value + half, std, n)


def median(values: Sequence[float]) -> Summary:
    """The median, between the least and the greatest value.

    Whatever the distribution, that covers the median with probability 1 - 2^(1-n): 0.94 of 5.
    """
    x = np.asarray(values, np.float64)
    n, value = len(x), float(np.median(x))
    if n < 2:
        return Summary(value, math.nan, math.nan, math.nan, n)
    return Summary(value, float(x.min()), float(x.max()), float(x.std(ddof=1)), n)


def summarize(values: Sequence[float], statistic: Statistic) -> Summary:
    return mean(values) if statistic == "mean" else median(values)


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Summary | None:
    """The mean of a - b over the seeds that both have, with its interval; None without any.

    What a seed does to both alike (data order, the head) is not in the difference.
    """
    common = sorted(set(a) & set(b))
    return mean([a[s] - b[s] for s in common]) if common else None


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Summary | None:
    """Spearman's ρ of pairs, with an interval; None of fewer than 4, or where one never varies.

    A pair with NaN is left out.

    The interval is normal in arctanh ρ with variance (1 + ρ²/2) / (n − 3) (Bonett and Wright 2000).
    Pairs in perfect order would have one of no width: its middle is taken half-way to the ρ of one
    swap of neighbours. Infinite values are the first or the last, and share a rank.
    """
    from scipy import stats

    pairs = [(a, b) for a, b in zip(x, y, strict=True) if not (math.isnan(a) or math.isnan(b))]
    x, y, n = [a for a, _ in pairs], [b for _, b in pairs], len(pairs)
    if n < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    value = float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])
    most = 1.0 - 6.0 / (n**3 - n)
    middle = math.atanh(min(max(value, -most), most))
    half = float(stats.norm.ppf(0.5 + LEVEL / 2)) * math.sqrt((1 + value**2 / 2) / (n - 3))
    low, high = math.tanh(middle - half), math.tanh(middle + half)
    return Summary(value, min(low, value), max(high, value), math.nan, n)
