"""Text to text: prompt and completion from templates over a record's fields."""

from __future__ import annotations

import dataclasses

from lora_jax.data.examples import Record, fill, strings
from lora_jax.data.tasks.prompted import Prompted
from lora_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextToText(Prompted):
    """Prompt and completion from two templates over the record's fields.

    Attributes:
      prompt_template, completion_template: str.format style, e.g. "Question: {question}".
        An empty prompt gives plain language modelling.
      separator: stands between the two. Its newlines and words belong to the prompt; spaces at its
        end open the completion, because byte-level BPE glues a space to the word after it.
      references_field: record field with the list of accepted answers; None: the completion.
    """

    prompt_template: str
    completion_template: str
    separator: str = "\n"
    references_field: str | None = None

    def prompt(self, record: Record, tokenizer: Tokenizer | None = None) -> str:
        """The text the model is given."""
        return fill(self.prompt_template, record) + self.separator.rstrip(" ")

    def completion(self, record: Record, tokenizer: Tokenizer | None = None) -> str:
        """The text the model should go on with (the end token is added as an id)."""
        space = self.separator[len(self.separator.rstrip(" ")) :]
        return space + fill(self.completion_template, record)

    def references(self, record: Record) -> list[str]:
        """Accepted answers."""
        if self.references_field is None:
            return [self.completion(record).strip()]
        return strings(record, self.references_field)


TASK = TextToText
