"""Plans: what a training step would cost, from the compiler, before it is run.

`plan_config(experiment)` is behind `lora-jax plan`; `plan_step` is for parts of your own, and
`measure` for any function: FLOPs and bytes of a call, from shapes.
"""

from __future__ import annotations

from typing import Any

from lora_jax import lazy

_HOME = {
    "Cost": "cost",
    "measure": "cost",
    "device_bytes": "cost",
    "device_memory": "devices",
    "mesh_for": "devices",
    "parse_memory": "devices",
    "topology_devices": "devices",
    "Flops": "flops",
    "count_flops": "flops",
    "Plan": "plan",
    "plan_step": "plan",
    "Sketch": "sketch",
    "plan_config": "sketch",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
