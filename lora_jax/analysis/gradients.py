"""The first gradients of weight matrices: their spectra, and how much of these is noise.

Of batches k = 1 … K, G_k [..., in, out] is the gradient of batch k's mean loss by a weight, all at
one place (such as the pretrained start). Three spectra say different things:

- that of the mean Ḡ: what full-batch descent would do first, plus noise;
- that of the mean with alternating signs, (G_1 − G_2 + G_3 − …) / K: what the batches share
  cancels in it, and their noise, independent between batches, is as large in it as in Ḡ. So a
  direction of Ḡ tells something only where its singular value stands above these;
- that of all batches beside each other along the longer side, [G_1 … G_K] / √K where out is the
  longer: the directions that any of them wants, on the shorter side.

Batches are streamed: for a matrix two sums of its shape are kept, and a Gram matrix of its smaller
side. Ranks and energy curves of a spectrum are those of `analysis.spectra`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax.analysis.arrays import Array, dot, library, ratio, turned
from lora_jax.errors import UserError


class Sums(NamedTuple):
    """What is kept of the batches seen so far.

    Attributes:
      total: [..., in, out], Σ G_k.
      alternating: [..., in, out], Σ ±G_k, the first with +.
      gram: [..., n, n] with n = min(in, out), Σ G_k·G_kᵀ, or Σ G_kᵀ·G_k where out is smaller.
      batches: K.
    """

    total: Array
    alternating: Array
    gram: Array
    batches: int


class FirstGradients(NamedTuple):
    """Of one weight; n = min(in, out), and every spectrum falls.

    Attributes:
      mean: [..., n], singular values of Ḡ.
      noise: [..., n], of the mean with alternating signs: a draw of the noise in Ḡ.
      stacked: [..., n], of all G_k / √K beside each other along the longer side: squares add up to
        the mean of ‖G_k‖_F². Below about
        √eps of the first nothing is accurate: they come from a Gram matrix.
      scatter: [...], Σ ‖G_k − Ḡ‖_F² / (K − 1): the variance of one batch's gradient, over all
        entries.
      batches: K.
    """

    mean: Array
    noise: Array
    stacked: Array
    scatter: Array
    batches: int


def first_gradients(
    gradient: Callable[[Any], Mapping[str, Array]], batches: Iterable[Any], count: int
) -> dict[str, FirstGradients]:
    """The spectra of each weight over the first `count` batches.

    Args:
      gradient: of a batch, by name of the weight: [..., in, out]. A stack of layers is one array.
      count: an even number, so that what batches share cancels where signs alternate.

    Raises UserError for an odd count, and where there are fewer batches.
    """
    if count < 2 or count % 2:
        raise UserError(f"noise is told from signal by pairs of batches: {count} is not even")
    seen: dict[str, Sums] = {}
    taken = 0
    for batch in itertools.islice(batches, count):
        taken += 1
        for name, g in gradient(batch).items():
            seen[name] = added(seen.get(name), g)
    if taken < count:
        raise UserError(f"{count} batches were asked for, and there are {taken}")
    return {name: spectra(sums) for name, sums in seen.items()}


def added(sums: Sums | None, g: Array) -> Sums:
    """The sums with one more batch's gradient [..., in, out]; None: it is the first."""
    small = g if g.shape[-2] <= g.shape[-1] else turned(g)
    gram = dot(small, turned(small))
    if sums is None:
        return Sums(g, g, gram, 1)
    signed = -g if sums.batches % 2 else g
    return Sums(sums.total + g, sums.alternating + signed, sums.gram + gram, sums.batches + 1)


def spectra(sums: Sums) -> FirstGradients:
    """What the sums say. UserError where signs do not cancel: after an odd number of batches."""
    k = sums.batches
    if k % 2:
        raise UserError(f"noise is told from signal by pairs of batches: {k} is not even")
    xp = library(*sums[:3])
    mean, noise = (xp.linalg.svd(x / k, compute_uv=False) for x in sums[:2])
    squares = xp.maximum(xp.linalg.eigvalsh(sums.gram / k)[..., ::-1], 0.0)
    # Σ ‖G_k − Ḡ‖² = Σ ‖G_k‖² − K·‖Ḡ‖²; below 0 by rounding alone.
    spread = xp.sum(squares, axis=-1) - xp.sum(mean * mean, axis=-1)
    scatter = xp.maximum(spread, 0.0) * (k / (k - 1))
    return FirstGradients(mean, noise, xp.sqrt(squares), scatter, k)


def noise_share(found: FirstGradients) -> Array:
    """[...]: how much of ‖Ḡ‖_F² is noise, by its expectation, scatter / K; 0 where Ḡ is.

    About 1 where batches share nothing, and not bounded by it: it is an estimate.
    """
    xp = library(found.mean)
    return ratio(found.scatter / found.batches, xp.sum(found.mean * found.mean, axis=-1))


def rank_above_noise(found: FirstGradients) -> Array:
    """[...]: how many singular values of Ḡ are above the largest of the noise.

    Noise alone gives 0 or a few: both spectra are then draws of one distribution.
    """
    return library(found.mean).sum(found.mean > found.noise[..., :1], axis=-1)
