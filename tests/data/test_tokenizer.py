"""Tokenizer: GGUF, Hugging Face folder, special tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError

# From transformers: AutoTokenizer.from_pretrained(folder of the GGUF, gguf_file=its name)
# .encode(text, add_special_tokens=False). (Its conversion leaves the Digits step out, which shows
# on no ASCII digit: this vocabulary has no merge of two digits.)
GOLDEN = {
    "Hello wörld 2024!\n  x=3.14 <|im_start|>user\nhi<|im_end|>": [
        19556, 267, 29989, 400, 216, 34, 32, 34, 36, 17, 3805, 1792, 45, 35, 30, 33, 36, 216, 1,
        4093, 198, 6004, 2,
    ],
    "name[The Vaults], priceRange[more than £30]  It's 100%\t日本": [
        1245, 75, 504, 717, 2131, 99, 1750, 4319, 21470, 75, 3143, 670, 10257, 35, 32, 77, 216,
        657, 506, 216, 33, 32, 32, 21, 197, 23274, 115, 40993,
    ],
}  # fmt: skip


@pytest.mark.parametrize("text", GOLDEN)
def test_gguf_ids_are_those_of_transformers(smollm: Tokenizer, text: str) -> None:
    assert smollm.encode(text) == GOLDEN[text]


@pytest.mark.parametrize("text", ["", "  two  spaces \n\n\ttab", "naïve 日本語 🙂 ½", *GOLDEN])
def test_gguf_round_trip(smollm: Tokenizer, text: str) -> None:
    assert smollm.decode(smollm.encode(text)) == text


def test_gguf_special_tokens(smollm: Tokenizer) -> None:
    assert (smollm.bos_id, smollm.eos_id, smollm.pad_id, smollm.vocab_size) == (1, 2, 2, 49152)
    assert smollm.encode("a<|im_end|>b") == [*smollm.encode("a"), 2, *smollm.encode("b")]
    assert smollm.decode([1, *smollm.encode("a"), 2], skip_special_tokens=True) == "a"
    assert not smollm.add_bos
    assert smollm.chat_template is not None and "<|im_start|>" in smollm.chat_template


def test_gguf_splits_numbers_into_digits(smollm: Tokenizer) -> None:
    # Without the Digits step the fraction sign would merge with the space before it.
    assert smollm.encode(" ½") == [*smollm.encode(" "), *smollm.encode("½")]


def test_unknown_gguf_pre_tokenizer_and_kind_are_refused(tmp_path: Path) -> None:
    import gguf

    for kind, pre, word in (("llama", "gpt-2", "llama"), ("gpt2", "deepseek", "deepseek")):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["a", "b", "ab"])
        writer.add_token_merges(["a b"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(UserError, match=word):
            Tokenizer.from_gguf(tmp_path / "x.gguf")


def test_folder_equals_the_tokenizer_it_was_saved_from(tiny: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tiny.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tiny.bos_id)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "chat_template": [{"name": "default", "template": "T"}, {"name": "x", "template": "X"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.from_folder(tmp_path)
    for text in ("longer than the eight of padding</s>", "ab"):
        assert loaded.encode(text) == tiny.encode(text)
    assert (loaded.bos_id, loaded.eos_id) == (tiny.bos_id, tiny.eos_id)
    assert loaded.pad_id == tiny.eos_id  # no padding token is named
    assert loaded.add_bos and loaded.chat_template == "T"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_folder(tmp_path).chat_template == "J"


def test_gpt2_files(shared: Path) -> None:
    gpt2 = Tokenizer.from_folder(shared / "data" / "gpt2_tokenizer")
    # "Hello world" is 15496 995 in every GPT-2 implementation.
    assert gpt2.encode("Hello world<|endoftext|>") == [15496, 995, 50256]
    assert gpt2.eos_id == 50256


def test_clear_errors(tmp_path: Path, tiny: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(UserError, match="No GGUF"):
        Tokenizer.from_gguf(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="<nope>"):
        Tokenizer(tiny.backend, special_tokens={"eos_token": "<nope>"})
