"""Thresholds on curves whose crossing is known, their intervals, and the search for them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lora_jax.errors import UserError
from lora_jax.sweeps.ladder import Ladder, next_sizes, rounds
from lora_jax.sweeps.threshold import Run, Target, crossing, curve, isotonic, threshold

SIZES = np.geomspace(10, 10_000, 10)
TRUTH = 400.0


def accuracy(size: float) -> float:
    """0.75 at TRUTH, from 0.5 to 1."""
    return 0.5 + 0.5 / (1 + TRUTH / size)


def exact(sizes: list[float], seeds: int = 1) -> list[Run]:
    return [Run(float(s), i, accuracy(s)) for s in sizes for i in range(seeds)]


def noisy(rng: np.random.Generator, seeds: int, shared: float, spread: float = 0.02) -> list[Run]:
    """Runs whose noise is, in its share `shared` of the variance, the seed's own at all sizes."""
    own = rng.normal(0, spread * math.sqrt(shared), seeds)
    rest = rng.normal(0, spread * math.sqrt(1 - shared), (len(SIZES), seeds))
    return [
        Run(float(s), i, accuracy(s) + own[i] + rest[k, i])
        for k, s in enumerate(SIZES)
        for i in range(seeds)
    ]


def test_isotonic_by_its_minimax_formula() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 12):
        y, w = rng.normal(size=n), rng.integers(1, 5, n).astype(float)

        def mean(j: int, k: int, y: np.ndarray = y, w: np.ndarray = w) -> float:
            return float(np.average(y[j : k + 1], weights=w[j : k + 1]))

        wanted = [max(min(mean(j, k) for k in range(i, n)) for j in range(i + 1)) for i in range(n)]
        np.testing.assert_allclose(isotonic(y, w), wanted, atol=1e-12)
        assert (np.diff(isotonic(y, w)) >= 0).all()


def test_a_line_in_log_size_is_met_exactly() -> None:
    sizes = np.array([1.0, 10.0, 100.0, 1000.0])
    fitted = 0.1 + 0.2 * np.log10(sizes)
    assert crossing(sizes, fitted, 0.1 + 0.2 * math.log10(250)) == pytest.approx(250)
    assert crossing(sizes, fitted, fitted[2]) == pytest.approx(100)
    assert crossing(sizes, fitted, 0.05) == 0.0 and crossing(sizes, fitted, 0.71) == math.inf


def test_the_crossing_of_a_known_curve() -> None:
    found = threshold(exact(list(SIZES)), Target((1.0,), fraction=0.75))
    assert found.status == "reached" and found.size == pytest.approx(TRUTH, rel=0.02)
    assert found.tested == pytest.approx(464.16, rel=1e-4)  # the first size that was run
    assert found.target == pytest.approx(0.75)
    assert (found.low, found.high, found.reached) == (None, None, None)  # one seed


def test_nothing_is_extrapolated() -> None:
    below = threshold(exact([10, 20, 40], 2), Target((1.0,), fraction=0.75))
    assert below.status == "not reached" and below.size is None and below.tested is None
    assert below.high == math.inf and below.reached == 0.0
    above = threshold(exact([1000, 2000], 2), Target((1.0,), fraction=0.75))
    assert above.status == "reached by the smallest" and above.size is None
    assert above.tested == 1000 and above.low == 0.0


@pytest.mark.parametrize("metric", [0.7, 0.03, 0.1 + 0.2])
def test_an_ulp_does_not_decide(metric: float) -> None:
    """A plateau on the target, one run or five a size: the mean of equal numbers is rounded."""
    for seeds in (1, 5):
        flat = [Run(s, i, metric) for s in (20, 40, 80) for i in range(seeds)]
        rising = [*flat, *(Run(10, i, 0.01) for i in range(seeds))]
        target = Target((metric,), fraction=1.0)
        assert threshold(flat, target).status == "reached by the smallest"
        found = threshold(rising, target)
        assert found.size == pytest.approx(20) and found.tested == 20
        assert next_sizes(rising, target, Ladder(10, 80, points=4, ratio=1.5)) == [14]


