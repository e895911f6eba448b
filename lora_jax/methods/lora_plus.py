"""LoRA+: a larger learning rate for B than for A (Hayou et al. 2024, arXiv:2402.12354)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base
from lora_jax.methods.lora import LoRA


class RatioState(NamedTuple):
    """The state of an optimizer whose updates are multiplied.

    Attributes:
      ratio: float32 scalar; an array, so that members of a sweep may differ in it.
      inner: of the optimizer itself.
    """

    ratio: jax.Array
    inner: Any


def scale_updates(
    tx: Any, ratio: float, chosen: Callable[[tuple[Any, ...]], bool]
) -> optax.GradientTransformation:
    """`tx`, with the updates of the leaves whose tree paths are `chosen` multiplied by `ratio`.

    What is multiplied is the whole update, so that it is a ratio of learning rates for decoupled
    weight decay too.
    """

    def init(params: Any) -> RatioState:
        return RatioState(jnp.asarray(ratio, jnp.float32), tx.init(params))

    def update(updates: Any, state: RatioState, params: Any = None) -> tuple[Any, RatioState]:
        updates, inner = tx.update(updates, state.inner, params)

        def scaled(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            return x * state.ratio.astype(x.dtype) if chosen(path) else x

        return jax.tree_util.tree_map_with_path(scaled, updates), RatioState(state.ratio, inner)

    return optax.GradientTransformation(init, update)


@base.register("lora_plus", peft={"peft_type": "LORA"})
@dataclasses.dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA, with `lr_ratio` times the learning rate for B (section 5 of the paper).

    The paper argues for a ratio far above 1 (about 16 where A is random and B is zero); the
    learning rate itself is then A's. Factors of embeddings keep it, and so do leaves trained whole;
    the paper's code gives embeddings a rate of their own (1e-6), and vectors that of B. Its file is
    an ordinary LoRA.
    """

    trains: ClassVar[str] = "A and B, B at a higher rate"
    numeric: ClassVar[tuple[str, ...]] = (*LoRA.numeric, "lr_ratio")

    lr_ratio: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_ratio <= 0:
            raise UserError(f"lr_ratio must be above 0, not {self.lr_ratio}")

    def wrap_optimizer(self, tx: Any) -> Any:
        return scale_updates(tx, self.lr_ratio, _is_b)


def _is_b(path: tuple[Any, ...]) -> bool:
    """Whether a path of the trainable tree is that of a matrix's second factor."""
    names = [str(getattr(part, "key", part)) for part in path]
    return names[1:] == ["b"] and not partition.is_embedding(names[0])
