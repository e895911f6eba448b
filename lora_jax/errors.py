"""The one exception for mistakes a user can mend; its message says how."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message names what is wrong and what to do. The CLI prints it in one line."""


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """A clause naming the known words closest to `word`, for the end of an error message."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=n, cutoff=0.4)
    if close:
        return f"did you mean {', '.join(close)}?"
    shown = ", ".join(sorted(known)[:12])
    return f"known: {shown}{', …' if len(known) > 12 else ''}" if known else "none are known"