def test_an_interval_needs_two_seeds_at_every_size() -> None:
    runs = [Run(10, 0, 0.8), Run(100, 0, 0.88), Run(100, 1, 0.89), Run(1000, 0, 0.95)]
    found = threshold(runs, Target((1.0,)))
    assert found.size and (found.low, found.high) == (None, None)


def test_a_dip_is_smoothed_and_the_published_rule_is_not() -> None:
    metrics = {10: 0.5, 20: 0.8, 40: 0.6, 80: 0.9}
    runs = [Run(s, 0, m) for s, m in metrics.items()]
    found = threshold(runs, Target((1.0,), fraction=0.75))
    np.testing.assert_allclose(curve(runs).fitted, [0.5, 0.7, 0.7, 0.9])
    assert found.tested == 20
    assert found.size == pytest.approx(40 * 2 ** (0.05 / 0.2))


def test_statistics_over_seeds() -> None:
    runs = [Run(s, i, m + d) for s, m in ((10, 0.5), (20, 0.8))
            for i, d in enumerate((-0.3, 0.0, 0.1))]  # fmt: skip
    for statistic, wanted in (("mean", 0.5 - 0.2 / 3), ("median", 0.5), ("best", 0.6)):
        assert curve(runs, statistic=statistic).metrics[0] == pytest.approx(wanted)
    flipped = [Run(r.size, r.seed, -r.metric) for r in runs]
    low = curve(flipped, statistic="best", higher_is_better=False)
    np.testing.assert_allclose(low.metrics, [-0.6, -0.9])


def test_targets() -> None:
    """QQP-like: 0.9 of 0.91 is nearly what a majority vote gets; the gain is not degenerate."""
    assert Target((0.91,)).value == pytest.approx(0.819)
    assert Target((0.90, 0.92), head_only=(0.80,)).value == pytest.approx(0.899)
    assert Target((1.0,), head_only=(3.0,), higher_is_better=False).value == pytest.approx(1.2)
    with pytest.raises(UserError, match="gains nothing over the head alone"):
        Target((0.8,), head_only=(0.85,))
    with pytest.raises(UserError, match="fraction of a loss means nothing"):
        Target((0.8,), higher_is_better=False)
    # 0.9 of -2 is better than -2, and of 0 anything is enough.
    for full in ((-2.0,), (0.0, 0.0)):
        with pytest.raises(UserError, match="full fine-tuning has"):
            Target(full)
        assert Target(full, head_only=(-3.0,)).value > -3.0


def test_a_loss_is_the_mirror_image() -> None:
    rng = np.random.default_rng(0)
    runs = noisy(rng, 3, 0.5)
    loss = [Run(r.size, r.seed, 2 - r.metric) for r in runs]
    up = threshold(runs, Target((1.0, 0.98), (0.5,), fraction=0.5))
    down = threshold(loss, Target((1.0, 1.02), (1.5,), fraction=0.5, higher_is_better=False))
    assert up.size == pytest.approx(down.size) and up.tested == down.tested
    assert (up.low, up.high) == pytest.approx((down.low, down.high))


@pytest.mark.parametrize(("seeds", "shared"), [(3, 0.0), (3, 0.8), (5, 0.8)])
def test_the_interval_covers_the_crossing_as_often_as_it_says(seeds: int, shared: float) -> None:
    rng = np.random.default_rng(seeds)
    count, hits = 200, 0
    for i in range(count):
        found = threshold(noisy(rng, seeds, shared), Target((1.0,), fraction=0.75),
                          resamples=300, seed=i)  # fmt: skip
        assert found.low is not None and found.high is not None
        hits += found.low <= TRUTH <= found.high
    assert 0.88 <= hits / count <= 0.99


def test_an_uncertain_baseline_widens_the_interval() -> None:
    runs = noisy(np.random.default_rng(1), 4, 0.0, spread=0.005)
    fixed = threshold(runs, Target((1.0,), fraction=0.75))
    own = threshold(runs, Target((0.94, 1.06, 1.02, 0.98), fraction=0.75))
    assert own.target == pytest.approx(fixed.target)
    assert own.low < fixed.low and own.high > fixed.high


