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

The same command goes on where it was; each sweep has its report. `--sweeps ranks,targets` runs some
alone, and `--known rank_alpha_lr.csv` takes from an earlier table what it has, so that machines can
share the work: the answers are of the arms that are there. `GLUE_DIR` names a folder with TFDS's
glue, if it is not in the usual place. `--scale smoke`: 24 members of two steps; `small`: 141
members of 200 steps of 16 sentences, about 100 minutes on 2 CPU cores by the speed of
`configs/sweep_quick.py`; `full`: 355 members of an epoch, ranks to 256 and 5 seeds, for a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import best_rates as best
import pandas as pd
from given_folders import glue

from lora_jax import host, statistics
from lora_jax.experiment import to_dict
from lora_jax.sweeps import grid, report
from lora_jax.sweeps.sweep import Options, Sweep

TASK, METRIC, NAME = "sst2", "accuracy", "rank_alpha_lr"
RATE = "optimizer.learning_rate"
SEEDED = ("seed", "data.seed", "training.dropout_seed")
ALPHA = 32.0
# All six kernels of a layer of width d: attention has 4 of d x d, the MLP d x 4d and 4d x d.
ALL, ATTENTION, MLP = "all-linear", "attention/(query|key|value|out)$", "mlp/(up|down)$"


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
    rates, full = (best.rates(*ends) for ends in (scale.lora, scale.full))
    attention, mlp = scale.equal
    return [
        Arm("full", "full", {"method.kind": "full"}, full),
        *(Arm(f"r={r}", "ranks", lora(r), rates) for r in scale.ranks),
        Arm(f"attention r={attention}", "targets", lora(attention, ATTENTION), rates),
        Arm(f"mlp r={mlp}", "targets", lora(mlp, MLP), rates),
        Arm(f"rsLoRA r={scale.high}", "rslora", lora(scale.high, scaling="rslora"), rates),
    ]


def measure(
    scale: Scale,
    workdir: Path,
    base: Mapping[str, Any],
    metric: str,
    *,
    mode: Any = "auto",
    sweeps: Sequence[str] = (),
    known: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Runs what is missing; a row a member: arm, rate, seed, value (NaN where it diverged).

    Args:
      sweeps: to run, by name; (): all.
      known: an earlier table, whose members are not run again.
    """
    before = {} if known is None else {row["member"]: row for row in known.to_dict("records")}
    rows = []
    for name, some in itertools.groupby(arms(scale), key=lambda arm: arm.sweep):
        places = list(itertools.product(
            [(arm, rate) for arm in some for rate in arm.rates], range(scale.seeds)
        ))  # fmt: skip
        tried = [
            {**arm.overrides, RATE: rate, **dict.fromkeys(SEEDED, seed)}
            for (arm, rate), seed in places
        ]
        members = grid.members(base, tried)
        missing = [x for x, m in zip(tried, members, strict=True) if m.name not in before]
        ran: dict[str, Any] = {}
        if missing and (not sweeps or name in sweeps):
            ran = _run(Sweep(base, {"member": missing}, workdir / name, Options(mode=mode),
                             progress=False), metric)  # fmt: skip
        for ((arm, rate), seed), member in zip(places, members, strict=True):
            if (found := before.get(member.name) or ran.get(member.name)) is not None:
                rows.append({"arm": arm.name, "rate": rate, "seed": seed, "value": found["value"],
                             "member": member.name, "sweep": name,
                             "trainable_params": found["trainable_params"]})  # fmt: skip
    return pd.DataFrame(rows)


def _run(sweep: Sweep, metric: str) -> dict[str, Any]:
    """value and trainable_params by member."""
    sweep.run()
    frame = report.table(sweep.members, sweep.folder)
    frame["value"] = frame[metric].where(frame["status"] == "finished")
    return {row["member"]: row for row in frame.to_dict("records")}


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
    """Of the arms that the frame has."""
    have = set(frame["arm"])
    ranks = {f"r={r}": r for r in scale.ranks if f"r={r}" in have}
    ends = [a.name for a in arms(scale) if a.name in have and best.at_an_end(frame, a.name)]
    note = f"Best at an end of the grid, so only a bound: {', '.join(ends)}." if ends else ""
    found = []
    if len(ranks) > 1:
        moved, lost = best.shift(frame, ranks), best.cost_of_one_rate(frame, ranks)
        whole = f"ranks {min(ranks.values())} to {max(ranks.values())}"
        found += [
            Answer(f"Is the best rate nearly independent of the rank ({whole})?",
                   "decades that it moves", moved,
                   best.within(moved, 0.0, bool(set(ends) & set(ranks))), note),
            Answer("What does one rate for all ranks cost, against a rate for each?",
                   METRIC, lost, best.better(lost, "something", "it gains")),
        ]  # fmt: skip
    if ranks and "full" in have:
        ratio = best.above(frame, ranks, "full")
        verdict = best.within(ratio, 1.0, bool(set(ends) & {*ranks, "full"}))
        found.append(Answer("Is LoRA's best rate about 10 times full fine-tuning's?",
                            "decades above", ratio, verdict, note))  # fmt: skip
    attention, mlp = (f"{n} r={r}" for n, r in zip(("attention", "mlp"), scale.equal, strict=True))
    high = f"r={scale.high}"
    pairs = (
        (
            mlp,
            attention,
            f"Do MLP targets beat attention at equal parameters ({mlp}, {attention})?",
        ),
        (f"rsLoRA {high}", high, f"Does rsLoRA help at a high rank ({high}, alpha {ALPHA:g})?"),
    )
    for one, other, question in pairs:
        if {one, other} <= have:
            gap = best.gap(frame, one, other)
            found.append(Answer(question, METRIC, gap, best.better(gap, "yes", "no")))
    return found


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
    have = set(frame["arm"])
    lines += [_line(frame, arm) for arm in arms(scale) if arm.name in have]
    notes = dict.fromkeys(a.note for a in found if a.note)
    if missing := [arm.name for arm in arms(scale) if arm.name not in have]:
        notes[f"Not measured yet: {', '.join(missing)}."] = None
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
    parser.add_argument("--sweeps", default="", help="full, ranks, targets, rslora; default: all")
    parser.add_argument("--known", type=Path, help="an earlier rank_alpha_lr.csv")
    parser.add_argument("--mode", default="auto", choices=("auto", "packed", "serial"))
    return parser.parse_args()


def main() -> None:
    host.keep_memory()
    options = arguments()
    scale = SCALES[options.scale]
    workdir = options.workdir / options.scale
    known = None if options.known is None else pd.read_csv(options.known)
    sweeps = [name for name in options.sweeps.split(",") if name]
    if odd := set(sweeps) - {arm.sweep for arm in arms(scale)}:
        raise SystemExit(f"--sweeps: there is no {', '.join(sorted(odd))}")
    frame = measure(
        scale, workdir, configured(scale), METRIC,
        mode=options.mode, sweeps=sweeps, known=known,
    )  # fmt: skip
    print(write(frame, scale, options.scale, options.out or workdir))


if __name__ == "__main__":
    main()
