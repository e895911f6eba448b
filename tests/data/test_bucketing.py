"""Batches of labelled examples: buckets, order, hosts, the saved place, evaluation."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from lora_jax.data.bucketing import rows_a_batch
from lora_jax.data.examples import EncoderExample
from lora_jax.data.loader import batches, eval_batches
from lora_jax.errors import UserError

PAD = 99
BUCKETS = (4, 8)


def example(index: int, size: int, label: float | None = None) -> EncoderExample:
    """Tokens index, then 1, 2, …; the label says the index again."""
    tokens = np.arange(size, dtype=np.int32)
    tokens[0] = index
    types = (np.arange(size) >= 2).astype(np.int32)
    return {"tokens": tokens, "token_type_ids": types, "label": index if label is None else label}


EXAMPLES = [example(i, 2 + (i * 7) % 15) for i in range(50)]  # 2 to 16 tokens


def make(**options: Any) -> Any:
    defaults: dict[str, Any] = {"batch_size": 4, "length": 16, "buckets": BUCKETS, "seed": 0}
    return batches(EXAMPLES, pad_id=PAD, **(defaults | options))


def check_rows(batch: dict[str, np.ndarray]) -> None:
    """Every row of weight holds its example, padded."""
    for row in np.flatnonzero(batch["weights"]):
        e = EXAMPLES[batch["labels"][row]]
        size = len(e["tokens"])
        assert batch["tokens"][row].tolist() == e["tokens"].tolist() + [PAD] * (
            batch["tokens"].shape[1] - size
        )
        assert (
            batch["attention_mask"][row].sum() == size == batch["attention_mask"][row, :size].sum()
        )
        assert batch["token_type_ids"][row, :size].tolist() == e["token_type_ids"].tolist()
        assert not batch["token_type_ids"][row, size:].any()


def test_each_batch_is_of_one_bucket() -> None:
    lengths = set()
    for batch in itertools.islice(make(), 60):
        assert {k: v.dtype.name for k, v in batch.items()} == {
            "tokens": "int32",
            "attention_mask": "int32",
            "token_type_ids": "int32",
            "labels": "int32",
            "weights": "float32",
        }
        check_rows(batch)
        assert (batch["weights"] == 1).all() and batch["weights"].shape == (4,)
        length = batch["tokens"].shape[1]
        lengths.add(length)
        smaller = max((b for b in BUCKETS if b < length), default=0)
        assert (batch["attention_mask"].sum(1) > smaller).all(), "a shorter bucket would do"
    assert lengths == {4, 8, 16}


def test_every_example_comes_equally_often_and_shuffled() -> None:
    for buckets in ((), BUCKETS):
        taken = itertools.islice(make(buckets=buckets), 50)  # 200 rows: about four epochs
        seen = [int(i) for batch in taken for i in batch["labels"]]
        counts = np.bincount(seen, minlength=50)
        assert counts.min() >= 3 and counts.max() <= 5
        assert seen[:50] != sorted(seen[:50]) and seen[:50] != seen[50:100]
    # Without buckets an epoch is exactly a permutation.
    assert sorted(seen_without_buckets(50)) == list(range(50))


def seen_without_buckets(count: int) -> list[int]:
    iterator = make(buckets=(), batch_size=2)
    return [int(i) for batch in itertools.islice(iterator, count // 2) for i in batch["labels"]]


def test_order_does_not_depend_on_hosts_and_depends_on_the_seed() -> None:
    whole = list(itertools.islice(make(), 20))
    parts = [list(itertools.islice(make(host_index=h, host_count=2), 20)) for h in range(2)]
    for one, first, second in zip(whole, *parts, strict=True):
        for name in one:
            both = np.concatenate([first[name], second[name]])
            np.testing.assert_array_equal(both, one[name])
    other = list(itertools.islice(make(seed=1), 20))
    assert any(
        a["labels"].tolist() != b["labels"].tolist() for a, b in zip(whole, other, strict=True)
    )


def test_resume_with_examples_waiting() -> None:
    iterator = make()
    for _ in range(7):
        next(iterator)
    state = iterator.get_state()
    waiting = json.loads(state)["place"]["waiting"]
    assert any(waiting), "the test needs examples that wait"
    rest = list(itertools.islice(iterator, 30))
    again = make(host_index=1, host_count=2)
    again.set_state(state)
    for one, resumed in zip(rest, again, strict=False):
        np.testing.assert_array_equal(one["tokens"][2:], resumed["tokens"])
    for other in ({"seed": 1}, {"buckets": (4,)}, {"batch_size": 2}, {"length": 20}):
        with pytest.raises(UserError, match="other data or other loader settings"):
            make(**other).set_state(state)
    relabelled = [{**e, "label": 0} for e in EXAMPLES]
    with pytest.raises(UserError, match="other data"):
        batches(relabelled, batch_size=4, length=16, buckets=BUCKETS, seed=0, pad_id=PAD).set_state(
            state
        )


def test_evaluation_has_a_row_for_each_example() -> None:
    for buckets in ((), BUCKETS):
        taken = list(eval_batches(EXAMPLES, batch_size=8, length=16, pad_id=PAD, buckets=buckets))
        rows = np.concatenate([b["rows"] for b in taken])
        labels = np.concatenate([b["labels"] for b in taken])
        weights = np.concatenate([b["weights"] for b in taken])
        real = rows >= 0
        assert sorted(rows[real]) == list(range(50))
        assert (weights == real).all() and (rows[real] == labels[real]).all()
        # At most 8: 50 rows are 7 batches; 10, 13 and 27 of them 2, 2 and 4.
        shapes = {(5, 4), (7, 8), (7, 16)} if buckets else {(8, 16)}
        assert {b["tokens"].shape for b in taken} == shapes
        for batch in taken:
            check_rows(batch)
            filler = batch["weights"] == 0
            # One token is seen: attention to none would be NaN.
            assert (batch["attention_mask"][filler].sum(1) == 1).all()
            assert (batch["tokens"][filler] == PAD).all()


def test_batches_are_filled_up_as_little_as_can_be() -> None:
    assert [rows_a_batch(n, 64) for n in (0, 1, 64, 65, 70, 128, 129)] == [1, 1, 64, 33, 35, 64, 43]


def test_values_are_float_and_secret_labels_only_evaluated() -> None:
    values = [example(i, 3, label=i / 2) for i in range(4)]
    batch = next(batches(values, batch_size=4, length=4, seed=0, pad_id=PAD))
    assert batch["labels"].dtype == np.float32 and sorted(batch["labels"]) == [0, 0.5, 1, 1.5]
    secret = [example(0, 3), example(1, 3, label=-1)]
    (batch,) = eval_batches(secret, batch_size=2, length=4, pad_id=PAD)
    assert batch["labels"].tolist() == [0, -1]
    with pytest.raises(UserError, match="Example 1 has no label"):
        batches(secret, batch_size=2, length=4, seed=0, pad_id=PAD)


def test_too_long() -> None:
    data = [example(0, 4), example(1, 9)]
    common: dict[str, Any] = {"batch_size": 1, "length": 6, "pad_id": PAD}
    with pytest.raises(UserError, match="Example 1 has 9 tokens.*max_length"):
        batches(data, seed=0, **common)
    _, batch = eval_batches(data, too_long="truncate", **common)
    assert batch["tokens"].tolist() == [[1, 1, 2, 3, 4, 8]], "the last token ([SEP]) must stay"
    with pytest.raises(UserError, match="without a prediction"):
        list(eval_batches(data, too_long="drop", **common))
    dropped = batches(data, seed=0, too_long="drop", **common)
    assert {int(next(dropped)["labels"][0]) for _ in range(4)} == {0}
    with pytest.raises(UserError, match="No example"):
        batches(data[1:], seed=0, too_long="drop", **common)


def test_refuses() -> None:
    with pytest.raises(UserError, match="32 is not within 1 to length=16"):
        make(buckets=(8, 32))
    with pytest.raises(UserError, match="packing=True is for language models"):
        make(packing=True)
    text = [{"tokens": np.arange(3, dtype=np.int32), "loss_mask": np.ones(3, np.float32)}]
    with pytest.raises(UserError, match="texts with labels"):
        batches(text, batch_size=1, length=4, buckets=(2,), seed=0, pad_id=PAD)  # type: ignore[arg-type]
