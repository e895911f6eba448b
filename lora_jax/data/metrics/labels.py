"""Scores of predicted classes and values. Undefined correlations are 0, as GLUE's scripts have it.

Axis letters: N examples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_jax.errors import UserError

Values = npt.ArrayLike


def _pair(predicted: Values, true: Values) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(predicted), np.asarray(true)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise UserError(
            f"Predictions of shape {a.shape} and labels of shape {b.shape}: give two lists of equal"
            " length, not empty."
        )
    return a, b


def accuracy(predicted: Values, true: Values) -> float:
    """Share of equal classes. Both int [N]."""
    a, b = _pair(predicted, true)
    return float(np.mean(a == b))


def f1(predicted: Values, true: Values, *, positive: int = 1) -> float:
    """F1 of one class: 2 TP / (2 TP + FP + FN); 0 where that class occurs in neither list."""
    a, b = _pair(predicted, true)
    hits = np.sum((a == positive) & (b == positive))
    total = np.sum(a == positive) + np.sum(b == positive)
    return float(2 * hits / total) if total else 0.0


def macro_f1(predicted: Values, true: Values) -> float:
    """Mean of the F1 of all classes that occur in either list."""
    a, b = _pair(predicted, true)
    return float(np.mean([f1(a, b, positive=c) for c in np.union1d(a, b)]))


def matthews(predicted: Values, true: Values) -> float:
    """Matthews correlation, for any number of classes (Gorodkin 2004, R_K); 0 where undefined."""
    a, b = _pair(predicted, true)
    classes = np.union1d(a, b)
    hot_a, hot_b = a[:, None] == classes[None, :], b[:, None] == classes[None, :]
    share_a, share_b = hot_a.mean(0), hot_b.mean(0)
    covariance = np.mean(a == b) - share_a @ share_b
    spread = np.sqrt((1 - share_a @ share_a) * (1 - share_b @ share_b))
    return float(covariance / spread) if spread > 0 else 0.0


def pearson(predicted: Values, true: Values) -> float:
    """Pearson correlation of two lists of numbers; 0 where either is constant."""
    a, b = (v.astype(np.float64) for v in _pair(predicted, true))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float((a / np.linalg.norm(a)) @ (b / np.linalg.norm(b)))


def spearman(predicted: Values, true: Values) -> float:
    """Pearson correlation of the ranks; equal values share the mean of their ranks."""
    a, b = _pair(predicted, true)
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]  # type: ignore[no-any-return]