def test_pairs() -> None:
    """Noise that a seed has at all sizes moves the crossing of paired draws only."""
    runs = noisy(np.random.default_rng(2), 6, 1.0)
    target = Target((1.0,), fraction=0.75)
    wide, narrow = (threshold(runs, target, pair=p) for p in (True, False))
    assert math.log(wide.high / wide.low) > 1.1 * math.log(narrow.high / narrow.low)
    assert threshold(runs, target) == wide
    with pytest.raises(UserError, match="same seeds at every size"):
        threshold(runs[1:], target, pair=True)
    threshold(runs[1:], target)


def test_runs_that_make_no_threshold() -> None:
    found = [Run(4.0, 0, 0.5), Run(4.0, 1, 0.1)]
    with pytest.raises(UserError, match="two runs of one size and seed"):
        threshold([*found, found[0]], Target((1.0,)))
    with pytest.raises(UserError, match="needs runs"):
        threshold([], Target((1.0,)))


def test_what_is_no_number_is_neither_enough_nor_too_little() -> None:
    """NaN compares as false both ways: unnoticed, the crossing would be anywhere."""
    runs = [Run(10, 0, 0.5), Run(20, 0, math.nan), Run(40, 0, 0.9)]
    with pytest.raises(UserError, match=r"size 20, seed 0, has the metric nan.*diverged"):
        threshold(runs, Target((1.0,), fraction=0.75))
    for full, head in (((0.9, math.nan), ()), ((0.9,), (math.inf,))):
        with pytest.raises(UserError, match="is no baseline"):
            Target(full, head)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_ladder_closes_in(parts: int) -> None:
    ladder = Ladder(10, 10_000, points=4, ratio=1.1, parts=parts)
    assert ladder.grid() == [10, 100, 1000, 10_000]
    target = Target((1.0,), fraction=0.75)
    asked: list[list[int]] = []

    def run(sizes: list[int]) -> list[Run]:
        asked.append(sizes)
        return exact(list(map(float, sizes)))

    have = list(rounds(run, target, ladder))[-1]
    sizes = sorted(r.size for r in have)
    at = next(i for i, s in enumerate(sizes) if s >= TRUTH)
    assert sizes[at - 1] <= TRUTH <= sizes[at] <= 1.1 * sizes[at - 1]
    # A factor of ten by halves: log2(log 10 / log 1.1) rounds, each of one size.
    needed = math.ceil(math.log(math.log(10) / math.log(1.1), parts))
    assert len(asked) == 1 + needed and all(len(s) == parts - 1 for s in asked[1:])
    flat = list(itertools.chain(*asked))
    assert len(set(flat)) == len(flat)  # nothing twice
    assert threshold(have, target).size == pytest.approx(TRUTH, rel=0.003)
    assert next_sizes(have, target, ladder) == []
    # An interrupted search goes on where it was.
    assert next_sizes(have[:2], target, ladder) == [1000, 10_000]


def test_a_run_beyond_the_ladder_leads_nowhere() -> None:
    runs = [Run(s, 0, m) for s, m in ((1, 0.1), (10, 0.95), (100, 0.96), (1000, 0.97))]
    assert next_sizes(runs, Target((1.0,)), Ladder(10, 1000, points=3)) == []


def test_the_ladder_ends_where_there_is_nothing_to_close_in_on() -> None:
    ladder = Ladder(10, 40, points=3)
    for fraction in (0.9, 0.1):
        target = Target((1.0,), fraction=fraction)
        assert next_sizes(exact([10, 20, 40]), target, ladder) == []
    narrow = Ladder(1, 3, points=2)
    assert narrow.grid() == [1, 3]
    runs = [Run(1, 0, 0.0), Run(2, 0, 0.2), Run(3, 0, 1.0)]
    assert next_sizes(runs, Target((1.0,)), narrow) == []  # 2 and 3: no whole number between
    with pytest.raises(UserError, match="low < high"):
        Ladder(5, 5)
