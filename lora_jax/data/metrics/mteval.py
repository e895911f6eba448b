"""BLEU and NIST as NIST's mteval-v13a computes them: lower case, its tokens, no smoothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora_jax.data.metrics.matching import same_references
from lora_jax.errors import UserError

_ORDERS = 5
# Length penalty: 0.5 where the predictions have 2/3 of the references' length.
_BETA = -math.log(0.5) / math.log(1.5) ** 2
_Gram = tuple[str, ...]


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise UserError(
            "BLEU and NIST need the package sacrebleu: pip install 'lora-jax[metrics]'"
        ) from error
    return sacrebleu


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4, 0 to 1: case ignored, 13a tokens, closest reference length, no smoothing.

    sacrebleu's, which equals mteval-v13a -- with any number of references for each prediction.
    """
    same_references(predictions, references)
    metric = _sacrebleu().BLEU(lowercase=True, tokenize="13a", smooth_method="none", force=True)
    most = max(len(options) for options in references)
    columns = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return float(metric.corpus_score(list(predictions), columns).score) / 100


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus NIST-5 (Doddington 2002), 0 upwards, over the tokens of `bleu`.

    Each n-gram that a reference has too counts its information, log2 of how many times rarer the
    references have it than its first n - 1 words. The length penalty compares with the mean length
    of each prediction's references.
    """
    same_references(predictions, references)
    _sacrebleu()
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    cut = Tokenizer13a()
    guesses = [cut(text.lower()).split() for text in predictions]
    sets = [[cut(text.lower()).split() for text in options] for options in references]
    seen: Counter[_Gram] = Counter()
    for options in sets:
        for tokens in options:
            for n in range(1, _ORDERS + 1):
                seen.update(_grams(tokens, n))
    seen[()] = sum(len(tokens) for options in sets for tokens in options)
    score = 0.0
    for n in range(1, _ORDERS + 1):
        gained, count = 0.0, 0
        for guess, options in zip(guesses, sets, strict=True):
            count += max(len(guess) - n + 1, 0)
            most: Counter[_Gram] = Counter()
            for tokens in options:
                most |= Counter(_grams(tokens, n))
            hits = Counter(_grams(guess, n)) & most
            gained += sum(c * math.log2(seen[g[:-1]] / seen[g]) for g, c in hits.items())
        score += gained / max(count, 1)
    wanted = sum(sum(map(len, options)) / len(options) for options in sets)
    return score * _length_penalty(sum(map(len, guesses)), wanted)


def _grams(tokens: list[str], n: int) -> list[_Gram]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _length_penalty(length: int, wanted: float) -> float:
    if length >= wanted:
        return 1.0
    return math.exp(-_BETA * math.log(length / wanted) ** 2) if length else 0.0
