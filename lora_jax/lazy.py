"""Names of a package that load on first use (PEP 562), so that an import costs what it uses."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def load(package: str, homes: Mapping[str, str], name: str) -> Any:
    """`package`'s `name` from its home module; AttributeError where it has none."""
    if name in homes:
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
