"""GaLore: full training with gradients in a low-rank subspace (Zhao et al. 2024, 2403.03507)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base
from lora_jax.methods.full import FullFineTuning
from lora_jax.methods.periodic import where_due


class GaLoreState(NamedTuple):
    """The state of the wrapped optimizer.

    Attributes:
      updates: int32, number of updates done.
      projections: P by leaf path: [*batch, in, r] or, where out is smaller, [*batch, out, r].
      inner: of the optimizer itself; a projected matrix's moments are [*batch, r, out] or
        [*batch, in, r].
    """

    updates: jax.Array
    projections: dict[str, jax.Array]
    inner: Any


@base.register("galore")
@dataclasses.dataclass(frozen=True)
class GaLore(FullFineTuning):
    """Wₜ₊₁ = Wₜ + scale·P·ρ(Pᵀ·G), with the optimizer ρ's moments in P's subspace (eq. 11).

    P are the r first singular vectors of a gradient, on the shorter side of the matrix, and are
    computed anew every `every` updates; moments are kept as they are then (section 4.1). Weight
    decay acts on the whole weight. Gradients themselves have their full size.

    Args:
      train: regexes of the leaves that are trained, as in full fine-tuning.
      targets: regex(es) of those whose gradients are projected: matrices with both sides above
        the rank; the others are trained as they are.
      rank: r.
      every: updates between new projections, T in the paper.
      scale: α in the paper, on the projected leaves' updates.
    """

    trains: ClassVar[str] = "every leaf, or those named; moments in a subspace"
    numeric: ClassVar[tuple[str, ...]] = ()

    targets: str | tuple[str, ...] = r"(attention|mlp)/.*/kernel$"
    rank: int = 128
    every: int = 200
    scale: float = 0.25

    def __post_init__(self) -> None:
        if self.rank < 1 or self.every < 1:
            raise UserError(f"GaLore needs rank={self.rank} and every={self.every} at least 1")

    def arrange(self, params: Any) -> Any:
        """Cuts stacks where the layers that are projected, or trained, begin and end."""
        return base.cut_between(params, self.train, partition.listed(self.targets))

    def projected(self, tree: Mapping[str, Any]) -> list[str]:
        """The paths of the leaves that are projected, of a trainable tree."""
        patterns = partition.listed(self.targets)
        every = [e for p in tree for e in partition.expand(p)]
        partition.check_patterns(patterns, every, "targets")
        found = []
        for path, x in tree.items():
            stacked = partition.stack_of(path) is not None
            layers = partition.expand(path)
            hits = [any(partition.matches(p, e) for p in patterns) for e in layers]
            if any(hits) and not all(hits):
                raise UserError(
                    f"targets: {path!r} is one stack, whose layers are all projected or none: "
                    "match them all, or cut it first: params = method.arrange(params)"
                )
            if all(hits) and x.ndim - stacked == 2 and min(x.shape[-2:]) > self.rank:
                found.append(path)
        return found

    def wrap_optimizer(self, tx: Any) -> Any:
        """`tx` on the projected gradients."""

        def init(params: Any) -> GaLoreState:
            p = {
                path: jnp.zeros((*params[path].shape[:-2], min(params[path].shape[-2:]), self.rank))
                for path in self.projected(params)
            }
            inner = tx.init(_map(params, p, down))
            return GaLoreState(jnp.zeros((), jnp.int32), p, inner)

        def update(grads: Any, state: GaLoreState, params: Any = None) -> tuple[Any, GaLoreState]:
            if params is None:
                raise UserError("GaLore needs the parameters: tx.update(grads, state, params)")
            p = where_due(
                state.updates % self.every == 0,
                lambda old, g: {path: self._projection(g[path]) for path in old},
                state.projections, {path: grads[path] for path in state.projections},
            )  # fmt: skip
            small = _map(grads, p, down)
            # Decoupled decay adds a multiple of the weights to the update. Weights of zero show
            # the update without it, weights of one the multiple, which then goes to all of W.
            plain, inner = tx.update(small, state.inner, _filled(params, small, p, 0.0))
            decayed, _ = tx.update(small, state.inner, _filled(params, small, p, 1.0))
            updates = dict(plain)
            for path, own in p.items():
                multiple = jnp.mean(decayed[path] - plain[path], axis=(-2, -1), keepdims=True)
                updates[path] = self.scale * up(plain[path], own, params[path]) + (
                    multiple * params[path]
                )
            return updates, GaLoreState(state.updates + 1, p, inner)

        return optax.GradientTransformation(init, update)

    def _projection(self, gradient: jax.Array) -> jax.Array:
        u, _, vt = jnp.linalg.svd(gradient.astype(jnp.float32), full_matrices=False)
        if gradient.shape[-2] <= gradient.shape[-1]:
            return u[..., : self.rank]
        return jnp.swapaxes(vt, -1, -2)[..., : self.rank]


def down(x: jax.Array, p: jax.Array) -> jax.Array:
    """Pᵀ·X, or X·P where P is of X's columns."""
    if x.shape[-2] <= x.shape[-1]:
        return jnp.swapaxes(p, -1, -2).astype(x.dtype) @ x
    return x @ p.astype(x.dtype)


def up(x: jax.Array, p: jax.Array, like: jax.Array) -> jax.Array:
    """Back from what `down` gave: P·X, or X·Pᵀ, of the shape of `like`."""
    if like.shape[-2] <= like.shape[-1]:
        return p.astype(x.dtype) @ x
    return x @ jnp.swapaxes(p, -1, -2).astype(x.dtype)


def _map(tree: Mapping[str, Any], p: Mapping[str, Any], f: Any) -> dict[str, Any]:
    return {path: f(x, p[path]) if path in p else x for path, x in tree.items()}


def _filled(
    params: Mapping[str, Any], small: Mapping[str, Any], p: Mapping[str, Any], value: float
) -> dict[str, Any]:
    """Parameters in which the projected leaves are all `value`."""
    return {
        path: jnp.full_like(small[path], value) if path in p else x for path, x in params.items()
    }
