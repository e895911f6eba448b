"""Tasks and metrics."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax.data.metrics import edit_distance, phoneme_error_rate
from lora_jax.data.tasks import TASKS, Example
from lora_jax.data.tasks.chat import Chat
from lora_jax.data.tasks.g2p import G2P
from lora_jax.data.tasks.text_to_text import TextToText
from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError

WORD = {"word": "cat", "phonemes": "k ae t", "references": ["k ae t", "k aa t"]}
TALK = {
    "messages": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
}


def targets(example: Example, tokenizer: Tokenizer) -> str:
    assert example["tokens"].dtype == np.int32 and example["loss_mask"].dtype == np.float32
    return tokenizer.decode(example["tokens"][example["loss_mask"] == 1])


def test_text_to_text(tiny: Tokenizer) -> None:
    task = TextToText("Q: {q} ({extra[lang]})", "{a}", separator="\nA: ")
    record = {"q": "why", "a": "so", "extra": {"lang": "en"}}
    assert task.prompt(record) == "Q: why (en)\nA:"
    assert task.completion(record) == " so"
    (example,) = task.examples([record], tiny)
    assert tiny.decode(example["tokens"]) == "Q: why (en)\nA: so</s>"
    assert targets(example, tiny) == " so</s>"
    assert example["tokens"][-1] == tiny.eos_id
    assert task.references(record) == ["so"]


def test_bos_where_the_model_wants_it(tiny: Tokenizer) -> None:
    with_bos = Tokenizer(tiny.backend, special_tokens=tiny.special_tokens, add_bos=True)
    task = TextToText("p", "c")
    (example,) = task.examples([{}], with_bos)
    assert tiny.decode(example["tokens"]) == "<s>p\nc</s>"
    assert list(example["tokens"][:3]) == task.prompt_ids({}, with_bos)


def test_unknown_field_lists_the_fields() -> None:
    with pytest.raises(UserError, match=r"\{question\}.*q, a"):
        TextToText("{question}", "{a}").prompt({"q": 1, "a": 2})
    with pytest.raises(UserError, match=r"\{q\[x\]\}"):
        TextToText("{q[x]}", "{a}").prompt({"q": {}, "a": 2})


@pytest.mark.parametrize(("spell", "prompt"), [(False, "cat =>"), (True, "c a t =>")])
def test_g2p(tiny: Tokenizer, spell: bool, prompt: str) -> None:
    task = G2P(spell=spell)
    assert task.prompt(WORD) == prompt and task.references(WORD) == WORD["references"]
    (example,) = task.examples([WORD], tiny)
    assert tiny.decode(example["tokens"]) == f"{prompt} k ae t</s>"
    assert targets(example, tiny) == " k ae t</s>"


def test_chat(tiny: Tokenizer) -> None:
    task = Chat()
    head = "<s>user:1+1?</s>\n<s>assistant:2</s>\n<s>user:sure?</s>\n<s>assistant:"
    assert task.prompt(TALK, tiny) == head
    assert task.completion(TALK) == "yes"
    (example,) = task.examples([TALK], tiny)
    assert tiny.decode(example["tokens"]) == head + "yes</s>"
    assert targets(example, tiny) == "2</s>yes</s>"  # and not the newlines after the end tokens


def test_chat_adds_the_end_token_a_template_lacks(tiny: Tokenizer) -> None:
    task = Chat(template="{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"
                "{% if add_generation_prompt %}a{% endif %}")  # fmt: skip
    (example,) = task.examples([TALK], tiny)
    assert tiny.decode(example["tokens"]) == "u1+1?a2usure?ayes</s>"
    assert targets(example, tiny) == "2yes</s>"


def test_chat_refuses(tiny: Tokenizer) -> None:
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        Chat(template=rewriting).examples([TALK], tiny)
    with pytest.raises(UserError, match="'messages'.*q, a"):
        Chat().examples([{"q": 1, "a": 2}], tiny)
    with pytest.raises(UserError, match="assistant"):
        Chat().examples([{"messages": TALK["messages"][:1]}], tiny)
    with pytest.raises(UserError, match="No chat template"):
        Chat().prompt(TALK)


def test_registry() -> None:
    assert TASKS["g2p"] is G2P and TASKS["chat"] is Chat and TASKS["text_to_text"] is TextToText


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3 and edit_distance("abc", "") == 3
    assert edit_distance("abc", "abc") == 0


def test_phoneme_error_rate() -> None:
    assert phoneme_error_rate(["k ae t"], [["x y", "k ae t"]]) == 0
    # Phonemes, not characters: "ae" for "aa" is one error of three.
    assert phoneme_error_rate(["k ae t"], ["k aa t"]) == pytest.approx(1 / 3)
    # Over the set: (1 + 2) errors of (3 + 1) phonemes, not the mean of the words' rates.
    assert phoneme_error_rate(["k aa", "a b c"], ["k aa t", "a"]) == pytest.approx(3 / 4)
    # Equally near references: the longer one counts.
    assert phoneme_error_rate(["a b"], [["a", "a b c d"[:5]]]) == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="1 predictions for 2"):
        phoneme_error_rate(["a"], ["a", "b"])
    with pytest.raises(UserError, match="empty"):
        phoneme_error_rate(["a"], [[""]])


def test_metrics_name_the_principal_first() -> None:
    task = G2P()
    found = task.metrics([" k aa t\n", "k"], [WORD, WORD])
    assert list(found) == ["phoneme_error_rate", "exact_match"] == [task.principal, "exact_match"]
    assert found == pytest.approx({"phoneme_error_rate": 2 / 6, "exact_match": 0.5})
    assert not task.higher_is_better and (task.head, task.num_labels) == ("lm", 0)
    text = TextToText("{q}", "{a}", references_field="all")
    records = [{"q": "", "a": "x", "all": ["x", "y"]}] * 2
    assert text.metrics(["y ", "z"], text.evaluation_records(records)) == {"exact_match": 0.5}
    assert text.principal == "exact_match" and text.higher_is_better
