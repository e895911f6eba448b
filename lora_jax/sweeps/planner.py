"""Which members share a program: groups of one structure, cut into packs by padded work.

Members of a group may differ in numbers only. Within it they are sorted by size and cut where the
time that padding would waste exceeds that of compiling another program: the cheapest cut of a
sorted list, by dynamic programming.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import partition
from lora_jax.experiment import to_dict
from lora_jax.sweeps import padding
from lora_jax.sweeps.grid import Member
from lora_jax.training.optimizer import OptimizerConfig

Tree = Mapping[str, Any]
COMPILE_SECONDS = 15.0
"""What another program is taken to cost before anything was compiled."""
FLOPS_A_PARAMETER = 6
"""A token's work for one parameter of a factor: two forward, four backward."""


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Members that share a program.

    Attributes:
      members: by the seed of their data, then by size. Where fewer slots than members are, those
        in them at one time then share batches, and none is padded to the length of another's.
      params: trainable parameters of the hull, which every slot carries.
      padding: share of these that is padding, over the members.
    """

    members: tuple[Member, ...]
    params: int
    padding: float


def structure(member: Member, method: Any, shapes: Tree) -> str:
    """What must be equal in a pack, as text: the config without the numbers that may differ.

    A method or optimizer under which padding is not exact adds the shapes of the trainable tree:
    its members are grouped by shape, and none is padded.
    """
    config = to_dict(member.experiment)
    config["seed"] = config["data"]["seed"] = None
    config["training"]["dropout_seed"] = config["training"]["start_from"] = None
    for name in type(method).numeric:
        config["method"][name] = None
    for name in OptimizerConfig.numeric:
        # Present or absent is structure: a norm to clip at or none.
        config["optimizer"][name] = config["optimizer"][name] is not None
    exact = type(method).padding_exact and member.experiment.optimizer.padding_exact
    if not exact:
        config["shapes"] = {n: list(x.shape) for n, x in partition.flatten(dict(shapes)).items()}
    return json.dumps(config, sort_keys=True)


def size(shapes: Tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))


def plan(
    members: Sequence[Member],
    shapes: Callable[[Member], Tree],
    *,
    flops_per_second: float,
    compile_seconds: float = COMPILE_SECONDS,
) -> list[PackPlan]:
    """The packs that cost least time in padding and compilation.

    Args:
      shapes: of a member's trainable tree, as ShapeDtypeStructs.
      flops_per_second: what the device does on matrix products.
      compile_seconds: of one more program.
    """
    groups: dict[str, list[tuple[Member, Tree]]] = {}
    for member in members:
        tree = shapes(member)
        key = structure(member, member.experiment.method, tree)
        groups.setdefault(key, []).append((member, tree))
    packs = []
    for group in groups.values():
        alike = _alike(group)
        e = group[0][0].experiment
        tokens = e.training.steps * e.data.batch_size * e.data.length
        seconds = FLOPS_A_PARAMETER * tokens / flops_per_second
        hulls, counts = _hull_sizes([x.tree for x in alike]), [len(x.members) for x in alike]
        for start, stop in _cuts(hulls, counts, seconds, compile_seconds):
            params = hulls[start][stop - 1 - start]
            real = sum(size(x.tree) * len(x.members) for x in alike[start:stop])
            chosen = [member for x in alike[start:stop] for member in x.members]
            chosen.sort(key=lambda member: member.experiment.data.seed)
            packs.append(PackPlan(tuple(chosen), params, 1 - real / max(1, params * len(chosen))))
    return packs


@dataclasses.dataclass
class _Alike:
    """Members of one shape: no cut is ever between them."""

    tree: Tree
    members: list[Member]


def _alike(group: Sequence[tuple[Member, Tree]]) -> list[_Alike]:
    """Sorted by size: a sweep has many members and few shapes."""
    found: dict[Any, _Alike] = {}
    for member, tree in group:
        flat = partition.flatten(dict(tree))
        key = tuple(sorted((name, tuple(x.shape)) for name, x in flat.items()))
        found.setdefault(key, _Alike(tree, [])).members.append(member)
    return sorted(found.values(), key=lambda x: size(x.tree))


def _hull_sizes(trees: Sequence[Tree]) -> list[list[int]]:
    """sizes[i][k]: parameters of the hull of trees i to i + k."""
    table = []
    for start in range(len(trees)):
        hull, row = trees[start], []
        for tree in trees[start:]:
            hull = padding.hull([hull, tree])
            row.append(size(hull))
        table.append(row)
    return table


def _cuts(
    hulls: Sequence[Sequence[int]], counts: Sequence[int], seconds: float, compile_seconds: float
) -> list[tuple[int, int]]:
    """The ranges of the cheapest partition into runs of a sorted list, `counts` members each."""
    n = len(hulls)
    before = np.concatenate([[0], np.cumsum(counts)])
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, n + 1):
        best.append(
            min(
                (
                    best[i][0] + compile_seconds
                    + seconds * hulls[i][stop - 1 - i] * int(before[stop] - before[i]),
                    i,
                )
                for i in range(stop)
            )
        )  # fmt: skip
    ranges, stop = [], n
    while stop:
        start = best[stop][1]
        ranges.append((start, stop))
        stop = start
    return ranges[::-1]


def fewer_slots(slots: int, count: int, *, fixed: int, need: int, limit: int, axis: int) -> int:
    """Slots for `count` members if a program of `slots` needs `need` bytes and `limit` are there.

    `fixed` of these bytes are shared by all slots. The members are spread evenly over the rounds
    that it takes: 10 members where 8 fit are two rounds of 5. A multiple of `axis`, at least one.
    """
    each = max(1, (need - fixed) // slots)
    most = max(1, (limit - fixed) // each)
    rounds = -(-count // most)
    even = -(-count // rounds)
    most = max(axis, most // axis * axis)
    return min(most, -(-even // axis) * axis)
