"""AdaLoRA: a budget of ranks, spent where they matter (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.errors import UserError
from lora_jax.methods import base, peft
from lora_jax.methods.lora import LoRA
from lora_jax.methods.peft import adalora_files
from lora_jax.methods.structured import Structured
from lora_jax.tensors.low_rank import LowRank


class BudgetState(NamedTuple):
    """The state of the wrapped optimizer. Trees are of the adapted targets alone, by leaf path.

    Attributes:
      updates: int32, number of updates done.
      sensitivity, uncertainty: averages of |w·∂L/∂w| and of its deviation, for every entry.
      kept: float32 [*batch, r], 1 for the triplets that the last allocation kept.
      inner: of the optimizer itself.
    """

    updates: jax.Array
    sensitivity: Any
    uncertainty: Any
    kept: Any
    inner: Any


@base.register("adalora", peft={"peft_type": "ADALORA"})
@dataclasses.dataclass(frozen=True)
class AdaLoRA(Structured):
    """h = x·W0 + s·x·A·diag(e)·B, s = alpha/rank, with singular values e that may be pruned.

    A and B are Gaussian and e zero, so the model is unchanged at the start; a penalty keeps A and
    B near orthogonal (eq. 4). A triplet's importance is that of its entries, smoothed (eq. 8 to
    12). Every `every` updates the least important triplets' values are set to zero so that the
    budget is met; it falls with a cubic from `rank` to `target_rank` a matrix (eq. 13).

    Args:
      rank: at the start, r.
      target_rank: ranks a matrix at the end, on average; where `rank` is not above it, nothing is
        pruned.
      total_steps: updates of the run; 0: what `scheduled` is told.
      initial_steps: updates before the budget begins to fall.
      final_steps: updates with the final budget and a mask that no longer changes.
      every: updates between allocations.
      beta1, beta2: smoothing of sensitivity and uncertainty.
      orthogonality: weight of the penalty, the mean over all A and B of ‖AᵀA − I‖ (as in the
        authors' code and PEFT; eq. 4 has squares).
    """

    trains: ClassVar[str] = "A, B and singular values, pruned to a budget"
    numeric: ClassVar[tuple[str, ...]] = ("alpha", "dropout")
    # Matrices and triplets are counted and ranked across the model: packs do not mix shapes.
    padding_exact: ClassVar[bool] = False

    rank: Any = 12
    target_rank: int = 8
    total_steps: int = 0
    initial_steps: int = 0
    final_steps: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling != "standard":
            raise UserError("AdaLoRA scales by alpha/rank: leave out scaling")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise UserError("beta1 and beta2 must be in (0, 1)")
        if self.every < 1 or self.target_rank < 1:
            raise UserError(
                f"AdaLoRA needs every={self.every} and target_rank={self.target_rank} at least 1"
            )

    def scheduled(self, steps: int) -> AdaLoRA:
        return self if self.total_steps else dataclasses.replace(self, total_steps=steps)

    def _drawn(self, key: jax.Array, layer: str, leaf: Any, r: int, widest: int) -> dict[str, Any]:
        n_in, n_out = leaf.shape[-2:]
        return {
            "a": self._gaussian(key, f"{layer}/a", n_in, r, widest).T,
            "e": jnp.zeros(widest),
            "b": self._gaussian(key, f"{layer}/b", n_out, r, widest),
        }

    def _gaussian(self, key: jax.Array, name: str, size: int, r: int, widest: int) -> jax.Array:
        """[widest, size]: r rows of N(0, 0.02²), then zeros; row j depends on (name, j) alone."""
        keys = jax.random.fold_in(key, zlib.crc32(name.encode()))
        rows = jax.vmap(lambda j: jax.random.normal(jax.random.fold_in(keys, j), (size,)))
        return jnp.where((jnp.arange(widest) < r)[:, None], 0.02 * rows(jnp.arange(widest)), 0.0)

    def _adapted(self, leaf: LowRank, value: Any, numbers: Mapping[str, Any]) -> LowRank:
        return dataclasses.replace(leaf, a=value["a"], b=value["e"][..., :, None] * value["b"])

    def _parameters(self, path: str, leaf: Any, ranks: list[int]) -> int:
        return super()._parameters(path, leaf, ranks) + sum(ranks)

    def penalty(self, trainable: base.Trainable) -> jax.Array | float:
        """The mean of ‖AᵀA − I‖ and ‖B·Bᵀ − I‖ over all layers, times `orthogonality`."""
        total, matrices = jnp.zeros(()), jnp.zeros(())
        for value in targets_of(trainable).values():
            grams = (
                jnp.einsum("...ir,...is->...rs", value["a"], value["a"]),
                jnp.einsum("...ro,...so->...rs", value["b"], value["b"]),
            )
            for gram in grams:
                # A padded column has no length, and is no part of I.
                live = (jnp.diagonal(gram, axis1=-2, axis2=-1) > 0).astype(gram.dtype)
                eye = jnp.eye(gram.shape[-1]).reshape((1,) * (gram.ndim - 2) + gram.shape[-2:])
                square = jnp.sum((gram - live[..., None] * eye) ** 2, axis=(-2, -1))
                positive = square > 0
                norms = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
                total += jnp.sum(norms)
                matrices += jnp.sum(jnp.any(live > 0, axis=-1))
        return self.orthogonality * total / jnp.maximum(matrices, 1.0)

    def wrap_optimizer(self, tx: Any) -> Any:
        """`tx`, with the averages that importance is made of in its state."""
        if self.total_steps - self.final_steps <= self.initial_steps:
            raise UserError(
                f"AdaLoRA with total_steps={self.total_steps}, initial_steps="
                f"{self.initial_steps}, final_steps={self.final_steps} has no steps left for its "
                "budget: set method.total_steps to the run's steps, above the other two together"
            )

        def init(params: Any) -> BudgetState:
            own = targets_of(params)
            zeros = jax.tree.map(jnp.zeros_like, own)
            kept = {p: jnp.ones(v["e"].shape) for p, v in own.items()}
            return BudgetState(
                jnp.zeros((), jnp.int32),
                zeros,
                jax.tree.map(jnp.copy, zeros),
                kept,
                tx.init(params),
            )

        def update(grads: Any, state: BudgetState, params: Any = None) -> tuple[Any, BudgetState]:
            if params is None:
                raise UserError("AdaLoRA needs the parameters: tx.update(grads, state, params)")
            updates, inner = tx.update(grads, state.inner, params)
            t = state.updates + 1
            own = (targets_of(x) for x in (grads, params, updates))
            # As the authors' code: the gradient of this step, the values after it.
            seen = jax.tree.map(lambda g, p, u: jnp.abs(g * (p + u)), *own)
            b1, b2 = self.beta1, self.beta2
            mean = jax.tree.map(lambda m, x: b1 * m + (1 - b1) * x, state.sensitivity, seen)
            off = jax.tree.map(
                lambda v, x, m: b2 * v + (1 - b2) * jnp.abs(x - m), state.uncertainty, seen, mean
            )
            grows = t < self.total_steps - self.final_steps
            old = (state.sensitivity, state.uncertainty)
            mean, off = jax.tree.map(lambda a, b: jnp.where(grows, a, b), (mean, off), old)
            return updates, BudgetState(t, mean, off, state.kept, inner)

        return optax.GradientTransformation(init, update)

    def budget(self, t: jax.Array, triplets: jax.Array, matrices: jax.Array) -> jax.Array:
        """Triplets to keep after update t of `triplets` in `matrices`, int32 (eq. 13)."""
        last = self.total_steps - self.final_steps
        target = jnp.minimum(self.target_rank * matrices, triplets)
        left = 1.0 - (t - self.initial_steps) / (last - self.initial_steps)
        left = jnp.clip(left, 0.0, 1.0)
        # The nudge keeps what is whole in exact arithmetic from falling below itself.
        return jnp.floor((triplets - target) * left**3 + target + 1e-4).astype(jnp.int32)

    def after_update(self, state: Any) -> Any:
        """Sets the singular values of the least important triplets to zero."""
        ada: BudgetState = state.opt_state
        own = targets_of(state.trainable)
        t, last = ada.updates, self.total_steps - self.final_steps
        allocates = (t > self.initial_steps) & (t <= last) & ((t % self.every == 0) | (t == last))
        live = {p: jnp.any(v["a"] != 0, axis=-2) for p, v in own.items()}
        scores = {p: _importance(ada, p) for p in own}
        every = jnp.concatenate([jnp.where(live[p], scores[p], jnp.inf).reshape(-1) for p in own])
        triplets = sum((jnp.sum(x) for x in live.values()), jnp.zeros((), jnp.int32))
        matrices = sum(
            (jnp.sum(jnp.any(x, axis=-1)) for x in live.values()), jnp.zeros((), jnp.int32)
        )
        drop = triplets - self.budget(t, triplets, matrices)
        threshold = jnp.sort(every)[jnp.maximum(drop - 1, 0)]
        kept, trainable = {}, dict(state.trainable)
        for path, value in own.items():
            chosen = (scores[path] > threshold) | (drop <= 0)
            kept[path] = jnp.where(allocates, chosen.astype(jnp.float32), ada.kept[path])
            masked = allocates | (t > last)
            e = jnp.where(masked & (kept[path] == 0), 0.0, value["e"])
            trainable[path] = {**value, "e": e}
        return state.replace(trainable=trainable, opt_state=ada._replace(kept=kept))

    def to_peft(
        self, trainable: base.Trainable, names: peft.ModelNames, params: Any
    ) -> peft.AdapterFiles:
        return adalora_files.write(self, trainable, names, params)

    @classmethod
    def from_peft(
        cls,
        files: peft.AdapterFiles,
        names: peft.ModelNames,
        params: Any,
        saved: base.Method | None = None,
    ) -> tuple[LoRA, base.Trainable]:
        return adalora_files.read(cls, files, names, params, saved)


def targets_of(trainable: Mapping[str, Any]) -> dict[str, Any]:
    """What of a trainable tree (or of one shaped like it) is adapted: what has singular values."""
    return {p: v for p, v in trainable.items() if isinstance(v, Mapping) and "e" in v}


def _importance(state: BudgetState, path: str) -> jax.Array:
    """[*batch, r]: that of the singular value, plus the means over its two vectors (eq. 8)."""
    score = jax.tree.map(jnp.multiply, state.sensitivity[path], state.uncertainty[path])
    return score["e"] + jnp.mean(score["a"], axis=-2) + jnp.mean(score["b"], axis=-1)
