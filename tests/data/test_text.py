"""Blocks of plain text."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jax.data.loader import eval_batches
from lora_jax.data.sources import Files
from lora_jax.data.tasks.text import Text
from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError


def test_blocks(tiny: Tokenizer) -> None:
    records = [{"text": "abcd"}, {"text": "efg"}]
    examples = Text(length=3).examples(records, tiny)
    assert [tiny.decode(e["tokens"]) for e in examples] == ["abc", "def"]
    assert all(e["loss_mask"].tolist() == [1, 1, 1] for e in examples)
    joined = Text(length=3, separator="|").examples(records, tiny)
    assert [tiny.decode(e["tokens"]) for e in joined] == ["abc", "d|e"]
    with_bos = Tokenizer(tiny.backend, special_tokens=tiny.special_tokens, add_bos=True)
    started = Text(length=3).examples(records, with_bos)
    assert [tiny.decode(e["tokens"]) for e in started] == ["<s>ab", "<s>cd", "<s>ef"]
    assert started[0]["loss_mask"].tolist() == [0, 1, 1]
    with pytest.raises(UserError, match="7 tokens does not fill one block of length=8"):
        Text(length=8).examples(records, tiny)


def test_lines_of_a_text_file_join_to_the_file(tmp_path: Path, tiny: Tokenizer) -> None:
    text = "To be,\n\nor not\nto be"
    (tmp_path / "a.txt").write_text(text)
    records = Files(str(tmp_path / "a.txt")).open()
    assert "".join(r["text"] for r in records) == text
    (whole,) = Text(length=len(text)).examples(records, tiny)
    assert tiny.decode(whole["tokens"]) == text
    half = Files(str(tmp_path / "a.txt"), split="[50%:]").open()
    assert [r["text"] for r in half] == ["or not\n", "to be"]


def test_tiny_shakespeare(shared: Path, smollm: Tokenizer) -> None:
    source = Files(str(shared / "data" / "tiny_shakespeare" / "input.txt"), split="[95%:]")
    examples = Text(length=64).examples(source.open(), smollm)
    assert len(examples) > 100 and {len(e["tokens"]) for e in examples} == {64}
    batch = next(eval_batches(examples, batch_size=2, length=64, pad_id=0, loss="all"))
    assert batch["loss_mask"].sum() == 2 * 63
