"""Published rows that stand without a number of ours."""

from __future__ import annotations

from collections.abc import Sequence

from lora_jax.tables import published
from lora_jax.tables.published import Published
from lora_jax.tables.table import Row
from lora_jax.tables.work import NotRun


def quoted(
    table: str, labels: Sequence[str], columns: Sequence[str], reason: str, times: float = 1.0
) -> list[Row]:
    """Every row of a published table, each of its columns a `Row` that is not run, with the reason.

    Args:
      labels: columns that name a row and choose it, together.
      columns: of the numbers; cells with nothing in them are left out.
      times: see `Published`.
    """
    rows = []
    for _, found in published.frame(table).iterrows():
        where = {name: found[name] for name in labels}
        rows += [
            Row(" ".join(where.values()), c, NotRun(reason), Published(table, where, c, times))
            for c in columns
            if found[c]
        ]
    return rows
