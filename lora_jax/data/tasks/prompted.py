"""What language tasks share: a prompt, a completion, and the end token after it."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

from lora_jax.data.examples import Example, Record, eos, make_example
from lora_jax.data.metrics import exact_match
from lora_jax.data.tokenizer import Tokenizer


class Prompted(abc.ABC):
    """Examples from `prompt` and `completion`: prompt ids, then completion ids and the end token.

    The two are tokenised apart, so that training sees the prompt's ids exactly as decoding will.
    """

    head: ClassVar[Literal["lm"]] = "lm"
    reads: ClassVar[Literal["tokens"]] = "tokens"
    num_labels: ClassVar[int] = 0
    principal: ClassVar[str] = "exact_match"
    higher_is_better: ClassVar[bool] = True

    @abc.abstractmethod
    def prompt(self, record: Record, tokenizer: Tokenizer | None = None) -> str:
        """The text the model is given."""

    @abc.abstractmethod
    def completion(self, record: Record, tokenizer: Tokenizer | None = None) -> str:
        """The text the model should go on with (the end token is added as an id)."""

    @abc.abstractmethod
    def references(self, record: Record) -> list[str]:
        """Accepted answers."""

    def prompt_ids(self, record: Record, tokenizer: Tokenizer) -> list[int]:
        """Ids to decode from: bos where the model wants it, then the prompt."""
        return opening(tokenizer) + tokenizer.encode(self.prompt(record, tokenizer))

    def examples(self, records: Iterable[Record], tokenizer: Tokenizer) -> list[Example]:
        """One example a record; only the completion and its end token are targets."""
        records = list(records)
        prompts = tokenizer.encode_batch([self.prompt(r, tokenizer) for r in records])
        answers = tokenizer.encode_batch([self.completion(r, tokenizer) for r in records])
        start, end = opening(tokenizer), [eos(tokenizer)]
        return [
            make_example([(start + prompt, 0), (answer + end, 1)])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def evaluation_records(self, records: Iterable[Record]) -> Sequence[Record]:
        """The records to answer and score."""
        return list(records)

    def metrics(self, predictions: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """`exact_match`: share of answers equal to one of their references."""
        return {"exact_match": exact_match(predictions, [self.references(r) for r in records])}


def opening(tokenizer: Tokenizer) -> list[int]:
    """[bos] where texts of this model start with it, else []."""
    return [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
