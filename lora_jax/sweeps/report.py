"""A sweep's table, `results.csv`, and its page, `report.html`, which needs no other file."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lora_jax import statistics
from lora_jax.runs import RESULT
from lora_jax.sweeps import plots
from lora_jax.sweeps.grid import Member

CSV = "results.csv"


def table(members: Iterable[Member], folder: Path) -> pd.DataFrame:
    """A row per member that has a result: its name, what the sweep set, status, then metrics."""
    rows = []
    for member in members:
        path = folder / member.name / RESULT
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        set_ = {key: _cell(value) for key, value in member.overrides.items()}
        rows.append(
            {
                "member": member.name,
                **set_,
                "status": result.get("status", "finished"),
                **result["metrics"],
                "trainable_params": result.get("trainable_params"),
                "seconds": result["seconds"],
            }
        )
    return pd.DataFrame(rows)


def _cell(value: Any) -> Any:
    return (
        value if isinstance(value, int | float | str | bool) or value is None else json.dumps(value)
    )


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Atomically."""
    part = path.with_suffix(".part")
    frame.to_csv(part, index=False)
    part.replace(path)


def differences(
    frame: pd.DataFrame, keys: Sequence[str], metric: str, higher_is_better: bool
) -> pd.DataFrame:
    """Each value of a varied field against the best one, over members alike in all other fields.

    Columns: field, value, against, difference (value - against), low, high (95 % interval of the
    mean), pairs. Members that did not finish are in no pair.
    """
    done = frame[frame["status"] == "finished"] if "status" in frame else frame
    rows = []
    for key in plots.varied(done, keys):
        others = [k for k in keys if k != key]
        by_value: dict[Any, dict[int, float]] = {}
        places: dict[str, int] = {}
        for _, row in done.iterrows():
            place = places.setdefault(json.dumps([str(row[k]) for k in others]), len(places))
            by_value.setdefault(row[key], {})[place] = float(row[metric])
        means = {
            value: statistics.mean(list(found.values())).value for value, found in by_value.items()
        }
        best = (max if higher_is_better else min)(means, key=lambda value: means[value])
        for value, found in by_value.items():
            gap = statistics.paired(found, by_value[best])
            if value != best and gap is not None:
                rows.append((key, value, best, gap.value, gap.low, gap.high, gap.n))
    names = ["field", "value", "against", "difference", "low", "high", "pairs"]
    return pd.DataFrame(rows, columns=names)


def write_html(
    frame: pd.DataFrame,
    gaps: pd.DataFrame,
    images: Sequence[Path],
    summary: Mapping[str, Any],
    path: Path,
) -> None:
    """One page: the summary, the table, paired differences, and the plots inside it."""
    facts = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>"
        for k, v in summary.items()
    )
    shown = "".join(
        f'<figure><img alt="{html.escape(p.stem)}" src="data:image/png;base64,{_encoded(p)}">'
        f"<figcaption>{html.escape(p.stem.replace('_', ' '))}</figcaption></figure>"
        for p in images
    )
    pairs = gaps.to_html(index=False, float_format=_number) if len(gaps) else "<p>None.</p>"
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>sweep</title>"
        "<style>body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}"
        "img{max-width:45em}figure{display:inline-block;margin:1em}</style>"
        f"<h1>Sweep</h1><table>{facts}</table>"
        f"<h2>Members</h2>{frame.to_html(index=False, float_format=_number)}"
        "<h2>Paired differences</h2><p>Each value against the best of its field, over members that "
        "are alike in all other fields; 95 % intervals of the mean.</p>"
        f"{pairs}<h2>Plots</h2>{shown}</html>"
    )
    part = path.with_suffix(".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _number(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.5g}"
