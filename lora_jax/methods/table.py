"""A table of all methods, made from their classes: `lora-jax list methods` prints it.

The README holds it between two comments, and a test compares the two.
"""

from __future__ import annotations

import dataclasses
import inspect
import re

from lora_jax.methods import METHODS
from lora_jax.methods.base import Method

BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
"""Between these the README has the table."""
HEADER = (
    "method", "trains", "merges", "cost at inference", "size", "packs", "PEFT", "source",
)  # fmt: skip
# "Hu et al. 2021, arXiv:2106.09685", "Li and Liang (2021, arXiv:2101.00190)".
_CITATION = re.compile(
    r"(?P<who>[^\W\d_][\w-]+(?: and [^\W\d_][\w-]+| et al\.)?),? \(?(?P<year>\d{4}),? "
    r"(?:arXiv:)?(?P<id>\d{4}\.\d{5})"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
      name: as in `method.kind`.
      trains: in a few words.
      merges: whether `merge` gives ordinary weights.
      inference: what an adapter costs when the model is used; "none" where it merges.
      size: the field that `match_budget` chooses; None: there is none.
      packs: "any size" where members of different sizes share a program in a sweep, "equal size"
        where only other numbers may differ (rates, seeds, the method's `numeric` fields), "yes"
        where there is no size.
      peft: the peft_type whose files it reads and writes, with further entries; "" for none.
      source: ((authors, year, arXiv id), …) as its docstring, or its module's, cites them.
    """

    name: str
    trains: str
    merges: bool
    inference: str
    size: str | None
    packs: str
    peft: str
    source: tuple[tuple[str, str, str], ...]

    def cells(self) -> tuple[str, ...]:
        """In Markdown, in the order of HEADER."""
        links = [f"[{who} {year}](https://arxiv.org/abs/{id_})" for who, year, id_ in self.source]
        return (
            f"`{self.name}`", self.trains, "yes" if self.merges else "no", self.inference,
            f"`{self.size}`" if self.size else "", self.packs, self.peft, ", ".join(links),
        )  # fmt: skip


def row(cls: type[Method]) -> Row:
    """What a registered class says of itself."""
    padded = cls.padding_exact and cls.size_field in cls.numeric
    entries = dict(cls.peft_entries)
    kind = str(entries.pop("peft_type", ""))
    return Row(
        name=cls.name,
        trains=cls.trains,
        merges=cls.mergeable,
        inference="none" if cls.mergeable else cls.inference,
        size=cls.size_field,
        packs="yes" if cls.size_field is None else "any size" if padded else "equal size",
        peft=", ".join([kind, *entries]) if kind else "",
        source=_sources(cls),
    )


def _sources(cls: type[Method]) -> tuple[tuple[str, str, str], ...]:
    """The citations of the class's docstring, else of its module's."""
    module = inspect.getmodule(cls)
    for text in (cls.__doc__, module.__doc__ if module else None):
        found = _CITATION.finditer(" ".join((text or "").split()))
        if cited := tuple((m["who"], m["year"], m["id"]) for m in found):
            return cited
    return ()


def rows() -> list[Row]:
    """All methods of this package, by name; what others have registered is not in it."""
    own = [c for c in METHODS.values() if c.__module__.startswith(f"{__package__}.")]
    return sorted(map(row, own), key=lambda r: r.name)


def markdown() -> str:
    """The table, a line a method."""
    lines = [HEADER, ("---",) * len(HEADER), *(r.cells() for r in rows())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
