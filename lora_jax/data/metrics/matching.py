"""Exact matches, edit distance and error rates."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from lora_jax.errors import UserError


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions from `a` to `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def phoneme_error_rate(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> float:
    """Phoneme errors over phonemes of the references, over the whole set (0 is perfect).

    Phonemes are the words of a string. Each prediction is compared with the nearest of its
    references (of equally near ones the longest), whose length then counts. Above 1 is possible.

    Args:
      predictions: N strings such as "hh ah l ow".
      references: N entries, each one string or several alternatives.
    """
    same_count(predictions, references)
    errors = length = 0
    for index, (prediction, entry) in enumerate(zip(predictions, references, strict=True)):
        options = [r.split() for r in ([entry] if isinstance(entry, str) else entry)]
        if not options or not all(options):
            raise UserError(f"References of prediction {index} are empty: {entry!r}.")
        guess = prediction.split()
        distance, minus_length = min((edit_distance(guess, o), -len(o)) for o in options)
        errors += distance
        length -= minus_length
    if not length:
        raise UserError("phoneme_error_rate of no predictions is undefined.")
    return errors / length


def exact_match(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """Share of predictions that equal one of their references, outer white space aside."""
    same_count(predictions, references)
    if not predictions:
        raise UserError("exact_match of no predictions is undefined.")
    hits = 0
    for prediction, entry in zip(predictions, references, strict=True):
        options = [entry] if isinstance(entry, str) else entry
        hits += prediction.strip() in {option.strip() for option in options}
    return hits / len(predictions)


def same_count(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """UserError unless there is one entry of references for each prediction."""
    if len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predictions for {len(references)} references: give one entry each."
        )


def same_references(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """UserError unless each of one or more predictions has a list of one or more references."""
    same_count(predictions, references)
    if not predictions:
        raise UserError("Scores of no predictions are undefined.")
    for index, options in enumerate(references):
        if isinstance(options, str) or not options:
            raise UserError(f"Prediction {index} needs a list of references, not {options!r}.")
