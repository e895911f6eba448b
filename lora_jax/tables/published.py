"""The papers' numbers: one CSV a table, as printed, and `_index.csv`, which says where from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from importlib import resources
from typing import Any

import pandas as pd

from lora_jax.errors import UserError, nearest

_FOLDER = "published"
# Columns of trainable parameters, and the unit that their cells lack.
_PARAMS = {"trainable_params_M": "M", "params_M": "M", "trainable_params": "", "params": ""}


@dataclasses.dataclass(frozen=True)
class Cited:
    """A published number.

    Attributes:
      std: as published beside it; None where it is not.
      status: how far it was checked: "verified-primary" was read in the paper itself.
      source: paper and table.
      notes: what is odd about the table, or where its sources disagree.
      params: trainable parameters as printed beside it ("0.3M"); "" where they are not.
    """

    value: float
    std: float | None
    status: str
    source: str
    notes: str
    params: str = ""


@dataclasses.dataclass(frozen=True)
class Published:
    """Where a published number stands: `Published("lora_t02_glue", {"model": …}, "CoLA")`.

    Args:
      table: name of the CSV.
      where: values of the columns that pick one row, compared as text.
      column: of the number.
      times: what to multiply it with to have our unit (0.01 for percent).
    """

    table: str
    where: Mapping[str, Any]
    column: str
    times: float = 1.0

    def look_up(self) -> Cited:
        """Raises UserError for an unknown table, row or column, or where several rows fit."""
        if self.column not in frame(self.table):
            raise _no_column(self.table, self.column)
        found = row(self.table, self.where)
        if not found[self.column]:
            raise UserError(f"{self.table}.csv has no number in {self.column!r} of {self.where}")
        about = index().loc[self.table]
        std = found.get(_std_of(found, self.column), "")
        return Cited(
            value=_number(found[self.column]) * self.times,
            std=float(std) * self.times if std else None,
            status=str(found.get("status") or about["status"]),
            source=f"{about['paper']}, {about['caption'].partition(':')[0]}",
            notes="; ".join(str(x) for x in (about["notes"], found.get("note")) if x),
            params=next((found[c] + unit for c, unit in _PARAMS.items() if found.get(c)), ""),
        )


def _std_of(found: pd.Series, column: str) -> str:
    """Its name with `_std`; a column called `std` is of the one before it."""
    columns = list(found.index)
    after = columns[columns.index(column) + 1 :][:1]
    return "std" if after == ["std"] else f"{column}_std"


def row(table: str, where: Mapping[str, Any]) -> pd.Series:
    """The one row of a published table whose columns have these values, compared as text.

    Raises UserError for an unknown table or column, or where not exactly one row fits.
    """
    rows = frame(table)
    for name, value in where.items():
        if name not in rows:
            raise _no_column(table, name)
        rows = rows[rows[name] == str(value)]
    if len(rows) != 1:
        raise UserError(f"{table}.csv has {len(rows)} rows with {dict(where)}")
    return rows.iloc[0]


def counted(config: str) -> tuple[int | None, tuple[str, ...]]:
    """(trainable parameters by the paper's own formula, what is odd about those it prints) of a row
    of `param_counts`; nothing for "".

    Raises UserError where there is no such row.
    """
    if not config:
        return None, ()
    found = row("param_counts", {"config": config})
    note = f"trainable parameters, {config}: {found['note']}"
    return int(found["computed"]), (note,) if found["note"] else ()


def _no_column(table: str, name: str) -> UserError:
    return UserError(f"{table}.csv has no column {name!r}; {nearest(name, frame(table).columns)}")


def _number(text: str) -> float:
    """As printed: "37.7M" is 37.7, in the unit of the column; "175B" is 175,000 of it."""
    scale = 1e3 if text.endswith("B") else 1.0
    return float(text.rstrip("MB%x")) * scale


@functools.cache
def index() -> pd.DataFrame:
    """All published tables: paper, caption, status, notes, by name."""
    return _read("_index").set_index("id")


@functools.cache
def frame(table: str) -> pd.DataFrame:
    """A published table as text, cell by cell as printed."""
    if table not in index().index:
        raise UserError(f"no published table {table!r}; {nearest(table, index().index)}")
    return _read(table)


def _read(name: str) -> pd.DataFrame:
    path = resources.files(__package__) / _FOLDER / f"{name}.csv"
    with path.open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype=str, keep_default_na=False)
