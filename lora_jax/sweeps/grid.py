"""From a config's `sweep_*()` generators to members: resolved experiments with a name each.

A generator yields override dicts such as `{"method.rank": 4, "method.alpha": 8.0}`. Several
generators cross: every combination of one override from each is a member.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax import config as configs
from lora_jax.errors import UserError, nearest
from lora_jax.experiment import Experiment, from_dict, to_dict

Overrides = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      name: short hash of the resolved config: the same config is the same member in any sweep.
      overrides: what the sweep set, by dotted path.
      experiment: the resolved experiment.
    """

    name: str
    overrides: Overrides
    experiment: Experiment


def generators(path: str, wanted: Sequence[str] = ()) -> dict[str, list[Overrides]]:
    """The overrides of each `sweep_*` function in a config file, by its name without `sweep_`.

    Args:
      wanted: names to use; (): all of them.

    Raises UserError where there are none, or none of that name.
    """
    module = configs.load_module(path)
    found = {
        name.removeprefix("sweep_"): list(function())
        for name, function in vars(module).items()
        if name.startswith("sweep_") and callable(function)
    }
    if not found:
        raise UserError(f"{path} has no sweep_*() generator: write one that yields override dicts")
    for name in wanted:
        if name not in found:
            raise UserError(f"{path} has no sweep_{name}(); {nearest(name, found)}")
    chosen = {name: found[name] for name in (wanted or found)}
    for name, overrides in chosen.items():
        if not overrides:
            raise UserError(f"sweep_{name}() in {path} yields nothing")
        if odd := [x for x in overrides if not isinstance(x, Mapping)]:
            raise UserError(
                f"sweep_{name}() in {path} yields {odd[0]!r}: yield dicts like {{'method.rank': 4}}"
            )
    return chosen


def cross(sweeps: Mapping[str, Sequence[Overrides]]) -> list[Overrides]:
    """Every combination of one override dict from each generator, later generators fastest.

    Raises UserError where two generators set the same key.
    """
    keys: dict[str, str] = {}
    for name, overrides in sweeps.items():
        for key in {key for override in overrides for key in override}:
            if keys.setdefault(key, name) != name:
                raise UserError(f"sweep_{keys[key]}() and sweep_{name}() both set {key!r}")
    return [
        {key: value for part in parts for key, value in part.items()}
        for parts in itertools.product(*sweeps.values())
    ]


def sample(overrides: Sequence[Overrides], count: int, seed: int) -> list[Overrides]:
    """Random search: `count` combinations without repeats, in an order that `seed` decides."""
    if count < 1:
        raise UserError(f"random search needs at least 1 member, not {count}")
    shuffled = list(overrides)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


def members(base: Mapping[str, Any], overrides: Iterable[Overrides]) -> list[Member]:
    """The member of each override of an (unexpanded) config; equal ones may occur again."""
    complete = to_dict(from_dict(base))
    found = []
    for override in overrides:
        experiment = from_dict(assign_all(complete, override))
        found.append(Member(member_name(experiment), configs.plain(override), experiment))
    return found


def assign_all(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """An expanded config with some fields replaced, by dotted path."""
    config = dict(config)
    # A kind first: it decides which other fields there are.
    for key in sorted(overrides, key=lambda k: not k.endswith("kind")):
        config = configs.assign(config, key, overrides[key])
    return config


def configured(spec: str, overrides: Mapping[str, Any]) -> Experiment:
    """The experiment of a config file, `path.py:arg`, with some fields replaced."""
    return from_dict(assign_all(to_dict(from_dict(configs.load_file(spec))), overrides))


def unique(members: Iterable[Member]) -> list[Member]:
    """Each member once, in order of first occurrence."""
    found: dict[str, Member] = {}
    for member in members:
        found.setdefault(member.name, member)
    return list(found.values())


def member_name(experiment: Experiment) -> str:
    """The first 12 hex digits of the SHA-256 of the resolved config."""
    text = json.dumps(to_dict(experiment), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
