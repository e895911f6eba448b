"""ROUGE-L and CIDEr as COCO's caption scorers compute them, over tokens of `ptb.words`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from lora_jax.data.metrics import ptb
from lora_jax.data.metrics.matching import same_references

_BETA = 1.2
_ORDERS = 4
_SIGMA = 6.0
_Gram = tuple[str, ...]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L, 0 to 1 (Lin 2004, with beta = 1.2).

    Precision and recall of the longest common subsequence; of several references the best of each
    counts, even where they are two different ones.
    """
    same_references(predictions, references)
    scores = [
        _rouge_l(ptb.words(guess), [ptb.words(r) for r in options])
        for guess, options in zip(predictions, references, strict=True)
    ]
    return sum(scores) / len(scores)


def _rouge_l(guess: list[str], references: list[list[str]]) -> float:
    common = [(longest_common(guess, reference), len(reference)) for reference in references]
    precision = max(c for c, _ in common) / max(len(guess), 1)
    recall = max(c / max(size, 1) for c, size in common)
    if not precision:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence (bit-parallel: Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << index
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        hits = row & places.get(token, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(a) - row.bit_count()


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726, section 5), 0 to 10.

    tf-idf similarity of n-grams, n = 1 to 4, document frequencies from `references`: a score
    depends on the whole set, and one prediction alone scores 0. Two details are the scorer's and
    not the paper's: a text's length is counted in bigrams, and its term frequencies are counts.
    """
    same_references(predictions, references)
    guesses = [_grams(ptb.words(guess)) for guess in predictions]
    sets = [[_grams(ptb.words(r)) for r in options] for options in references]
    seen = Counter(gram for options in sets for gram in set().union(*options))
    rarity = {gram: math.log(len(sets)) - math.log(count) for gram, count in seen.items()}
    weigh = _Weights(rarity, math.log(len(sets)))
    total = 0.0
    for guess, options in zip(guesses, sets, strict=True):
        vector = weigh(guess)
        total += sum(_similarity(vector, weigh(option)) for option in options) / len(options)
    return 10 * total / len(sets)


def _grams(tokens: list[str]) -> Counter[_Gram]:
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, _ORDERS + 1) for i in range(len(tokens) - n + 1)
    )


class _Vector:
    """tf-idf weights by n-gram, their norm for each n, and the number of bigrams."""

    def __init__(self, weights: dict[_Gram, float], bigrams: int) -> None:
        self.weights, self.bigrams = weights, bigrams
        self.norms = [
            math.sqrt(sum(w * w for gram, w in weights.items() if len(gram) == n))
            for n in range(1, _ORDERS + 1)
        ]


class _Weights:
    def __init__(self, rarity: dict[_Gram, float], unseen: float) -> None:
        self._rarity, self._unseen = rarity, unseen

    def __call__(self, counts: Counter[_Gram]) -> _Vector:
        weights = {g: c * self._rarity.get(g, self._unseen) for g, c in counts.items()}
        return _Vector(weights, sum(c for g, c in counts.items() if len(g) == 2))


def _similarity(guess: _Vector, reference: _Vector) -> float:
    """Mean over n of the clipped cosine, times a penalty on the difference in length."""
    products = [0.0] * _ORDERS
    for gram, weight in guess.weights.items():
        other = reference.weights.get(gram)
        if other is not None:
            products[len(gram) - 1] += min(weight, other) * other
    norms = [a * b for a, b in zip(guess.norms, reference.norms, strict=True)]
    cosines = [product / norm for product, norm in zip(products, norms, strict=True) if norm]
    penalty = math.exp(-((guess.bigrams - reference.bigrams) ** 2) / (2 * _SIGMA**2))
    return penalty * sum(cosines) / _ORDERS
