"""Several splits of a source as one sequence."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any


def joined(source: Any) -> Sequence[dict[str, Any]]:
    """The splits that `source.split` joins with "+", one after the other, opened."""
    splits = [split.strip() for split in source.split.split("+")]
    return _Joined(
        [split.split("[")[0] for split in splits],
        [dataclasses.replace(source, split=split).open() for split in splits],
    )


class _Joined(Sequence[dict[str, Any]]):
    """Records with the name of their split in the field `split`."""

    def __init__(self, names: Sequence[str], parts: Sequence[Sequence[dict[str, Any]]]) -> None:
        self._names, self._parts = names, parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = int(index) % len(self)
        part = bisect.bisect_right(self._ends, place)
        record = self._parts[part][place - self._ends[part]]
        return {**record, "split": self._names[part]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for name, part in zip(self._names, self._parts, strict=True):
            for record in part:
                yield {**record, "split": name}
