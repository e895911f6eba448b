"""Metrics of classes and values, against SciPy and scikit-learn's definitions worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax.data.metrics import labels
from lora_jax.errors import UserError

RNG = np.random.default_rng(0)


def test_accuracy_and_f1() -> None:
    guess, true = [1, 1, 0, 1, 0], [1, 0, 0, 1, 1]
    assert labels.accuracy(guess, true) == pytest.approx(3 / 5)
    assert labels.f1(guess, true) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert labels.f1(guess, true, positive=0) == pytest.approx(2 / (2 + 1 + 1))
    assert labels.macro_f1(guess, true) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert labels.f1([0, 0], [0, 0]) == 0


def test_matthews() -> None:
    # tp 4, tn 3, fp 2, fn 1: (12 - 2) / sqrt(6 * 5 * 5 * 4).
    guess = [1] * 4 + [0] * 3 + [1] * 2 + [0]
    true = [1] * 4 + [0] * 3 + [0] * 2 + [1]
    assert labels.matthews(guess, true) == pytest.approx(10 / np.sqrt(600))
    assert labels.matthews([1, 1, 1], [1, 0, 1]) == 0  # a constant guess, as scikit-learn has it
    assert labels.matthews([0, 1, 2], [0, 1, 2]) == pytest.approx(1)


def test_matthews_of_three_classes_is_the_correlation_of_indicators() -> None:
    guess, true = RNG.integers(0, 3, 60), RNG.integers(0, 3, 60)
    x, y = (np.eye(3)[v] - np.eye(3)[v].mean(0, keepdims=True) for v in (guess, true))
    expected = np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y))
    assert labels.matthews(guess, true) == pytest.approx(expected)


def test_against_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    for classes in (2, 4):
        guess, true = RNG.integers(0, classes, 50), RNG.integers(0, classes, 50)
        assert labels.matthews(guess, true) == pytest.approx(sklearn.matthews_corrcoef(true, guess))
        macro = sklearn.f1_score(true, guess, average="macro")
        assert labels.macro_f1(guess, true) == pytest.approx(macro)


def test_correlations_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    a = RNG.normal(size=80).round(1)  # with ties
    b = (a + RNG.normal(size=80)).round(1)
    assert labels.pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert labels.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert labels.spearman(a, -(a**3)) == pytest.approx(-1)
    assert labels.pearson(np.float32([1, 1, 1]), [1, 2, 3]) == 0


def test_shapes_are_checked() -> None:
    with pytest.raises(UserError, match=r"\(2,\).*\(3,\)"):
        labels.accuracy([1, 2], [1, 2, 3])
    with pytest.raises(UserError, match="not empty"):
        labels.accuracy([], [])
