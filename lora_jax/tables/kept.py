"""The numbers of a filled table by seed, in a file that a table on another machine goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_jax.errors import UserError
from lora_jax.statistics import Summary
from lora_jax.tables.table import Filled, Table
from lora_jax.tables.work import Measured, Work, fullest, plain

log = logging.getLogger(__name__)
_FIELDS = ("trainable_params", "seconds", "chosen", "reason", "notes", "software")
_LISTS = ("notes", "software")
_NEEDED = {"values", "summary", "runs", "notes"}  # an older version's file has no more


def text(filled: Filled, before: Mapping[str, Measured] = MappingProxyType({})) -> str:
    """JSON of the rows whose runs gave something.

    Args:
      before: what was there, by name. It stays where it has more seeds, or where a row fails now.
    """
    found = [(line.row, _fuller(line.measured, before.get(line.row.name))) for line in filled.lines]
    places = list(dict.fromkeys(measured.where for _, measured in found))
    rows = {
        row.name: {
            "settings": settings(row.work), **_kept(measured, places.index(measured.where)),
        }
        for row, measured in found
        if measured.found
    }  # fmt: skip
    content = {"title": filled.table.title, "scale": filled.scale, "rows": rows}
    return json.dumps(content, indent=1, allow_nan=False, default=plain) + "\n"


def _fuller(now: Measured, before: Measured | None) -> Measured:
    if before is None or (now.found and set(now.seeds) >= set(before.seeds)):
        return now
    return before


def read(paths: Sequence[Path], table: Table, scale: str) -> dict[str, Measured]:
    """What files have of a table's rows, by name; of a row that several have, the first's of those
    with the most seeds.

    A row that was measured with other settings than the table's now is left out, with a warning.

    Raises UserError for a file that is none of these, or is of another table or scale.
    """
    found: dict[str, Measured] = {}
    for path in paths:
        rows, odd = _rows(path, table, scale)
        if odd:
            raise UserError(f"--known {path} has a row {odd[0]!r}, which the table has not")
        found = fullest(found, rows)
    return found


def earlier(path: Path, table: Table, scale: str) -> dict[str, Measured]:
    """What the last call wrote of rows that are in the table now, and are measured as then; nothing
    where there is no such file, or the table has another title."""
    try:
        return _rows(path, table, scale)[0]
    except UserError:
        return {}


def _rows(path: Path, table: Table, scale: str) -> tuple[dict[str, Measured], list[str]]:
    """(a file's rows of this table as it is now, names of those that the table has not)."""
    content = _content(path)
    if (content["title"], content["scale"]) != (table.title, scale):
        raise UserError(
            f"--known {path} is of {content['title']!r} at scale {content['scale']}, not of "
            f"{table.title!r} at scale {scale}"
        )
    works = {row.name: row.work for row in table.rows}
    found, odd = {}, []
    for name, row in sorted(content["rows"].items()):
        if name not in works:
            odd.append(name)
        elif row.get("settings") in (None, settings(works[name])):
            found[name] = _measured(row, f"{path} {row['runs']}")
        else:
            log.warning("%s: %s was measured with other settings: left out", path, name)
    return found, odd


def settings(work: Work) -> str | None:
    """A hash of what the runs of a config are told; None where a function makes the number."""
    if not (dataclasses.is_dataclass(work) and isinstance(getattr(work, "config", None), str)):
        return None
    text = json.dumps(work, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _content(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--known {path}: {error.strerror}") from error
    except ValueError:
        content = None
    if not (
        isinstance(content, dict)
        and content.keys() >= {"title", "scale", "rows"}
        and isinstance(content["rows"], dict)
        and all(isinstance(x, dict) and x.keys() >= _NEEDED for x in content["rows"].values())
    ):
        raise UserError(f"--known {path} is not the NAME.json that `lora-jax table` writes")
    return content


def _kept(measured: Measured, runs: int) -> dict[str, Any]:
    """`runs`: the same for metrics of the same runs, whose seconds count once."""
    summary = measured.summary and dataclasses.asdict(measured.summary)
    return {
        "values": {str(seed): _or_null(x) for seed, x in measured.values.items()},
        "summary": summary and {k: _or_null(x) for k, x in summary.items()},
        "beyond": measured.beyond and list(map(_or_null, measured.beyond)),
        **{name: getattr(measured, name) for name in _FIELDS},
        "seeds": measured.seeds,
        "runs": runs,
    }


def _measured(row: Mapping[str, Any], where: str) -> Measured:
    summary = row["summary"]
    values = {int(seed): _or_nan(x) for seed, x in row["values"].items()}
    size, end = row.get("beyond") or (None, None)
    return Measured(
        values,
        summary=summary and _summary(summary),
        beyond=None if size is None else (size, _or_nan(end)),
        # An older version's file does not say.
        seeds=tuple(row.get("seeds", values or range(summary["n"] if summary else 0))),
        known_from=where,
        **{name: row[name] for name in _FIELDS if name in row and name not in _LISTS},
        notes=tuple(row["notes"]),
        software=tuple(row.get("software", ())),
    )


def _summary(kept: Mapping[str, float | str | None]) -> Summary:
    numbers = {name: _or_nan(x) for name, x in kept.items() if name != "n"}
    return Summary(n=int(kept["n"] or 0), **numbers)


def _or_null(x: float) -> float | str | None:
    """JSON has neither NaN nor the infinite end of a threshold's interval."""
    return None if math.isnan(x) else str(x) if math.isinf(x) else x


def _or_nan(x: float | str | None) -> float:
    return math.nan if x is None else float(x)
