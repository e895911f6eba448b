"""Texts and pairs with special tokens, for models with a head."""

from __future__ import annotations

import pytest
import tokenizers

from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError

CLS, SEP, A, B, C, D = 1, 2, 4, 5, 6, 7


def test_berts_template_is_given_to_a_tokenizer_without_one(bert: Tokenizer) -> None:
    assert bert.encode_for_classification(["a b", "c"], max_length=8) == [
        ([CLS, A, B, SEP], [0, 0, 0, 0]),
        ([CLS, C, SEP], [0, 0, 0]),
    ]
    assert bert.encode_for_classification([("a b", "c")], max_length=8) == [
        ([CLS, A, B, SEP, C, SEP], [0, 0, 0, 0, 1, 1])
    ]
    assert bert.encode_for_classification([], max_length=8) == []
    assert bert.encode("a b") == [A, B]  # plain texts stay as they are


def test_the_tokenizers_own_template_is_kept(bert: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(bert.backend.to_str())
    backend.post_processor = tokenizers.processors.RobertaProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    roberta = Tokenizer(backend, special_tokens=bert.special_tokens)
    ((ids, types),) = roberta.encode_for_classification([("a", "b")], max_length=9)
    assert ids == [CLS, A, SEP, SEP, B, SEP] and types == [0] * 6


def test_the_longer_text_is_cut_first(bert: Tokenizer) -> None:
    ((ids, types),) = bert.encode_for_classification([("a b c d e f", "a b")], max_length=7)
    assert ids == [CLS, A, B, SEP, A, B, SEP] and types == [0, 0, 0, 0, 1, 1, 1]
    ((ids, _),) = bert.encode_for_classification([("a b", "a b c d e f")], max_length=7)
    assert ids == [CLS, A, B, SEP, A, B, SEP]
    ((ids, _),) = bert.encode_for_classification(["a b c d"], max_length=4)
    assert ids == [CLS, A, B, SEP]
    assert len(bert.encode("a b c d e f")) == 6, "truncation stayed on"
    with pytest.raises(UserError, match="max_length=3 has no room.*3"):
        bert.encode_for_classification([("a", "b")], max_length=3)


def test_a_decoders_tokenizer_joins_the_two(tiny: Tokenizer) -> None:
    ((ids, types),) = tiny.encode_for_classification([("ab", "c")], max_length=9)
    assert tiny.decode(ids) == "abc" and types[:2] == [0, 0]


def test_batches_of_texts(smollm: Tokenizer) -> None:
    texts = ["", " hello", "c a t =>", "naïve 🙂"]
    assert smollm.encode_batch(texts) == [smollm.encode(text) for text in texts]
