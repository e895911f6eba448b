"""Scores of generated text against references."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

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
    if len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predictions for {len(references)} references: give one entry each."
        )
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
