"""The exception for mistakes a user can mend, whose message says how, and that for a stop."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Bad input: the message names what is wrong and what to do. The CLI prints it in one line."""


class Interrupted(SystemExit):
    """The run got SIGTERM or Ctrl-C, saved and stopped. Uncaught, the process ends with a shell's
    status for that signal: 143 or 130."""

    def __init__(self, step: int, where: Path | None, number: int = signal.SIGTERM):
        super().__init__(128 + number)
        self.step = step
        self.where = where

    def __str__(self) -> str:
        saved = f"saved in {self.where}" if self.where else "not saved: no checkpoints were asked"
        return f"interrupted after step {self.step}; {saved}"


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """A clause naming the known words closest to `word`, for the end of an error message."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=n, cutoff=0.4)
    if close:
        return f"did you mean {', '.join(close)}?"
    shown = ", ".join(sorted(known)[:12])
    return f"known: {shown}{', …' if len(known) > 12 else ''}" if known else "none are known"
