"""GLUE and classes from any source."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_jax.data.sources import TFDS, Files
from lora_jax.data.tasks.classification import Classification
from lora_jax.data.tasks.glue import Glue
from lora_jax.data.tasks.regression import Regression
from lora_jax.data.tokenizer import Tokenizer
from lora_jax.errors import UserError

# TFDS's fields, in the order of the model's input (tensorflow_datasets/text/glue.py).
FIELDS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
METRICS = {
    "cola": ["matthews"],
    "mrpc": ["accuracy", "f1", "average"],
    "qqp": ["accuracy", "f1", "average"],
    "stsb": ["pearson", "spearman", "average"],
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_task(bert: Tokenizer, name: str) -> None:
    task = Glue(name)  # type: ignore[arg-type]
    label: Any = 3.8 if name == "stsb" else 1
    record = {"label": label, "idx": 0} | dict(zip(reversed(FIELDS[name]), ["c", "a b"][-len(FIELDS[name]) :], strict=True))  # fmt: skip # noqa: E501
    (example,) = task.examples([record], bert)
    pair = len(FIELDS[name]) == 2
    assert example["tokens"].tolist() == ([1, 4, 5, 2, 6, 2] if pair else [1, 4, 5, 2])
    assert example["token_type_ids"].tolist() == ([0, 0, 0, 0, 1, 1] if pair else [0] * 4)
    assert example["tokens"].dtype == example["token_type_ids"].dtype == np.int32
    assert example["label"] == label and isinstance(example["label"], type(label))
    labels = {"mnli": 3, "stsb": 1}.get(name, 2)
    assert task.num_labels == labels
    assert task.head == ("regression" if name == "stsb" else "classification")
    records = [record, {**record, "label": label - 1}]
    guess = np.eye(max(labels, 2), dtype=np.float32)[[1, 0]]
    found = task.metrics(guess[:, 1:] if name == "stsb" else guess[:, :labels], records)
    assert list(found) == METRICS.get(name, ["accuracy"])
    assert next(iter(found)) == task.principal and task.higher_is_better
    assert all(value == pytest.approx(1) for value in found.values())


def test_tfds_has_these_fields_and_classes() -> None:
    glue = pytest.importorskip("tensorflow_datasets.text.glue")
    configs = {c.name: c for c in glue.Glue.builder_configs.values()}
    for name, fields in FIELDS.items():
        assert tuple(configs[name].text_features) == fields
        assert len(configs[name].label_classes or [0]) == Glue(name).num_labels  # type: ignore[arg-type]


def test_average_and_mnlis_two_sets() -> None:
    records = [{"label": n, "sentence1": "", "sentence2": ""} for n in (1, 1, 0, 0)]
    guess = np.eye(2)[[1, 0, 0, 0]]
    found = Glue("mrpc").metrics(guess, records)
    assert found == pytest.approx({"accuracy": 0.75, "f1": 2 / 3, "average": (0.75 + 2 / 3) / 2})
    both = [
        {"label": 2, "split": "validation_matched"},
        {"label": 1, "split": "validation_mismatched"},
        {"label": 1, "split": "validation_mismatched"},
    ]
    assert Glue("mnli").metrics(np.eye(3)[[2, 1, 0]], both) == pytest.approx(
        {"accuracy": 1.0, "accuracy_mismatched": 0.5}
    )


def test_secret_and_wrong_labels(bert: Tokenizer) -> None:
    hidden = {"sentence": "a", "label": -1}
    (example,) = Glue("cola").examples([hidden], bert)
    assert example["label"] == -1
    with pytest.raises(UserError, match="secret"):
        Glue("cola").metrics(np.eye(2)[[0]], [hidden])
    with pytest.raises(UserError, match="Label 2 is none of the 2 classes"):
        Glue("cola").examples([{"sentence": "a", "label": 2}], bert)
    with pytest.raises(UserError, match="no field 'sentence'.*text, label"):
        Glue("cola").examples([{"text": "a", "label": 1}], bert)
    with pytest.raises(UserError, match="no task 'sst'.*sst2"):
        Glue("sst")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="1 predictions for 2 records"):
        Glue("cola").metrics(np.eye(2)[[0]], [hidden, hidden])


def test_real_rte(shared: Path, bert: Tokenizer) -> None:
    records = TFDS("glue/rte", "validation", str(shared / "tfds")).open()
    assert len(records) == 277  # Lester et al., Table 7
    task = Glue("rte", max_length=16)
    examples = task.examples(records, bert)
    assert max(len(e["tokens"]) for e in examples) == 16
    majority = np.tile(np.float32([1, 0]), (277, 1))
    # "Near chance": the larger class of the validation set, 146 of 277.
    assert task.metrics(majority, records[:])["accuracy"] == pytest.approx(146 / 277)


def test_classification(bert: Tokenizer) -> None:
    task = Classification(("no", "yes"), text="q", text_pair="p", label="l", principal="f1")
    records = [{"q": "a", "p": "b", "l": label} for label in ("yes", "0", 1, "no")]
    assert [e["label"] for e in task.examples(records, bert)] == [1, 0, 1, 0]
    assert task.examples(records, bert)[0]["token_type_ids"].tolist() == [0, 0, 0, 1, 1]
    found = task.metrics(np.eye(2)[[1, 1, 1, 0]], records)
    assert list(found) == ["f1", "accuracy", "macro_f1", "matthews"]
    assert found["f1"] == pytest.approx(0.8) and found["accuracy"] == 0.75
    with pytest.raises(UserError, match="'maybe' is none of the 2 classes: no, yes"):
        task.examples([{"q": "a", "p": "b", "l": "maybe"}], bert)
    # A class may be named by a number that is not its index.
    assert Classification(("5", "0")).value({"label": "0"}) == 1
    with pytest.raises(UserError, match="principal='f1'.*accuracy"):
        Classification(("a", "b", "c"), principal="f1")
    with pytest.raises(UserError, match="two or more"):
        Classification(("a", "a"))


def test_regression(bert: Tokenizer) -> None:
    task = Regression()
    records = [{"text": "a", "label": label} for label in (-1, "2.5", 3.0)]
    assert [e["label"] for e in task.examples(records, bert)] == [-1.0, 2.5, 3.0]
    found = task.metrics(np.float32([[0], [3.5], [4]]), records)  # -1 is a value like any other
    assert list(found) == ["pearson", "spearman", "mse"]
    assert found["mse"] == pytest.approx(1) and found["pearson"] == pytest.approx(1)
    with pytest.raises(UserError, match="'high'.*not a number"):
        task.examples([{"text": "a", "label": "high"}], bert)


def test_trec_from_its_own_files(shared: Path, bert: Tokenizer) -> None:
    source = Files(
        str(shared / "data" / "trec" / "{split}.label"),
        split="TREC_10",
        pattern=r"(?P<label>\w+):(?P<fine>\w+) (?P<text>.*)",
        encoding="latin-1",
    )
    task = Classification(("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"))
    records = source.open()
    assert len(records) == 500 and records[0]["text"].startswith("How far is it from Denver")
    counts = Counter(e["label"] for e in task.examples(records, bert))
    assert counts == {0: 9, 1: 138, 2: 94, 3: 65, 4: 81, 5: 113}  # Li and Roth 2002
