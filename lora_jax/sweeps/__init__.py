"""Sweeps: a grid of members, packed into few compiled programs; searches for a threshold.

Each name is imported on first use.
"""

from __future__ import annotations

from typing import Any

from lora_jax import lazy

_HOMES = {
    "Sweep": "sweep",
    "Options": "sweep",
    "Smallest": "smallest",
    "Ladder": "ladder",
    "Run": "threshold",
    "Target": "threshold",
    "Threshold": "threshold",
    "curve": "threshold",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
