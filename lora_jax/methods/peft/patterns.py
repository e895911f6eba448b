"""Few regexes, and (regex, value) rules, that say the same as a set of our paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax import partition


def regexes(paths: Iterable[str], every: Iterable[str]) -> list[str]:
    """Few regexes that match exactly `paths` among the expanded leaf or module paths `every`.

    `layers/0/attention/query`, … in all layers become `^layers/\\d+/attention/query$`; in some
    layers `^layers/(0|2)/…`. Names that share all but their last part become one `(query|value)`.
    """
    chosen, complete = _layers_by_template(paths), _layers_by_template(every)
    grouped: dict[tuple[str, str], list[str]] = {}
    for template, layers in chosen.items():
        if layers == complete.get(template):
            numbers = r"\d+"
        else:
            numbers = "|".join(map(str, sorted(layers)))
            numbers = f"({numbers})" if len(layers) > 1 else numbers
        parent, _, last = template.rpartition("/")
        grouped.setdefault((parent, numbers), []).append(last)
    found = []
    for (parent, numbers), lasts in grouped.items():
        names = [re.escape(n) for n in dict.fromkeys(lasts)]
        last = names[0] if len(names) == 1 else f"({'|'.join(names)})"
        # A parent may end in the layer's number itself: the template's "*" stands for it.
        joined = f"{re.escape(parent)}/{last}" if parent else last
        found.append(f"^{joined.replace(re.escape('*'), numbers)}$")
    return found


def _layers_by_template(paths: Iterable[str]) -> dict[str, set[int]]:
    """`layers/3/x` -> {"layers/*/x": {3, …}}; paths without a number map to an empty set."""
    found: dict[str, set[int]] = {}
    for path in paths:
        parts = path.split("/")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        layer = set() if at is None else {int(parts[at])}
        if at is not None:
            parts[at] = "*"
        found.setdefault("/".join(parts), set()).update(layer)
    return found


def module_paths(leaves: Iterable[str]) -> list[str]:
    """The modules of expanded leaf paths, each once, in order."""
    return list(dict.fromkeys(partition.module(p) for p in leaves))


def seven_digits(x: Any) -> float:
    """What float32 carries of an alpha that was worked out from a scale: 15.9999995 was 16."""
    return float(f"{float(x):.7g}")


def rules(values: Mapping[str, Any], every: Iterable[str]) -> Any:
    """A bare value where all agree, else ordered (regex, value) rules that say the same."""
    every = list(every)
    distinct = list(dict.fromkeys(values.values()))
    if len(distinct) == 1:
        return distinct[0]
    return tuple(
        (regex, value)
        for value in distinct
        for regex in regexes([p for p, v in values.items() if v == value], every)
    )
