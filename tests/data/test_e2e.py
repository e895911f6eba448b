"""The E2E task: prompts, grouped evaluation, both data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jax.data.sources import TFDS, Files
from lora_jax.data.tasks.e2e import E2E, slots
from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError

MR = "name[Blue Spice], eatType[coffee shop], customer rating[5 out of 5], familyFriendly[no]"
RECORD = {"mr": MR, "ref": "Blue Spice is a coffee shop."}
CLEANED = {
    "input_text": {"table": {"column_header": ["name", "area"], "content": ["Aromi", "riverside"]}},
    "target_text": "Aromi is by the river.",
}


def test_prompt_is_that_of_loras_files(tiny: Tokenizer) -> None:
    line = "name : Blue Spice | Type : coffee shop"
    line += " | customer rating : 5 out of 5 | family friendly : no"
    assert E2E().prompt(RECORD, tiny) == line + "<s>"
    assert E2E(separator=" ||").prompt(RECORD) == line + " ||"
    assert E2E().completion(RECORD) == " Blue Spice is a coffee shop."
    (example,) = E2E().examples([RECORD], tiny)
    assert tiny.decode(example["tokens"]) == f"{line}<s> Blue Spice is a coffee shop.</s>"
    targets = example["tokens"][example["loss_mask"] == 1]
    assert tiny.decode(targets) == " Blue Spice is a coffee shop.</s>"
    assert example["tokens"][: -len(targets)].tolist() == E2E().prompt_ids(RECORD, tiny)
    assert tiny.bos_id in example["tokens"], "the separator is one token"
    with pytest.raises(UserError, match="separator"):
        E2E().prompt(RECORD)


def test_gpt2_ids_are_those_of_loras_scripts(shared: Path) -> None:
    # gpt2_encode.py --add_bos --add_eos: context, 50256, " " + completion, 50256.
    gpt2 = Tokenizer.from_folder(shared / "data" / "gpt2_tokenizer")
    (example,) = E2E().examples([RECORD], gpt2)
    context = gpt2.encode(E2E(separator="").prompt(RECORD))
    answer = gpt2.encode(" Blue Spice is a coffee shop.")
    assert example["tokens"].tolist() == [*context, 50256, *answer, 50256]


def test_cleaned_records() -> None:
    assert slots(CLEANED) == [("name", "Aromi"), ("area", "riverside")]
    assert E2E().references(CLEANED) == ["Aromi is by the river."]


def test_evaluation_groups_equal_representations() -> None:
    other = {"mr": "name[Aromi]", "ref": "Aromi."}
    records = [RECORD, other, {**RECORD, "ref": "A coffee shop."}]
    grouped = E2E().evaluation_records(records)
    assert [E2E().references(r) for r in grouped] == [
        ["Blue Spice is a coffee shop.", "A coffee shop."],
        ["Aromi."],
    ]
    assert E2E(separator="").prompt(grouped[1]) == "name : Aromi"


def test_wrong_records() -> None:
    for mr in ("Blue Spice", "name[Blue Spice", "name[a] area[b]", ""):
        with pytest.raises(UserError, match="meaning representation"):
            slots({"mr": mr})
    with pytest.raises(UserError, match="'mr'.*text"):
        slots({"text": ""})
    with pytest.raises(UserError, match="'target_text'.*mr"):
        E2E().references({"mr": MR})


def test_real_data(shared: Path) -> None:
    original = Files(str(shared / "data" / "e2e_nlg" / "{split}.csv"), split="testset_w_refs")
    grouped = E2E().evaluation_records(original.open())
    assert len(grouped) == 630 and sum(len(r["references"]) for r in grouped) == 4693
    cleaned = TFDS("e2e_cleaned", "test", str(shared / "tfds")).open()
    assert sum(len(r["references"]) for r in E2E().evaluation_records(cleaned)) == 4693
    first = E2E(separator="").prompt(cleaned[0])
    assert first.startswith("name : Blue Spice | Type : restaurant | food : Chinese | area : riv")
