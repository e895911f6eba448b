"""Modules that transformers holds fused and we hold apart, such as GPT-2's c_attn.

The k-th part of a module is called `module#k` in a model's names. A fused low-rank update splits
exactly: the parts share A, and each has its rows of B. Parts join exactly too, in a block form
whose rank is the sum of theirs. So do AdaLoRA's updates split, and IA3's gains split and join.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from lora_jax.methods.peft.protocol import PREFIX, ModelNames, NoPeftForm

_PART = re.compile(r"(.+)#(\d+)")
_TENSOR = re.compile(
    r"(.+?)((?:\.base_layer)?\.(?:weight|bias)|\.lora_[AB](?:\.weight)?|\.lora_E|\.ia3_l)"
)

# Which of these the parts have in common, and which have a row an output; else that is a column.
_SHARED = (".lora_A.weight", ".lora_A", ".lora_E")
_ROWS = (".lora_B.weight", ".lora_B", ".ia3_l")


def part_name(module: str, k: int) -> str:
    """What the k-th part of a fused module is called in a model's names."""
    return f"{module}#{k}"


def plain(module: str) -> str:
    """The module as transformers names it."""
    match = _PART.fullmatch(module)
    return match[1] if match else module


def parts(modules: Iterable[str]) -> dict[str, list[str]]:
    """Fused module -> its parts, in order."""
    found: dict[str, list[str]] = {}
    for module in modules:
        if (whole := plain(module)) != module:
            found.setdefault(whole, []).append(module)
    return {m: sorted(x, key=lambda p: int(p.rpartition("#")[2])) for m, x in found.items()}


def split(tensors: Mapping[str, np.ndarray], names: ModelNames) -> dict[str, np.ndarray]:
    """An adapter's tensors with those of fused modules given to the parts."""
    fused, found = parts(names.modules), {}
    for key, value in tensors.items():
        match = _TENSOR.fullmatch(key.removeprefix(PREFIX))
        if not match or match[1] not in fused:
            found[key] = value
            continue
        module, last = match.groups()
        n = len(fused[module])
        if last in _SHARED or (last == ".ia3_l" and value.shape[0] == 1):  # a gain of inputs
            shares = [value] * n
        elif value.ndim and value.shape[axis := 0 if last in _ROWS else -1] % n == 0:
            shares = np.split(value, n, axis)
        else:
            found[key] = value  # it fits nothing, and is then named as it is
            continue
        found |= {f"{PREFIX}{p}{last}": x for p, x in zip(fused[module], shares, strict=True)}
    return found


def join_whole(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of modules saved whole, with the parts of fused ones put together."""
    found: dict[str, np.ndarray] = {}
    groups: dict[str, dict[int, np.ndarray]] = {}
    for key, value in tensors.items():
        number = re.search(r"#(\d+)", key)
        if number is None:
            found[key] = value
        else:
            groups.setdefault(key.replace(number[0], ""), {})[int(number[1])] = value
    for name, members in groups.items():
        found[name] = np.concatenate([members[k] for k in sorted(members)], -1)
    return found


def join_gains(
    tensors: Mapping[str, np.ndarray], names: ModelNames, gain: str
) -> dict[str, np.ndarray]:
    """Gains of outputs [out, 1] with those of fused modules put together: 1 where a part has none.

    Raises NoPeftForm for a gain of inputs, which not all parts may have in common.
    """
    found = dict(tensors)
    for module, members in parts(names.modules).items():
        keys = [f"{PREFIX}{p}.{gain}" for p in members]
        there = [found.pop(k, None) for k in keys]
        if all(x is None for x in there):
            continue
        rows = [
            np.ones((names.sizes[p][1], 1), np.float32) if x is None else x
            for p, x in zip(members, there, strict=True)
        ]
        if any(len(x) != names.sizes[p][1] for p, x in zip(members, rows, strict=True)):
            raise NoPeftForm(f"{module} is one module in PEFT, several here")
        found[f"{PREFIX}{module}.{gain}"] = np.concatenate(rows)
    return found


def join_factors(
    factors: Mapping[str, tuple[np.ndarray, np.ndarray, float]], names: ModelNames
) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """module -> (A [in, r], B [r, out], scale), with the parts of fused modules put together.

    Parts that share A and scale stay at their rank. Else A and B become blocks, and a part
    without factors has zeros; where scales differ they go into B.
    """
    found = {m: f for m, f in factors.items() if plain(m) == m}
    for module, members in parts(names.modules).items():
        there = {p: factors[p] for p in members if p in factors}
        if not there:
            continue
        a, _, scale = next(iter(there.values()))
        alike = all(s == scale for _, _, s in there.values())
        shared = len(there) == len(members) and alike
        if shared and all(np.array_equal(x, a) for x, _, _ in there.values()):
            found[module] = (a, np.concatenate([b for _, b, _ in there.values()], 1), scale)
            continue
        widths = [names.sizes[p][1] for p in members]
        joined = np.zeros((sum(x.shape[1] for x, _, _ in there.values()), sum(widths)), np.float32)
        row = column = 0
        for member, width in zip(members, widths, strict=True):
            if member in there:
                _, b, s = there[member]
                block = b if alike else b * np.float32(s)
                joined[row : row + len(b), column : column + width] = block
                row += len(b)
            column += width
        blocks = np.concatenate([x for x, _, _ in there.values()], 1)
        found[module] = (blocks, joined, scale if alike else 1.0)
    return found


def unjoin_factors(
    factors: Mapping[str, Mapping[str, np.ndarray]], ranks: Mapping[str, int], names: ModelNames
) -> dict[str, dict[str, np.ndarray]] | None:
    """Takes the blocks of `join_factors` apart again, where that is what they are.

    Args:
      factors: module or part -> {"A": (r, in), "B": (out, r)}, where parts share A.
      ranks: module or part -> the rank it had; parts without factors are left out.
    """
    found = {m: dict(f) for m, f in factors.items() if plain(m) == m}
    for members in parts(names.modules).values():
        if members[0] not in factors:
            continue
        joint = len(factors[members[0]]["A"])
        wanted = [ranks.get(p, 0) for p in members]
        row = 0
        for member, rank in zip(members, wanted, strict=True):
            a, b = factors[member]["A"], factors[member]["B"]
            if all(r == joint for r in wanted):
                found[member] = {"A": a, "B": b}
            elif sum(wanted) != joint:
                return None
            elif rank:
                rows = slice(row, row + rank)
                found[member] = {"A": a[rows], "B": b[:, rows]}
                row += rank
    return found
