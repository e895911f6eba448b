"""Which members share a program, and the searches, on shapes and numbers alone."""

import dataclasses
import itertools
import json
import sys

import jax
import numpy as np
import pytest

from lora_jax.errors import UserError
from lora_jax.sweeps import grid, padding, planner, search
from lora_jax.sweeps.prepare import fastest, slot_counts


def tree(rank):
    return {"w": {"a": jax.ShapeDtypeStruct((100, rank), np.float32)}}


def plan(config, ranks, **options):
    members = grid.members(config, [{"method.rank": r} for r in ranks])
    return planner.plan(members, lambda m: tree(m.experiment.method.rank), **options)


def test_padding_is_weighed_against_compiling(tiny_config):
    ranks = (1, 2, 4, 128, 256)
    slow = plan(tiny_config(), ranks, flops_per_second=1e3, compile_seconds=1.0)
    fast = plan(tiny_config(), ranks, flops_per_second=1e15, compile_seconds=1.0)
    assert len(slow) == 5 and len(fast) == 1
    # 4 steps of 64 tokens and 6 FLOPs a parameter: 1.536 s for a padded column of 100 at 1e5.
    some = plan(tiny_config(), ranks, flops_per_second=1e5, compile_seconds=20.0)
    assert [[m.experiment.method.rank for m in p.members] for p in some] == [
        [1, 2, 4],
        [128],
        [256],
    ]
    assert some[0].params == 400 and some[0].padding == pytest.approx(1 - 7 / 12)


def test_members_that_share_batches_come_one_after_another(tiny_config):
    places = [{"method.rank": r, "data.seed": s} for r in (2, 1) for s in (7, 0)]
    members = grid.members(tiny_config(), places)
    (pack,) = planner.plan(members, lambda m: tree(m.experiment.method.rank), flops_per_second=1e15)
    found = [(m.experiment.data.seed, m.experiment.method.rank) for m in pack.members]
    assert found == [(0, 1), (0, 2), (7, 1), (7, 2)]


@pytest.mark.parametrize("ranks", [[1, 3, 4, 9, 10, 11], [1, 1, 1, 4, 9, 9]])
def test_the_cheapest_cut_is_found(tiny_config, ranks):
    """Against every way to cut a sorted list."""
    seconds, compiling = 1536 / 1e5, 5.0

    def cost(cuts):
        edges = [0, *cuts, len(ranks)]
        runs = [ranks[i:j] for i, j in itertools.pairwise(edges)]
        return sum(compiling + seconds * 100 * max(r) * len(r) for r in runs)

    subsets = [[i + 1 for i in range(5) if mask >> i & 1] for mask in range(32)]
    best = min(subsets, key=cost)
    found = plan(tiny_config(), ranks, flops_per_second=1e5, compile_seconds=compiling)
    assert [[m.experiment.method.rank for m in p.members] for p in found] == [
        list(x) for x in np.split(ranks, best)
    ]


@pytest.mark.parametrize(
    ("override", "together"),
    [
        ({"optimizer.learning_rate": 1.0}, True),
        ({"seed": 7}, True),
        ({"data.seed": 7}, True),
        ({"method.targets": "mlp"}, True),
        ({"method.dropout": 0.5}, True),
        ({"optimizer.clip_norm": 1.0}, False),  # None or not is structure
        ({"optimizer.name": "sgd"}, False),
        ({"training.steps": 9}, False),
        ({"data.batch_size": 4}, False),
        ({"method.train": ("norm/scale$",)}, False),
    ],
)
def test_members_that_differ_in_numbers_share_a_program(tiny_config, override, together):
    members = grid.members(tiny_config(), [{}, override])
    plans = planner.plan(members, lambda m: tree(2), flops_per_second=1e15)
    assert (len(plans) == 1) == together


def test_inexact_methods_are_grouped_by_shape(tiny_config, monkeypatch):
    from lora_jax.methods import LoRA

    monkeypatch.setattr(LoRA, "padding_exact", False)
    plans = plan(tiny_config(), (2, 3, 2), flops_per_second=1e15)
    assert sorted(len(p.members) for p in plans) == [1, 2]
    assert all(p.padding == 0 for p in plans)


