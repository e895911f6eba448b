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
from lora_jax.atomic import write_text
from lora_jax.sweeps import fields, plots, search, update_plots
from lora_jax.sweeps.grid import Member

CSV = "results.csv"
SHOWN = 10
"""Best settings on the page."""


def table(members: Iterable[Member], folder: Path) -> pd.DataFrame:
    """A row per member that has a result: its name, what the sweep set, status, then metrics.

    A field that the sweep set in other members only has the member's own value, of its config.
    """
    members = list(members)
    results = {m.name: result for m in members if (result := search.result(folder, m)) is not None}
    return frame(members, results)


def frame(members: Sequence[Member], results: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """`table` of results by the member's name."""
    keys = list(dict.fromkeys(key for member in members for key in member.overrides))
    return pd.DataFrame([_row(m, results[m.name], keys) for m in members if m.name in results])


def _row(member: Member, result: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    own = member.overrides
    set_ = {k: _cell(own[k] if k in own else _at(result["config"], k)) for k in keys}
    return {
        "member": member.name,
        **set_,
        "status": result["status"],
        **result["metrics"],
        "trainable_params": result.get("trainable_params"),
        "seconds": result["seconds"],
    }


def _at(config: Any, dotted: str) -> Any:
    """A resolved config's value; None where its `kind` has no such field."""
    for key in dotted.split("."):
        if not isinstance(config, Mapping) or key not in config:
            return None
        config = config[key]
    return config


def _cell(value: Any) -> Any:
    return (
        value if isinstance(value, int | float | str | bool) or value is None else json.dumps(value)
    )


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Whole or not at all."""
    write_text(path, frame.to_csv(index=False))


def differences(
    frame: pd.DataFrame, keys: Sequence[str], metric: str, higher_is_better: bool
) -> pd.DataFrame:
    """Each value of a varied field against the best one, over members alike in all other fields.

    Fields that vary together (alpha = 2·rank) are one, which has all their names and the first
    one's values: their effects cannot be told apart. Values that no two such members have (of
    alpha, where each rank has alphas of its own) are not compared.

    Columns: field, value, against, difference (value - against), low, high (95 % interval of the
    mean), pairs. Members that did not finish are in no pair.
    """
    done = fields.finished(frame, keys, metric)
    rows = []
    for key, together in fields.groups(done, fields.varied(done, keys)).items():
        others = fields.others(done, keys, key)
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
                name = ", ".join(together)
                rows.append((name, value, best, gap.value, gap.low, gap.high, gap.n))
    names = ["field", "value", "against", "difference", "low", "high", "pairs"]
    return pd.DataFrame(rows, columns=names)


def write(
    frame: pd.DataFrame,
    made: pd.DataFrame,
    keys: Sequence[str],
    metric: str,
    higher: bool,
    summary: Mapping[str, Any],
    folder: Path,
) -> Path:
    """The plots and `report.html`, from the table and from the updates (`updates.updates`)."""
    table = plots.Table.of(frame, keys, metric, higher)
    gaps = differences(frame, keys, metric, higher)
    drawn = [
        *plots.draw(table, folder),
        *plots.differences(gaps, metric, folder),
        *update_plots.draw(table, made, folder),
    ]
    best = table.settings().head(SHOWN) if len(table.frame) else pd.DataFrame()
    path = folder / "report.html"
    write_text(path, _page(frame, gaps, best, drawn, metric, summary))
    return path


_STYLE = """
body{font-family:system-ui,sans-serif;margin:2em auto;max-width:76em;padding:0 1.5em;color:#222}
table{border-collapse:collapse;font-size:.85em}
.wide{overflow-x:auto}
td,th{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:right;white-space:nowrap}
thead th{border-bottom:2px solid #888}
.facts th{text-align:left}
.plots{display:flex;flex-wrap:wrap;gap:1.5em}
figure{margin:0;max-width:100%}
img{max-width:100%;height:auto}
img.narrow{width:36em}img.broad{width:54em}
figcaption{color:#555;font-size:.85em;max-width:42em}
"""
_FACTS = ("members", "packs", "programs_compiled", "modes", "update_seconds", "seconds", "device")


def _page(
    frame: pd.DataFrame,
    gaps: pd.DataFrame,
    best: pd.DataFrame,
    drawn: Sequence[plots.Plot],
    metric: str,
    summary: Mapping[str, Any],
) -> str:
    first = {k: summary[k] for k in _FACTS if k in summary}
    rest = {k: v for k, v in summary.items() if k not in first}
    shown = "".join(_figure(x) for x in drawn)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>sweep</title>"
        f"<style>{_STYLE}</style></head><body><h1>Sweep</h1>{_facts(first)}",
        f"<h2>Best settings</h2><p>{html.escape(metric)} over the members of a setting, which "
        f"differ in seeds.</p>{_table(best)}",
        f"<h2>Plots</h2><div class='plots'>{shown}</div>" if shown else "",
        "<h2>Paired differences</h2><p>Each value against the best of its field, over members that "
        "are alike in all other fields; 95 % intervals of the mean. Fields that always varied "
        f"together stand in one row.</p>{_table(gaps)}",
        f"<h2>Members</h2>{_table(frame)}",
        f"<details><summary>Environment</summary>{_facts(rest)}</details></body></html>",
    ]
    return "".join(parts)


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th>"
        f"<td>{html.escape(_fact(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table class='facts'>{rows}</table>"


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def _table(frame: pd.DataFrame) -> str:
    if frame.empty:
        return "<p>None.</p>"
    with pd.option_context("display.max_colwidth", None):  # else long targets look alike
        text = frame.to_html(index=False, float_format=_number, na_rep="–", border=0)
    return f"<div class='wide'>{text}</div>"


def _figure(plot: plots.Plot) -> str:
    from matplotlib.image import imread

    height, width = imread(plot.path).shape[:2]
    kind = "broad" if width > 1.8 * height else "narrow"
    return (
        f'<figure><img class="{kind}" alt="{html.escape(plot.path.stem)}" '
        f'src="data:image/png;base64,{_encoded(plot.path)}">'
        f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
    )


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _number(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.5g}"
