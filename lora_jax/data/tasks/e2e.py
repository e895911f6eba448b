"""The E2E NLG Challenge: meaning representations of restaurants to sentences.

Reads the original data (Novikova et al. 2017, arXiv:1706.09254: CSV columns mr, ref) and the
cleaned one (TFDS e2e_cleaned). The form of prompts is that of LoRA's GPT-2 experiments.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from lora_jax.data.examples import Record, eos
from lora_jax.data.metrics import e2e
from lora_jax.data.tasks.prompted import Prompted
from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError

_SLOT = re.compile(r"\s*(?P<name>[^\[\],]+?)\s*\[(?P<value>[^\]]*)\]\s*(?:,|$)")
# Attributes as LoRA's data words them; the others keep their names.
_WORDING = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


@dataclasses.dataclass(frozen=True)
class E2E(Prompted):
    """ "name : Blue Spice | Type : coffee shop | area : city centre", then a sentence.

    Evaluation has one record for each meaning representation, with all its references. LoRA's own
    files hold these sentences with spaces around punctuation; here they are as published.

    Attributes:
      separator: ends the prompt. None: the tokenizer's start token (else its end token), which in
        LoRA's files stands there as <|endoftext|>; or a text, as prefix tuning's " ||".
    """

    separator: str | None = None

    principal: ClassVar[str] = "bleu"

    def prompt(self, record: Record, tokenizer: Tokenizer | None = None) -> str:
        """The meaning representation in one line, and the separator."""
        line = " | ".join(f"{_WORDING.get(n, n)} : {value}" for n, value in slots(record))
        return line + (_marker(tokenizer) if self.separator is None else self.separator)

    def completion(self, record: Record, tokenizer: Tokenizer | None = None) -> str:
        """E.g. " Blue Spice is a coffee shop in the city centre."."""
        return " " + self.references(record)[0]

    def references(self, record: Record) -> list[str]:
        """All sentences of the record."""
        if "references" in record:
            return [str(reference) for reference in record["references"]]
        text = record.get("ref", record.get("target_text"))
        if not isinstance(text, str):
            raise UserError(
                "An E2E record needs 'ref' (original), 'target_text' (e2e_cleaned) or 'references'."
                f" Its fields: {', '.join(record)}."
            )
        return [text.strip()]

    def evaluation_records(self, records: Iterable[Record]) -> Sequence[Record]:
        """One record for each meaning representation, in order: {slots, references}."""
        groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for record in records:
            groups.setdefault(tuple(slots(record)), []).extend(self.references(record))
        return [{"slots": list(key), "references": found} for key, found in groups.items()]

    def metrics(self, predictions: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """`bleu`, `nist`, `meteor`, `rouge_l`, `cider`: see `lora_jax.data.metrics.e2e`."""
        return e2e.scores(predictions, [self.references(record) for record in records])


def slots(record: Record) -> list[tuple[str, str]]:
    """(attribute, value) pairs of a record of either data set, or of a grouped one."""
    if "slots" in record:
        return [(str(name), str(value)) for name, value in record["slots"]]
    if isinstance(record.get("mr"), str):
        return _parsed(record["mr"])
    table: Any = record.get("input_text", {})
    table = table.get("table", table) if isinstance(table, dict) else {}
    if "column_header" not in table:
        raise UserError(
            "An E2E record needs 'mr' (original) or 'input_text' (TFDS e2e_cleaned). Its fields:"
            f" {', '.join(record)}."
        )
    return list(zip(table["column_header"], table["content"], strict=True))


def _parsed(text: str) -> list[tuple[str, str]]:
    """Slots of "name[Blue Spice], eatType[coffee shop]"."""
    found = [(match["name"], match["value"]) for match in _SLOT.finditer(text)]
    if not found or _SLOT.sub("", text).strip():
        raise UserError(f"Not a meaning representation such as 'name[…], eatType[…]': {text!r}.")
    return found


def _marker(tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        raise UserError("The separator is a token: pass a tokenizer, or E2E(separator=' ||').")
    return tokenizer.special_tokens.get("bos_token") or tokenizer.decode([eos(tokenizer)])


TASK = E2E
