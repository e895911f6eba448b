"""Batches of images: every example once an epoch, resumed, the same rows for any hosts."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax.data import loader
from lora_jax.data.tasks import TASKS, ImageExample
from lora_jax.errors import UserError

N = 7
EXAMPLES: list[ImageExample] = [
    {"image": np.full((2, 2, 1), 10 * i, np.uint8), "label": i} for i in range(N)
]


def batches(**options):
    given = {"batch_size": 4, "length": 1, "seed": 3, "pad_id": 0, **options}
    return loader.batches(EXAMPLES, **given)


def test_every_example_once_an_epoch_with_its_label():
    stream = batches()
    found = [next(stream) for _ in range(N)]  # four epochs: 28 rows
    labels = np.concatenate([b["labels"] for b in found])
    epochs = labels.reshape(4, N)
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    for batch in found:
        assert batch["images"].shape == (4, 2, 2, 1) and batch["images"].dtype == np.float32
        np.testing.assert_allclose(batch["images"][:, 0, 0, 0] * 255, 10.0 * batch["labels"])
        np.testing.assert_array_equal(batch["weights"], 1.0)


def test_it_goes_on_where_it_was_and_knows_its_data():
    stream = batches()
    for _ in range(3):
        next(stream)
    place, after = stream.get_state(), next(stream)
    again = batches()
    again.set_state(place)
    np.testing.assert_array_equal(next(again)["labels"], after["labels"])
    with pytest.raises(UserError, match="other data"):
        batches(seed=4).set_state(place)
    other = loader.batches(EXAMPLES[:-1], batch_size=4, length=1, seed=3, pad_id=0)
    assert other.fingerprint != stream.fingerprint


def test_hosts_share_the_rows_of_one_batch():
    whole, parts = batches(), [batches(host_index=i, host_count=2) for i in range(2)]
    for _ in range(4):
        got = np.concatenate([next(p)["labels"] for p in parts])
        np.testing.assert_array_equal(got, next(whole)["labels"])


def test_evaluation_is_in_order_and_filled_up():
    found = list(loader.eval_batches(EXAMPLES, batch_size=4, length=1, pad_id=0))
    assert [b["rows"].tolist() for b in found] == [[0, 1, 2, 3], [4, 5, 6, -1]]
    assert found[1]["weights"].tolist() == [1, 1, 1, 0] and not found[1]["images"][3].any()
    assert found[1]["labels"].tolist() == [4, 5, 6, 0]


def test_refuses():
    odd = [*EXAMPLES, {"image": np.zeros((3, 2, 1), np.uint8), "label": 0}]
    with pytest.raises(UserError, match="several sizes"):
        loader.batches(odd, batch_size=2, length=1, seed=0, pad_id=0)
    unlabelled = [{**EXAMPLES[0], "label": -1}]
    with pytest.raises(UserError, match="no label"):
        loader.batches(unlabelled, batch_size=1, length=1, seed=0, pad_id=0)
    with pytest.raises(UserError, match="buckets"):
        batches(buckets=(1,))


def test_the_task_reads_records_and_scores():
    task = TASKS["image_classification"](num_labels=3)
    records = [{"image": np.arange(4, dtype=np.uint8).reshape(2, 2, 1), "label": i % 3}
               for i in range(3)]  # fmt: skip
    examples = task.examples(records)
    assert [e["label"] for e in examples] == [0, 1, 2] and examples[0]["image"].shape == (2, 2, 1)
    logits = np.eye(3)[[0, 1, 1]]
    assert task.metrics(logits, task.evaluation_records(records)) == {"accuracy": 2 / 3}
    with pytest.raises(UserError, match="2 predictions for 3 records"):
        task.metrics(logits[:2], records)
    with pytest.raises(UserError, match="is no image"):
        task.examples([{"image": "cat.png", "label": 0}])
    with pytest.raises(UserError, match="none of the 3 classes"):
        task.examples([{**records[0], "label": 3}])
    with pytest.raises(UserError, match="two classes"):
        TASKS["image_classification"](num_labels=1)


def test_shuffled_pixels_are_one_permutation_for_all():
    rng = np.random.default_rng(0)
    records = [{"image": rng.integers(0, 256, (3, 3, 2), np.uint8), "label": 0} for _ in range(3)]
    task = TASKS["image_classification"]
    plain, shuffled = (task(shuffle_pixels=s).examples(records) for s in (None, 5))
    # Where the pixels of the first image went, those of all went.
    first = plain[0]["image"].reshape(9, 2)
    after = shuffled[0]["image"].reshape(9, 2)
    moved = [int(np.flatnonzero((first == pixel).all(1))[0]) for pixel in after]
    assert sorted(moved) == list(range(9)) and moved != list(range(9))
    for before, after in zip(plain, shuffled, strict=True):
        old, new = (x["image"].reshape(9, 2) for x in (before, after))
        np.testing.assert_array_equal(new, old[moved])
