"""Grapheme to phoneme: a word's letters to its phonemes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from lora_jax.data.examples import Record, fill, strings
from lora_jax.data.metrics import exact_match, phoneme_error_rate
from lora_jax.data.tasks.prompted import Prompted
from lora_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class G2P(Prompted):
    """Word to phonemes, over records {word, phonemes, references} (`cmudict_g2p`).

    Attributes:
      prompt_template: may use {letters} and the record's fields.
      spell: letters set apart ("c a t"), so that each is a token of its own.
    """

    prompt_template: str = "{letters} =>"
    spell: bool = False

    principal: ClassVar[str] = "phoneme_error_rate"
    higher_is_better: ClassVar[bool] = False

    def prompt(self, record: Record, tokenizer: Tokenizer | None = None) -> str:
        """E.g. "c a t =>" with spell, "cat =>" without."""
        word = fill("{word}", record)
        return fill(
            self.prompt_template, {**record, "letters": " ".join(word) if self.spell else word}
        )

    def completion(self, record: Record, tokenizer: Tokenizer | None = None) -> str:
        """E.g. " k ae t"."""
        return " " + fill("{phonemes}", record)

    def references(self, record: Record) -> list[str]:
        """All pronunciations of the word."""
        return strings(record, "references")

    def metrics(self, predictions: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """`phoneme_error_rate` (0 is perfect) and `exact_match`."""
        references = [self.references(r) for r in records]
        return {
            "phoneme_error_rate": phoneme_error_rate(predictions, references),
            "exact_match": exact_match(predictions, references),
        }


TASK = G2P
