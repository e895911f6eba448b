"""Rank, scale and learning rate: three claims about LoRA, measured with paired intervals.

    python experiments/rank_alpha_lr.py --scale small --workdir runs/rank_alpha_lr

Of MiniLM-L6 (extra `minilm`) on SST-2, each arm over a grid of learning rates half a decade apart
(on CoLA so few steps leave most rates at the majority class, and nothing to compare):

1. Is the best learning rate nearly independent of the rank (alpha fixed), and about ten times that
   of full fine-tuning? (Schulman et al. 2025, "LoRA Without Regret".)
2. Do MLP targets beat attention targets at equal parameters? (The same; the LoRA paper adapts
   attention alone.)
3. Does rsLoRA help at a high rank? (Kalajdzievski 2023, arXiv:2312.03732.)

An arm's score on a seed is at the rate that is best on the other seeds, so no number is chosen by
itself; differences are between arms on one seed, which share the order of the data and, where their
shapes agree, the start. Whatever the answers are, they stand in `rank_alpha_lr.md` with their
intervals, and every member in `rank_alpha_lr.csv`, in the workdir or in `--out`.

The same command goes on where it was; each sweep has its report. `GLUE_DIR` names a folder with
TFDS's glue, if it is not in the usual place. `--scale smoke`: 24 members of two steps; `small`: 141
members of 200 steps of 16 sentences, about 100 minutes on 2 CPU cores by the speed of
`configs/sweep_quick.py`; `full`: 355 members of an epoch, ranks to 256 and 5 seeds, for a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import best_rates as best
import pandas as pd
from given_folders import glue

from lora_jax import statistics
from lora_jax.experiment import to_dict
from lora_jax.sweeps import grid, report
from lora_jax.sweeps.sweep import Options, Sweep

TASK, METRIC, NAME = "sst2", "accuracy", "rank_alpha_lr"
RATE = "optimizer.learning_rate"
ALPHA = 32.0
# All six kernels of a layer of width d: attention has 4 of d x d, the MLP d x 4d and 4d x d.
ALL, ATTENTION, MLP = "all-linear", "attention/(query|key|value|out)$", "mlp/(up|down)$"
STEP = 0.5  # decades between two rates


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is tried at every rate of a grid.

    Attributes:
      sweep: the arms of one sweep have a folder, programs and a report together.
      overrides: of the config.
      rates: half a decade apart.
    """

    name: str
    sweep: str
    overrides: Mapping[str, Any]
    rates: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
      ranks: of the first question.
      equal: ranks of (attention, MLP) with equally many parameters: 8·d·r and 10·d·r a layer.
      high: the rank of the third question, one of `ranks`.
      lora, full: exponents of ten, the least and the greatest rate.
    """

    ranks: tuple[int, ...]
    equal: tuple[int, int]
    high: int
    lora: tuple[float, float]
    full: tuple[float, float]
    seeds: int
    steps: int
    batch: int
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


SCALES = {
    "smoke": Scale((1, 4), (5, 4), 4, (-3.0, -2.5), (-4.5, -4.0), 2, 2, 4,
                   {"data.validation": "validation[:8]", "data.source.split": "train[:16]"}),
    "small": Scale((1, 4, 16, 64), (20, 16), 64, (-4.5, -2.0), (-5.0, -3.0), 3, 200, 16,
                   {"data.length": 32, "data.buckets": (16,), "data.too_long": "truncate"}),
    "full": Scale((1, 4, 16, 64, 256), (80, 64), 256, (-5.0, -1.5), (-5.5, -2.5), 5, 2104, 32),
}  # fmt: skip


def lora(rank: int, targets: str = ALL, scaling: str = "standard") -> dict[str, Any]:
    return {"method.kind": "lora", "method.rank": rank, "method.alpha": ALPHA,
            "method.targets": targets, "method.scaling": scaling}  # fmt: skip


def arms(scale: Scale) -> list[Arm]:
    rates, full = (_rates(*ends) for ends in (scale.lora, scale.full))
    attention, mlp = scale.equal
    return [
        Arm("full", "full", {"method.kind": "full"}, full),
        *(Arm(f"r={r}", "ranks", lora(r), rates) for r in scale.ranks),
        Arm(f"attention r={attention}", "targets", lora(attention, ATTENTION), rates),
        Arm(f"mlp r={mlp}", "targets", lora(mlp, MLP), rates),
        Arm(f"rsLoRA r={scale.high}", "rslora", lora(scale.high, scaling="rslora"), rates),
    ]


def _rates(low: float, high: float) -> tuple[float, ...]:
    count = round((high - low) / STEP) + 1
    return tuple(float(f"{10 ** (low + STEP * i):.2g}") for i in range(count))


def measure(
    scale: Scale, workdir: Path, base: Mapping[str, Any], metric: str, mode: Any = "auto"
) -> pd.DataFrame:
    """Runs what is missing; a row a member: arm, rate, seed, value (NaN where it diverged)."""
    seeds = [{"seed": s, "data.seed": s, "training.dropout_seed": s} for s in range(scale.seeds)]
    rows = []
    for name, some in itertools.groupby(arms(scale), key=lambda arm: arm.sweep):
        chosen = list(some)
        tried = [{**arm.overrides, RATE: rate} for arm in chosen for rate in arm.rates]
        sweeps = {"arm": tried, "seed": seeds}
        sweep = Sweep(base, sweeps, workdir / name, Options(mode=mode), progress=False)
        sweep.run()
        frame = report.table(sweep.members, sweep.folder)
        found = frame.set_index("member")
        places = [(arm.name, rate) for arm in chosen for rate in arm.rates]
        wanted = itertools.product(places, range(scale.seeds))
        for ((arm_name, rate), seed), member in zip(wanted, sweep.grid, strict=True):
            row = found.loc[member.name]
            value = row[metric] if row["status"] == "finished" else math.nan
            rows.append({"arm": arm_name, "rate": rate, "seed": seed, "value": value,
                         "member": member.name, "sweep": name,
                         "trainable_params": row["trainable_params"]})  # fmt: skip
    return pd.DataFrame(rows)


def configured(scale: Scale) -> dict[str, Any]:
    spec = glue(task=TASK, batch=scale.batch)
    further = {"training.steps": scale.steps, "training.eval_every": 0, "training.keep": "last"}
    return to_dict(grid.configured(spec, {**further, **scale.overrides}))


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question's number with its interval, and what the interval says."""

    question: str
    number: str
    summary: statistics.Summary | None
    verdict: str
    note: str = ""


