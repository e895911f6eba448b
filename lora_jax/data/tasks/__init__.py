"""Tasks: what a record is to a model. Found by looking: a module here that sets ``TASK`` adds one.

A task is a frozen dataclass with the protocol of `lora_jax.data.examples.Task`; configs name it by
its module's name.
"""

from __future__ import annotations

import importlib
import pkgutil

from lora_jax.data.examples import (
    EncoderExample,
    Example,
    ImageExample,
    LanguageTask,
    Record,
    Task,
)


def _discover() -> dict[str, type[Task]]:
    found: dict[str, type[Task]] = {}
    for info in pkgutil.iter_modules(__path__):
        task = getattr(importlib.import_module(f"{__name__}.{info.name}"), "TASK", None)
        if task is not None:
            found[info.name] = task
    return found


TASKS: dict[str, type[Task]] = _discover()
"""Name in a config -> class of the task."""

__all__ = ["TASKS", "EncoderExample", "Example", "ImageExample", "LanguageTask", "Record", "Task"]