def test_slots_are_spread_evenly_over_rounds():
    def slots(count, limit, axis=1):
        return planner.fewer_slots(10, count, fixed=100, need=1100, limit=limit, axis=axis)

    assert slots(10, 900) == 5  # eight fit: two rounds of five
    assert slots(10, 1100) == 10
    assert slots(10, 900, axis=4) == 8
    assert slots(3, 120) == 1


def test_a_hull_holds_every_tree_and_padding_comes_off_again():
    one = {"x": {"a": np.ones((2, 3), np.float32)}, "y": {"a": np.ones((1, 1), np.float32)}}
    two = {"x": {"a": np.full((4, 1), 2.0, np.float32)}}
    hull = padding.hull([one, two])
    assert hull["x"]["a"].shape == (4, 3) and set(hull) == {"x", "y"}
    padded = padding.pad(two, hull)
    assert float(np.sum(padded["x"]["a"])) == 8.0 and float(np.sum(padded["y"]["a"])) == 0.0
    np.testing.assert_array_equal(padding.cut(padded, two)["x"]["a"], two["x"]["a"])
    with pytest.raises(UserError, match="cannot share"):
        padding.hull([{"x": np.ones(2)}, {"x": np.ones((2, 2))}])


def test_grids_cross_and_refuse_the_same_key_twice():
    combos = grid.cross({"a": [{"x": 1}, {"x": 2}], "b": [{"y": 3}, {"y": 4}]})
    assert combos == [{"x": 1, "y": 3}, {"x": 1, "y": 4}, {"x": 2, "y": 3}, {"x": 2, "y": 4}]
    with pytest.raises(UserError, match="both set 'x'"):
        grid.cross({"a": [{"x": 1}], "b": [{"x": 2}]})
    assert len(grid.sample(combos, 3, seed=1)) == 3
    assert grid.sample(combos, 3, seed=1) == grid.sample(combos, 3, seed=1)


def test_equal_members_are_one_and_numbers_may_be_numpys(tiny_config):
    ranks = np.array([4, 2, 4])
    found = grid.unique(grid.members(tiny_config(), [{"method.rank": r} for r in ranks]))
    assert [m.experiment.method.rank for m in found] == [4, 2]
    assert found[0].name == grid.members(tiny_config(), [{"method.rank": 4}])[0].name
    rates = grid.members(tiny_config(), [{"optimizer.learning_rate": np.float32(0.5), "seed": r}
                                         for r in ranks[:1]])  # fmt: skip
    assert (rates[0].experiment.optimizer.learning_rate, rates[0].experiment.seed) == (0.5, 4)
    json.dumps([m.overrides for m in (*found, *rates)])  # as a sweep's table does


def test_generators_are_checked_where_they_are_used(tmp_path):
    file = tmp_path / "grid.py"
    file.write_text(
        "def sweep_rank():\n    yield {'method.rank': 1}\n"
        "def sweep_none():\n    return []\n"
        "def sweep_odd():\n    yield 'method.rank', 1\n"
    )
    assert grid.generators(str(file), ["rank"]) == {"rank": [{"method.rank": 1}]}
    with pytest.raises(UserError, match=r"sweep_none\(\).* yields nothing"):
        grid.generators(str(file))
    with pytest.raises(UserError, match="yield dicts"):
        grid.generators(str(file), ["odd"])


@pytest.mark.parametrize("higher", [True, False])
def test_halving_puts_what_is_not_a_number_last(tiny_config, higher):
    members = grid.members(tiny_config(), [{"seed": i} for i in range(4)])
    values = [float("nan"), 1.0, float("nan"), 2.0]
    halving = search.Halving(1, 2, higher_is_better=higher)
    reasons = halving([(m, 1, v) for m, v in zip(members, values, strict=True)])
    assert [r is None for r in reasons] == [False, True, False, True]


