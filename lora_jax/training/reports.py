"""Where a run's numbers go: metrics.jsonl, spectra.jsonl, TensorBoard events, and the terminal.

Both files hold a JSON object with its "step" a line, appended as they come.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from lora_jax.atomic import write_text
from lora_jax.progress import drawable
from lora_jax.training.spectra import Row, summary

METRICS_FILE = "metrics.jsonl"
SPECTRA_FILE = "spectra.jsonl"


class Reporter:
    """Writes logs of a run; a context manager.

    Args:
        workdir: gets the files and TensorBoard events; None writes nothing.
        start: steps done already. Lines of later steps, left by a run that was killed after its
            last checkpoint, are removed.
        steps: of the whole run, for the time left.
        progress: show loss, tokens a second and time left on the terminal.
    """

    def __init__(
        self, workdir: str | Path | None, *, start: int, steps: int, progress: bool
    ) -> None:
        self._directory = None if workdir is None else Path(workdir)
        self._file: Any = None
        self._board: Any = None
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, SPECTRA_FILE):
                truncate_metrics(self._directory / name, start)
            self._file = (self._directory / METRICS_FILE).open("a", encoding="utf-8")
            # purge_step hides the events of steps that will be done again.
            self._board = _board_writer()(
                str(self._directory / "tensorboard"), purge_step=start + 1
            )
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            disable=not drawable(progress),
        )
        self._task = self._progress.add_task("train", total=steps, completed=start, note="")

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line {"step": …, name: value, …}; flushed, so that a killed run has its log."""
        if "loss" in values:
            note = f"loss {values['loss']:.4f}"
            if "tokens_per_second" in values:
                note += f"  {values['tokens_per_second']:,.0f} tokens/s"
            self._progress.update(self._task, note=note)
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def log_spectra(self, step: int, rows: Sequence[Row]) -> None:
        """`spectra.rows` as a line {"step": …, "matrices": […]}, and their summary as metrics.

        Nothing where there are none.
        """
        if not rows:
            return
        self.log(step, summary(rows))
        if self._directory is not None:
            line = json.dumps({"step": step, "matrices": rows}) + "\n"
            with (self._directory / SPECTRA_FILE).open("a", encoding="utf-8") as file:
                file.write(line)

    def __exit__(self, *exception: Any) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()
            self._board.close()


def _board_writer() -> Any:
    """tensorboardX's SummaryWriter. Importing it imports torch where that is installed, which takes
    seconds; it does without, and nothing here gives it a tensor."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # "not installed", says the import
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


def line_of(rows: Sequence[Mapping[str, float]], tokens: int, seconds: float) -> dict[str, float]:
    """One line for the metrics of some steps, in order: the last's, with the loss averaged.

    Args:
        rows: of `step_function`, on the host; the loss is weighted by their targets.
        tokens: real tokens in those steps; 0, if not known, gives no speed.
        seconds: that they took.
    """
    weights = np.array([row["tokens"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    line = {k: v for k, v in rows[-1].items() if k not in ("finite", "penalty")}
    if any(row.get("penalty") for row in rows):
        line["penalty"] = rows[-1]["penalty"]
    line["loss"] = float((losses * weights).sum() / max(weights.sum(), 1e-9))
    line["tokens"] = float(weights.sum())
    if tokens:
        line["tokens_per_second"] = tokens / max(seconds, 1e-9)
    return line


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of one of the files; a last line that a kill cut short is left out."""
    rows = []
    text = Path(path).read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return rows


def truncate_metrics(path: str | Path, step: int) -> None:
    """Removes the lines of steps after `step`; a missing file is left missing."""
    path = Path(path)
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
