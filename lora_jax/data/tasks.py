"""Tasks: a record of a source -> the text, token ids and loss mask of a training example."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from lora_jax.data.chat import Chat
from lora_jax.data.examples import Example, Record, Task, eos, fill, make_example, strings
from lora_jax.data.tokenizer import Tokenizer

__all__ = ["G2P", "TASKS", "Chat", "Example", "Record", "Task", "TextToText"]


class _PromptCompletion:
    """Examples from `prompt` and `completion`: prompt ids, then completion ids and the end token.

    The two are tokenised apart, so that training sees the prompt's ids exactly as decoding will.
    """

    def prompt(self, record: Record, tokenizer: Tokenizer | None = None) -> str:
        raise TypeError(f"{type(self).__name__} must define prompt")

    def completion(self, record: Record, tokenizer: Tokenizer | None = None) -> str:
        raise TypeError(f"{type(self).__name__} must define completion")

    def prompt_ids(self, record: Record, tokenizer: Tokenizer) -> list[int]:
        """Ids to decode from: bos where the model wants it, then the prompt."""
        start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        return start + tokenizer.encode(self.prompt(record, tokenizer))

    def examples(self, records: Iterable[Record], tokenizer: Tokenizer) -> list[Example]:
        """One example a record; only the completion and its end token are targets."""
        end = [eos(tokenizer)]
        return [
            make_example(
                [
                    (self.prompt_ids(record, tokenizer), 0),
                    (tokenizer.encode(self.completion(record, tokenizer)) + end, 1),
                ]
            )
            for record in records
        ]


@dataclasses.dataclass(frozen=True)
class TextToText(_PromptCompletion):
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


@dataclasses.dataclass(frozen=True)
class G2P(_PromptCompletion):
    """Word to phonemes, over records {word, phonemes, references} (`cmudict_g2p`).

    Attributes:
      prompt_template: may use {letters} and the record's fields.
      spell: letters set apart ("c a t"), so that each is a token of its own.
    """

    prompt_template: str = "{letters} =>"
    spell: bool = False

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


TASKS: dict[str, type[TextToText] | type[Chat] | type[G2P]] = {
    "text_to_text": TextToText,
    "chat": Chat,
    "g2p": G2P,
}
