"""Inside an adapter: what each matrix's update is, as DataFrames, plots and the `analyze` command.

    updates = inside.open_updates("runs/q")          # or an adapter folder, PEFT's or ours
    frame = inside.matrices(updates)                 # a row a layer and module
    frame = inside.adapter(method, trainable, params)  # the same, of what is in memory
    frame = inside.compare(updates, inside.open_updates("runs/other_seed"))

The numbers themselves are in `lora_jax.analysis`. pandas and matplotlib load on first use.
"""

from __future__ import annotations

from typing import Any

from lora_jax import lazy

_HOME = {
    "Update": "update",
    "updates": "of_method",
    "open_updates": "opening",
    "adapter": "frames",
    "layer_map": "frames",
    "matrices": "frames",
    "spectra": "frames",
    "compare": "comparing",
    "similarity": "comparing",
    "similarity_to_base": "comparing",
    "Options": "report",
    "analyze": "report",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
