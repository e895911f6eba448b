"""Layer and module of a matrix, from its name: ours, PEFT's or another model's."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERED = re.compile(r"(?:(.*)_)?(\d+)")


def located(names: Sequence[str]) -> list[tuple[int | None, str]]:
    """(layer, module) of each name: `layers/3/attention/query` is (3, "attention/query").

    The layer is the first part of a name that is a number, or ends in one (`h_3/attn`). What
    stands before it is left out where it is the same in all names that have layers.
    """
    found = [_take_apart(name) for name in names]
    stems = {stem for stem, layer, _ in found if layer is not None}
    if len(stems) < 2:
        return [(layer, rest or stem) for stem, layer, rest in found]
    return [
        (layer, rest if layer is None else "/".join(x for x in (stem, rest) if x))
        for stem, layer, rest in found
    ]


def _take_apart(name: str) -> tuple[str, int | None, str]:
    """(what stands before the layer's number, the number, what stands behind it)."""
    parts = re.split(r"[/.]", name)
    separator = "/" if "/" in name else "."
    for at, part in enumerate(parts):
        if match := _NUMBERED.fullmatch(part):
            stem = separator.join([*parts[:at], *([match[1]] if match[1] else [])])
            return stem, int(match[2]), separator.join(parts[at + 1 :])
    return "", None, name
