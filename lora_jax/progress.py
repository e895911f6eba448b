"""Whether progress bars can be drawn where this runs."""

from __future__ import annotations

import functools
import importlib.util

from rich import get_console


def drawable(wanted: bool) -> bool:
    """`wanted`, but not in a notebook without ipywidgets: rich would warn there at each redraw."""
    return wanted and _possible()


@functools.cache
def _possible() -> bool:
    if not get_console().is_jupyter or importlib.util.find_spec("ipywidgets") is not None:
        return True
    print("pip install ipywidgets to see progress bars in notebooks")
    return False
