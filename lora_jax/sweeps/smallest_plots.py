"""Thresholds side by side: what each method reaches over its trainable parameters, and d90, r90."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lora_jax.errors import UserError
from lora_jax.sweeps.plots import narrow_ticks, new_figure, ticks_at
from lora_jax.sweeps.smallest import Found
from lora_jax.sweeps.threshold import curve


def compare(found: Mapping[str, Found], path: Path, metric: str = "metric") -> Path:
    """A figure of two panels over the same axis of trainable parameters, written to `path`.

    Above: each run, and the monotone fit of each method; dashed, the target. Below: the threshold
    of each method with its interval, labelled with its size, such as "d90 = 750"; an arrow
    where the interval, or the threshold itself, lies beyond what was run.

    Args:
      found: by the name of the method; all should have the same target for the panels to agree.
    """
    if not found:
        raise UserError("no thresholds to compare")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4 + 0.45 * len(found)), layout="constrained")
    ratios = (3.0, 0.5 + 0.45 * len(found))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
    for place, (name, one) in enumerate(found.items()):
        colour = f"C{place % 10}"
        _curve(above, name, one, colour)
        _threshold(below, len(found) - 1 - place, one, colour)
    above.set(xscale="log", ylabel=metric)
    above.legend(fontsize="small")
    below.set(xscale="log", xlabel="trainable parameters", ylim=(-0.6, len(found) - 0.4))
    below.set_yticks(range(len(found)), list(found)[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _curve(axes: Any, name: str, one: Found, colour: str) -> None:
    up = one.target.higher_is_better
    fit = curve(one.runs, higher_is_better=up, statistic=one.statistic)
    runs_at = [one.parameters_at(r.size) for r in one.runs]
    axes.plot(runs_at, [r.metric for r in one.runs], ".", color=colour, alpha=0.5)
    axes.plot([one.parameters_at(s) for s in fit.sizes], fit.fitted, color=colour, label=name)
    axes.axhline(one.target.value, color=colour, linestyle="--", linewidth=0.8)


def _threshold(axes: Any, row: int, one: Found, colour: str) -> None:
    counts = [float(n) for n in one.parameters.values()]
    smallest, largest = min(counts), max(counts)
    t = one.threshold
    if t.size is None:
        beyond = t.status == "not reached"
        at, mark = (largest, ">") if beyond else (smallest, "<")
        sizes = sorted({r.size for r in one.runs})
        text = f"{one.name} {'>' if beyond else '≤'} {sizes[-1 if beyond else 0]:,.0f}"
    else:
        at, mark = one.parameters_at(t.size), "o"
        text = f"{one.name} = {t.size:,.0f}"
    if t.low is not None and t.high is not None:
        low, high = (min(max(one.parameters_at(x), smallest), largest) for x in (t.low, t.high))
        axes.plot([low, high], [row, row], color=colour, linewidth=1.5)
        if t.low == 0:
            axes.plot(low, row, marker="<", color=colour)
        if math.isinf(t.high):
            axes.plot(high, row, marker=">", color=colour)
    axes.plot(at, row, marker=mark, color=colour)
    side = {">": "right", "<": "left"}.get(mark, "center")  # away from the frame
    axes.annotate(text, (at, row), xytext=(0, 7), textcoords="offset points", ha=side,
                  fontsize="small")  # fmt: skip


def over(found: Mapping[float, Found], path: Path, label: str) -> Path:
    """Thresholds with their intervals over a number such as the size of the model, to `path`.

    An arrow stands where nothing was reached, or what is reached by all, at the end of the ladder,
    and where an interval goes on beyond what was run.
    """
    if not found:
        raise UserError("no thresholds to draw")
    figure, axes = new_figure()
    for x, one in sorted(found.items()):
        t, sizes = one.threshold, [r.size for r in one.runs]
        if t.size is None:
            beyond = t.status == "not reached"
            axes.plot(x, max(sizes) if beyond else min(sizes), "^" if beyond else "v", color="C0")
            continue
        axes.plot(x, t.size, "o", color="C0")
        if t.low is not None and t.high is not None:
            ends = [max(t.low, min(sizes)), min(t.high, max(sizes))]
            axes.plot([x, x], ends, color="C0")
            if t.low == 0:
                axes.plot(x, ends[0], "v", color="C0")
            if math.isinf(t.high):
                axes.plot(x, ends[1], "^", color="C0")
    name = next(iter(found.values())).name
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel=name)
    ticks_at(axes.xaxis, pd.Series(list(found)))
    low, high = axes.get_ylim()
    if high < 100 * low:
        narrow_ticks(axes.yaxis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