def test_halving_of_equals_keeps_as_many(tiny_config):
    """Early on many answer alike: the first to come go on, and no more than 1/eta."""
    members = grid.members(tiny_config(), [{"seed": i} for i in range(8)])
    for values, kept in (([0.5] * 8, {0, 1, 2, 3}), ([0.4] * 2 + [0.5] * 6, {2, 3, 4, 5})):
        halving = search.Halving(1, 2, higher_is_better=True)
        reasons = halving([(m, 1, v) for m, v in zip(members, values, strict=True)])
        assert {i for i, r in enumerate(reasons) if r is None} == kept


def test_optuna_that_is_missing_is_said_first(monkeypatch):
    from lora_jax.sweeps.sweep import Options

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="pip install optuna"):
        Options(optuna=3)


def test_optuna_takes_no_value_of_fewer_updates():
    """A member that halving ended, or that diverged, is no trial with a value."""
    metrics = {"metrics": {"accuracy": 0.9}}
    assert search.reached({**metrics, "status": "finished"}, "accuracy") == 0.9
    assert search.reached({**metrics, "status": "stopped at 4 updates"}, "accuracy") is None


def test_no_slots_are_none(tmp_path):
    from lora_jax.sweeps.sweep import Options

    for count in (0, -1):
        with pytest.raises(UserError, match=f"--slots is {count}"):
            Options(slots=count)


def test_halving_keeps_the_best_of_each_rung(tiny_config, tmp_path):
    config = tiny_config(training={"steps": 9, "eval_every": 1})
    members = grid.members(config, [{"seed": i} for i in range(6)])
    halving = search.Halving(1, 3, higher_is_better=False)
    halving.check(members)
    values = [5.0, 1.0, 4.0, 2.0, 6.0, 3.0]
    reasons = halving([(m, 1, v) for m, v in zip(members, values, strict=True)])
    assert [r is None for r in reasons] == [False, True, False, True, False, False]
    assert "5 of 6" in reasons[0]
    assert halving([(members[1], 2, 0.0)]) == [None]  # no rung
    assert halving([(members[1], 3, 1.0), (members[3], 3, 0.5)])[0] is not None
    assert [s for s in range(1, 30) if halving.is_rung(s)] == [1, 3, 9, 27]
    # Taken up again from what the workdirs say.
    folder = tmp_path / members[0].name
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "eval/m": 0.25}) + "\n")
    again = search.Halving(1, 3, higher_is_better=False)
    again.recall(members, tmp_path, "m")
    assert again.seen == {3: {members[0].name: 0.25}}
    # Killed at a rung before its verdict: the member is judged when it comes back.
    assert again.recalled(members[0], 3) is None and again.recalled(members[1], 3) is None
    again.seen[3][members[1].name] = 0.1
    reason, value = again.recalled(members[0], 3)
    assert "2 of 2" in reason and value == 0.25
    with pytest.raises(UserError, match="eval_every"):
        search.Halving(2, 3, higher_is_better=False).check(
            grid.members(tiny_config(training={"steps": 9, "eval_every": 3}), [{}])
        )
    with pytest.raises(UserError, match="comes too late"):
        search.Halving(9, 3, higher_is_better=False).check(members)


@dataclasses.dataclass
class Timed:
    """A program of so many slots, whose step takes so many seconds."""

    slots: int
    seconds: float
    programs: int = 1

    @property
    def shape(self):
        return self

    def seconds_a_step(self):
        return self.seconds


def test_a_pack_has_as_many_slots_as_are_fastest():
    assert list(slot_counts(18, 18, 1)) == [6, 2, 1]
    assert list(slot_counts(16, 16, 1)) == [4, 1]  # not 5: the last round would have one member
    assert list(slot_counts(16, 16, 4)) == [4] and list(slot_counts(3, 4, 4)) == []
    programs = [Timed(18, 9.0), Timed(6, 2.0), Timed(2, 0.8), Timed(1, 0.1)]
    best, seconds, probed = fastest(iter(programs), 18)
    # 3 rounds of 6 take 6 s, 9 rounds of 2 take 7.2 s: no smaller one is tried.
    assert (best.slots, seconds, probed) == (6, 6.0, 2)
    best, seconds, probed = fastest(iter([Timed(18, 1.0), Timed(6, 0.5)]), 18)
    assert (best.slots, seconds, probed) == (18, 1.0, 1)
