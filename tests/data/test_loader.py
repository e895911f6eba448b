"""Padding, packing, order, hosts, and the saved place."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from lora_jax.data import packing
from lora_jax.data.loader import batches, eval_batches
from lora_jax.data.tasks import Example
from lora_jax.errors import UserError

PAD = 99


def example(start: int, size: int, prompt: int = 1) -> Example:
    mask = np.ones(size, np.float32)
    mask[:prompt] = 0
    return {"tokens": np.arange(start, start + size, dtype=np.int32), "loss_mask": mask}


# Example i holds the tokens 1000 + 10 i, 1000 + 10 i + 1, …: each can be told by its first token.
EXAMPLES = [example(1000 + 10 * i, 3 + i % 5, prompt=1 + i % 2) for i in range(24)]


def make(**options: Any) -> Any:
    defaults: dict[str, Any] = {"batch_size": 4, "length": 16, "packing": True, "seed": 0}
    return batches(EXAMPLES, pad_id=PAD, **(defaults | options))


def segments(batch: packing.Batch) -> list[list[int]]:
    rows = zip(batch["tokens"], batch["segment_ids"], strict=True)
    return [list(t[s == i]) for t, s in rows for i in range(1, s.max() + 1)]


def firsts(iterator: Any, count: int) -> list[int]:
    """Which examples come, in order."""
    found = (s[0] for batch in iterator for s in segments(batch))
    return [(t - 1000) // 10 for t in itertools.islice(found, count)]


@pytest.mark.parametrize("pack", [False, True])
def test_every_example_whole_once_an_epoch(pack: bool) -> None:
    iterator = make(packing=pack, length=8)
    found = [s for b in itertools.islice(iterator, 40) for s in segments(b)]
    originals = {e["tokens"][0]: list(e["tokens"]) for e in EXAMPLES}
    assert all(originals[s[0]] == s for s in found)
    if not pack:  # packing mixes the order within its open rows, across the end of an epoch too
        order = [s[0] for s in found]
        assert sorted(order[:24]) == sorted(originals) == sorted(order[24:48])
        assert order[:24] != order[24:48], "the epochs have one order"
        assert order[:24] != list(originals), "not shuffled"


def test_layout_of_a_packed_batch() -> None:
    batch = next(b for b in make() if not b["segment_ids"].all())
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "tokens": ((4, 16), "int32"),
        "loss_mask": ((4, 16), "float32"),
        "positions": ((4, 16), "int32"),
        "segment_ids": ((4, 16), "int32"),
    }
    assert batch["segment_ids"].max() > 1, "nothing was packed"
    real = batch["segment_ids"] > 0
    assert (batch["tokens"][~real] == PAD).all() and not batch["loss_mask"][~real].any()
    # Tokens of an example count up, so positions must be the token less its example's start.
    assert (batch["positions"][real] == batch["tokens"][real] % 10).all()


def test_packing_wastes_less() -> None:
    def share(pack: bool) -> float:
        taken = itertools.islice(make(packing=pack), 6)
        return float(np.mean([(b["segment_ids"] > 0).mean() for b in taken]))

    assert share(True) > 0.85 > 0.5 > share(False)


def test_loss_on_completion_or_all() -> None:
    data = [example(1000, 6, prompt=4)] * 4
    for loss, expected in (("completion", [0, 0, 0, 0, 1, 1]), ("all", [0, 1, 1, 1, 1, 1])):
        for pack in (False, True):
            batch = next(
                batches(data, batch_size=1, length=6, packing=pack, loss=loss, seed=0, pad_id=PAD)
            )
            assert batch["loss_mask"].tolist() == [expected]
    with pytest.raises(UserError, match="loss='some'"):
        make(loss="some")


def test_too_long() -> None:
    data = [example(1000, 4), example(1010, 9), example(1020, 9, prompt=8)]
    with pytest.raises(UserError, match="Example 1 has 9 tokens.*length=6"):
        packing.prepare(data, length=6)
    cut = packing.prepare(data, length=6, too_long="truncate")
    # The third has no target within 6 tokens.
    assert [list(e["tokens"]) for e in cut] == [list(range(1000, 1004)), list(range(1010, 1016))]
    dropped = packing.prepare(data, length=6, too_long="drop")
    assert [list(e["tokens"]) for e in dropped] == [list(range(1000, 1004))]
    with pytest.raises(UserError, match="No example"):
        packing.prepare(data[1:], length=6, too_long="drop")
    with pytest.raises(UserError, match="too_long='cut'"):
        packing.prepare(data, length=6, too_long="cut")  # type: ignore[arg-type]


@pytest.mark.parametrize("pack", [False, True])
def test_order_does_not_depend_on_hosts(pack: bool) -> None:
    whole = list(itertools.islice(make(packing=pack), 8))
    parts = [
        list(itertools.islice(make(packing=pack, host_index=h, host_count=2), 8)) for h in range(2)
    ]
    for one, first, second in zip(whole, *parts, strict=True):
        assert first["tokens"].shape == (2, 16)
        for name in one:
            both = np.concatenate([first[name], second[name]])
            np.testing.assert_array_equal(both, one[name])


def test_seed_decides_the_order() -> None:
    assert firsts(make(seed=3), 30) == firsts(make(seed=3), 30) != firsts(make(seed=4), 30)


@pytest.mark.parametrize("pack", [False, True])
def test_resume_from_a_json_string(pack: bool) -> None:
    iterator = make(packing=pack)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    assert isinstance(state, str) and json.loads(state)
    rest = list(itertools.islice(iterator, 9))  # over the end of an epoch
    again = make(packing=pack)
    again.set_state(state)
    for one, resumed in zip(rest, again, strict=False):
        for name in one:
            np.testing.assert_array_equal(one[name], resumed[name])
    # The state is the same on every host, and refused by other settings.
    half = make(packing=pack, host_index=1, host_count=2)
    half.set_state(state)
    np.testing.assert_array_equal(next(half)["tokens"], rest[0]["tokens"][2:])
    for other in ({"seed": 1}, {"batch_size": 2}, {"loss": "all"}, {"packing": not pack}):
        with pytest.raises(UserError, match="other data or other loader settings"):
            make(**{"packing": pack, **other}).set_state(state)


def test_hosts_must_divide_the_batch() -> None:
    with pytest.raises(UserError, match="batch_size=4 .* host_count=3"):
        make(host_count=3)


def test_eval_batches_pass_once_in_order() -> None:
    taken = list(eval_batches(EXAMPLES[:6], batch_size=4, length=8, pad_id=PAD))
    assert [b["tokens"].shape for b in taken] == [(4, 8), (4, 8)]
    assert firsts(taken, 99) == list(range(6))
    assert not taken[1]["segment_ids"][2:].any() and not taken[1]["loss_mask"][2:].any()
    assert (taken[1]["tokens"][2:] == PAD).all()
