"""Plain text, cut into blocks: every token is a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

from lora_jax.data.examples import Example, Record, fill, make_example
from lora_jax.data.tasks.prompted import opening
from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Text:
    """Language modelling of running text; scored by its loss alone, so it has no other metrics.

    Attributes:
      length: tokens a block, the start token included where the model has one.
      text: record field.
      separator: written between records; "" for the lines of a text file, which keep their ends.
    """

    length: int = 128
    text: str = "text"
    separator: str = ""

    head: ClassVar[Literal["lm"]] = "lm"
    reads: ClassVar[Literal["tokens"]] = "tokens"
    num_labels: ClassVar[int] = 0
    principal: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False

    def examples(self, records: Iterable[Record], tokenizer: Tokenizer) -> list[Example]:
        """Blocks of `length` tokens of the records' joined text; what is left over is dropped."""
        joined = self.separator.join(fill(f"{{{self.text}}}", record) for record in records)
        ids, start = tokenizer.encode(joined), opening(tokenizer)
        size = self.length - len(start)
        if size < 2 or len(ids) < size:
            raise UserError(
                f"The text of {len(ids)} tokens does not fill one block of length={self.length}."
            )
        ends = range(size, len(ids) + 1, size)
        return [make_example([(start, 0), (ids[end - size : end], 1)]) for end in ends]

    def evaluation_records(self, records: Iterable[Record]) -> Sequence[Record]:
        """None: there is nothing to answer."""
        return []

    def metrics(self, predictions: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """None; the trainer measures the loss."""
        return {}


TASK = Text