def answers(frame: pd.DataFrame, scale: Scale) -> list[Answer]:
    ranks = {f"r={r}": r for r in scale.ranks}
    ends = [a.name for a in arms(scale) if best.at_an_end(frame, a.name)]
    note = f"Best at an end of the grid, so only a bound: {', '.join(ends)}." if ends else ""
    bounded, of_full = bool(set(ends) & set(ranks)), bool(set(ends) & {*ranks, "full"})
    moved, ratio = best.shift(frame, ranks), best.above(frame, ranks, "full")
    lost = best.cost_of_one_rate(frame, ranks)
    attention, mlp = (f"{n} r={r}" for n, r in zip(("attention", "mlp"), scale.equal, strict=True))
    high = f"r={scale.high}"
    targets, rs = best.gap(frame, mlp, attention), best.gap(frame, f"rsLoRA {high}", high)
    whole = f"ranks {scale.ranks[0]} to {scale.ranks[-1]}"
    return [
        Answer(f"Is the best rate nearly independent of the rank ({whole})?",
               "decades that it moves", moved, best.within(moved, 0.0, bounded), note),
        Answer("What does one rate for all ranks cost, against a rate for each?",
               METRIC, lost, best.better(lost, "something", "it gains")),
        Answer("Is LoRA's best rate about 10 times full fine-tuning's?",
               "decades above", ratio, best.within(ratio, 1.0, of_full), note),
        Answer(f"Do MLP targets beat attention at equal parameters ({mlp}, {attention})?",
               METRIC, targets, best.better(targets, "yes", "no")),
        Answer(f"Does rsLoRA help at a high rank ({high}, alpha {ALPHA:g})?",
               METRIC, rs, best.better(rs, "yes", "no")),
    ]  # fmt: skip


def write(frame: pd.DataFrame, scale: Scale, name: str, folder: Path) -> str:
    """Both files; returns the text of the answers."""
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / f"{NAME}.csv", index=False)
    lines = [
        f"# Rank, scale and learning rate ({name})", "",
        f"MiniLM-L6 on SST-2, {scale.steps} steps of {scale.batch} sentences, {scale.seeds} seeds. "
        f"`python experiments/{NAME}.py --scale {name}`. 95 % intervals over seeds.", "",
        "| question | number | value | interval | seeds | answer |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    found = answers(frame, scale)
    for a in found:
        x = a.summary
        cells = [a.question, a.number, *_cells(x), a.verdict]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| arm | parameters | log10 of the best rate, by seed | score, by seed |",
              "| --- | --- | --- | --- |"]  # fmt: skip
    lines += [_line(frame, arm) for arm in arms(scale)]
    notes = dict.fromkeys(a.note for a in found if a.note)
    text = "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
    return text


def _cells(x: statistics.Summary | None) -> list[str]:
    if x is None:
        return ["–", "–", "0"]
    return [f"{x.value:.3g}", f"{x.low:.3g} to {x.high:.3g}", str(x.n)]


def _line(frame: pd.DataFrame, arm: Arm) -> str:
    counted = frame.loc[frame["arm"] == arm.name, "trainable_params"].dropna()
    rates = ", ".join(f"{x:.2f}" for x in best.best_rates(frame, arm.name).values())
    end = " (at an end of the grid)" if best.at_an_end(frame, arm.name) else ""
    values = ", ".join(f"{x:.3f}" for x in best.scores(frame, arm.name).values())
    return f"| {arm.name} | {int(counted.iloc[0]):,} | {rates}{end} | {values} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder of the two files; default: the workdir")
    parser.add_argument("--mode", default="auto", choices=("auto", "packed", "serial"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    scale = SCALES[options.scale]
    workdir = options.workdir / options.scale
    frame = measure(scale, workdir, configured(scale), METRIC, options.mode)
    print(write(frame, scale, options.scale, options.out or workdir))


if __name__ == "__main__":
    main()
