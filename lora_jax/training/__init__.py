"""Training: meshes, loss, optimizer, step, loop, checkpoints, decoding.

Checkpoints (orbax) and the loop (rich, tensorboardX) load when they are first used.
"""

from __future__ import annotations

from typing import Any

from lora_jax import lazy

_HOME = {
    "MeshConfig": "mesh",
    "make_mesh": "mesh",
    "shardings": "mesh",
    "load_shardings": "mesh",
    "less_cut": "mesh",
    "trainable_shardings": "mesh",
    "place_batch": "mesh",
    "chunked_loss": "loss",
    "classification_loss": "loss",
    "regression_loss": "loss",
    "OptimizerConfig": "optimizer",
    "make_optimizer": "optimizer",
    "hyperparams": "optimizer",
    "with_hyperparams": "optimizer",
    "State": "step",
    "init_state": "step",
    "make_step": "step",
    "step_function": "step",
    "state_shardings": "step",
    "shardings_of": "step",
    "stream": "step",
    "Checkpoints": "checkpoints",
    "FitResult": "loop",
    "Interrupted": "loop",
    "Terminated": "loop",
    "fit": "loop",
    "generate": "decoding",
    "decode": "decoding",
    "Sampling": "sampling",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
