"""A sweep's table and plots: `results.csv`, PNG files, and `report.html` that shows them all."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lora_jax.runs import RESULT
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


def plots(frame: pd.DataFrame, keys: Sequence[str], metric: str, folder: Path) -> list[Path]:
    """One plot for each field that the sweep varied: the metric over it, a line for each
    combination of the others, seeds averaged with their spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if metric not in frame or frame[metric].dropna().empty:
        return []
    paths = []
    seeds = [k for k in keys if k.rsplit(".", 1)[-1].endswith("seed")]
    varied = [k for k in keys if k not in seeds and frame[k].nunique(dropna=False) > 1]
    for key in varied:
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        others = [k for k in varied if k != key]
        groups = frame.groupby(others, dropna=False) if others else [((), frame)]
        for name, part in groups:
            stats = part.groupby(key, sort=True, dropna=False)[metric].agg(["mean", "std"])
            label = ", ".join(
                f"{o.split('.')[-1]}={n}" for o, n in zip(others, _tuple(name), strict=True)
            )
            axes.errorbar(
                range(len(stats)) if stats.index.dtype == object else stats.index,
                stats["mean"], stats["std"].fillna(0.0), label=label or None, marker="o", capsize=3,
            )  # fmt: skip
            if stats.index.dtype == object:
                axes.set_xticks(range(len(stats)), [str(x) for x in stats.index], rotation=20)
        if pd.api.types.is_numeric_dtype(frame[key]) and frame[key].min() > 0:
            axes.set_xscale("log")
        axes.set(xlabel=key, ylabel=metric)
        if others:
            axes.legend(fontsize="x-small")
        path = folder / f"{metric}_over_{key.replace('.', '_')}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        paths.append(path)
    return paths


def _tuple(name: Any) -> tuple[Any, ...]:
    return name if isinstance(name, tuple) else (name,)


def write_html(
    frame: pd.DataFrame, images: Sequence[Path], summary: Mapping[str, Any], path: Path
) -> None:
    """One page: the summary, the table, the plots beside it as files."""
    facts = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>"
        for k, v in summary.items()
    )
    shown = "".join(
        f'<img src="{html.escape(p.name)}" alt="{html.escape(p.stem)}">' for p in images
    )
    page = (
        "<!doctype html><meta charset='utf-8'><title>sweep</title>"
        "<style>body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}img{max-width:45em}</style>"
        f"<h1>Sweep</h1><table>{facts}</table><h2>Members</h2>{frame.to_html(index=False)}"
        f"<h2>Plots</h2>{shown}"
    )
    part = path.with_suffix(".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)
