"""Learning from conversations, through the model's chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax.data.chat import render
from lora_jax.data.examples import Example, Record, eos, make_example
from lora_jax.data.tasks.prompted import Prompted
from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chat(Prompted):
    """Conversations through the model's chat template; every assistant turn is a target.

    Attributes:
      messages: record field with [{"role": …, "content": …}, …].
      template: jinja2 source; None: the tokenizer's own.
    """

    messages: str = "messages"
    template: str | None = None

    def _turns(self, record: Record) -> list[Mapping[str, Any]]:
        turns = record.get(self.messages)
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            raise UserError(
                f"Chat needs a list of messages in field {self.messages!r}. The record's fields:"
                f" {', '.join(record)}."
            )
        if not all(isinstance(t, Mapping) and "role" in t and "content" in t for t in turns):
            raise UserError(f"A message in {self.messages!r} lacks 'role' or 'content': {turns!r}")
        return list(turns)

    def _render(self, turns: Sequence[Any], tokenizer: Tokenizer | None, opening: bool) -> str:
        template = self.template or (tokenizer.chat_template if tokenizer else None)
        if template is None:
            raise UserError("No chat template: pass a tokenizer that has one, or Chat(template=…).")
        special = tokenizer.special_tokens if tokenizer else {}
        return render(template, turns, add_generation_prompt=opening, **special)

    def _last(self, record: Record) -> tuple[list[Mapping[str, Any]], int]:
        turns = self._turns(record)
        places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not places:
            raise UserError(
                f"No message of role 'assistant' in {self.messages!r}: nothing to learn."
            )
        return turns, places[-1]

    def prompt(self, record: Record, tokenizer: Tokenizer | None = None) -> str:
        """The conversation up to its last assistant turn, with that turn opened."""
        turns, last = self._last(record)
        return self._render(turns[:last], tokenizer, opening=True)

    def completion(self, record: Record, tokenizer: Tokenizer | None = None) -> str:
        """Content of the last assistant turn."""
        turns, last = self._last(record)
        return str(turns[last]["content"])

    def references(self, record: Record) -> list[str]:
        """The last assistant turn."""
        return [self.completion(record)]

    def prompt_ids(self, record: Record, tokenizer: Tokenizer) -> list[int]:
        """Ids to decode from."""
        return tokenizer.encode(self.prompt(record, tokenizer))

    def examples(self, records: Iterable[Record], tokenizer: Tokenizer) -> list[Example]:
        """One example a conversation. Turns are tokenised apart, as decoding would see them."""
        return [self._example(record, tokenizer) for record in records]

    def _example(self, record: Record, tokenizer: Tokenizer) -> Example:
        turns, last = self._last(record)
        parts: list[tuple[Sequence[int], int]] = []
        done = ""  # the text tokenised so far
        for place, turn in enumerate(turns[: last + 1]):
            if turn["role"] != "assistant":
                continue
            opened = self._render(turns[:place], tokenizer, opening=True)
            closed = self._render(turns[: place + 1], tokenizer, opening=False)
            if not (opened.startswith(done) and closed.startswith(opened)):
                raise UserError(
                    "The chat template rewrites earlier turns when a later one is added, so it is"
                    " unclear which text was generated. Use a template that only appends."
                )
            parts.append((tokenizer.encode(opened[len(done) :]), 0))
            answer = tokenizer.encode(closed[len(opened) :])
            # What the template writes after the end token (a newline) is nobody's answer.
            cut = answer.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in answer else len(answer)
            parts += [(answer[:cut], 1), (answer[cut:], 0)]
            done = closed
        if parts[-2][0][-1:] != [eos(tokenizer)]:
            parts[-2] = ([*parts[-2][0], eos(tokenizer)], 1)
        if parts[-1][1] == 0:  # nothing after the last end token is a target
            parts.pop()
        return make_example(parts)


TASK = Chat
