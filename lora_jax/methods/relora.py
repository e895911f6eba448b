"""ReLoRA: high-rank training by low-rank updates in turn (Lialin et al. 2023, arXiv:2307.05695)."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base
from lora_jax.methods.lora import LoRA
from lora_jax.methods.periodic import where_due
from lora_jax.tensors.base import densify, wide
from lora_jax.tensors.summed import Summed


class RestartState(NamedTuple):
    """The state of the wrapped optimizer.

    Attributes:
      updates: int32, number of updates done.
      inner: of the optimizer itself, over what is trained: not over the merged updates.
    """

    updates: jax.Array
    inner: Any


@base.register("relora")
@dataclasses.dataclass(frozen=True)
class ReLoRA(LoRA):
    """LoRA whose A·B is merged every `every` updates, and begun anew (algorithm 1).

    Frozen weights are never changed here. What is merged adds up in a dense float32 array Δ of
    each target, which is kept in the trainable tree as "delta" but not trained: h = x·(W0 + Δ) +
    s·x·A·B. It costs 4 bytes a targeted weight, once (no moments, no gradient), in the state, in
    its checkpoints and in the adapter's file, which only has a form of our own.

    Args:
      every: updates between merges.
      warmup: updates over which the learning rate rises again after a merge.
      prune: share of each moment's smallest entries that a merge sets to zero; 1: all (section 3
        of the paper: 0.999 by magnitude).
    """

    trains: ClassVar[str] = "A and B, merged and begun anew"
    numeric: ClassVar[tuple[str, ...]] = ("alpha", "scaling", "dropout")
    padding_exact: ClassVar[bool] = False  # the factors are drawn again for their own ranks

    every: int = 1000
    warmup: int = 50
    prune: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1 or not 0 <= self.warmup < self.every or not 0 <= self.prune <= 1:
            raise UserError(
                f"ReLoRA needs every={self.every} above warmup={self.warmup}, and prune="
                f"{self.prune} in [0, 1]"
            )

    def init(self, key: jax.Array, params: Any) -> base.Trainable:
        trainable, flat = super().init(key, params), partition.flatten(params)
        for path in self.ranks(params):
            delta = jnp.zeros(flat[path].shape, jnp.float32)
            trainable[path] = {**trainable[path], "delta": delta}
        return trainable

    def _weights(
        self, params: Any, trainable: base.Trainable, key: Any, numbers: Mapping[str, Any]
    ) -> Any:
        tree = super()._weights(params, trainable, key, numbers)
        flat, new = partition.flatten(tree), {}
        for path in numbers["scale"]:
            delta = jax.lax.stop_gradient(trainable[path]["delta"])
            leaf = flat[path]
            new[path] = dataclasses.replace(leaf, w=Summed(leaf.w, delta, path))
        return partition.replace(tree, new)

    def merge(self, params: Any, trainable: base.Trainable) -> Any:
        """W + Δ + s·A·B, rounded once to W's dtype."""
        flat, new = partition.flatten(params), {}
        for path, scale in self.scales(params).items():
            value = trainable[path]
            leaf = self._weight(path, flat[path], value, scale)
            w = densify(leaf.w)
            new[path] = (w.astype(wide(w.dtype)) + value["delta"] + leaf.delta()).astype(w.dtype)
        whole = {p: v for p, v in trainable.items() if p not in new}
        return densify(partition.combine(params, {**new, **whole}))

    def unmerge(self, merged: Any, trainable: base.Trainable) -> Any:
        """Takes Δ + s·A·B off again; leaves trained whole stay as they are in `merged`."""
        minus = {
            p: {"a": v["a"], "b": -v["b"], "delta": -v["delta"]} if "delta" in v else v
            for p, v in trainable.items()
            if isinstance(v, Mapping)
        }
        return self.merge(merged, minus)

    def wrap_optimizer(self, tx: Any) -> Any:
        """`tx` on all but Δ, with a rate that rises from 0 again after each merge."""

        def init(params: Any) -> RestartState:
            return RestartState(jnp.zeros((), jnp.int32), tx.init(_trained(params)))

        def update(updates: Any, state: RestartState, params: Any = None) -> tuple[Any, Any]:
            own = None if params is None else _trained(params)
            new, inner = tx.update(_trained(updates), state.inner, own)
            since = state.updates % self.every
            rises = (state.updates >= self.every) & (since < self.warmup)
            factor = jnp.where(rises, (since + 1) / (self.warmup + 1), 1.0)
            new = jax.tree.map(lambda u: u * factor.astype(u.dtype), new)
            for path, value in updates.items():
                if _has_delta(value):
                    new[path] = {**new[path], "delta": jnp.zeros_like(value["delta"])}
            return new, RestartState(state.updates + 1, inner)

        return optax.GradientTransformation(init, update)

    def after_update(self, state: Any) -> Any:
        """Every `every` updates: Δ += s·A·B, A drawn anew, B zero, most of the moments zero."""
        merges = state.step % self.every == 0
        changed = (state.trainable, state.opt_state)
        given = (state.step, state.keys, state.numbers)
        trainable, opt_state = where_due(merges, self._restart, changed, *given)
        return state.replace(trainable=trainable, opt_state=opt_state)

    def _restart(self, changed: Any, step: Any, keys: Any, numbers: Any) -> Any:
        """(trainable, opt_state) after a merge."""
        before, moments = changed
        stream = jax.random.fold_in(keys["dropout"], zlib.crc32(b"relora"))
        key = jax.random.fold_in(stream, step)
        # The trainable tree has the paths and shapes that targets and ranks are found by, but none
        # of leaves of rank 0.
        shapes = {p: v["delta"] if _has_delta(v) else v for p, v in before.items()}
        trainable = dict(before)
        for path, ranks in self._ranks_of(shapes).items():
            value, scale = trainable[path], numbers["scale"][path]
            update = self._weight(path, value["delta"], value, scale).delta()
            fresh = self._factors(key, path, value["delta"], ranks)
            trainable[path] = {**fresh, "delta": value["delta"] + update}
        factors = {p for p, v in trainable.items() if _has_delta(v)}
        opt_state = jax.tree_util.tree_map_with_path(
            lambda path, x: self._pruned(path, x) if _is_moment(path, factors) else x,
            moments,
        )
        return trainable, opt_state

    def _pruned(self, path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        if self.prune == 1.0:
            return jnp.zeros_like(x)
        # Each layer by itself, however the stack is cut, as where layers are tensors of their own.
        axes = tuple(range(partition.stack_of(path[-2].key) is not None, x.ndim))
        size = jnp.abs(x)
        least = jnp.quantile(size, self.prune, axis=axes, keepdims=True)
        return jnp.where(size > least, x, jnp.zeros_like(x))


def _has_delta(value: Any) -> bool:
    return isinstance(value, Mapping) and "delta" in value


def _trained(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree shaped like the trainable one, without Δ."""
    return {
        p: {k: x for k, x in v.items() if k != "delta"} if _has_delta(v) else v
        for p, v in tree.items()
    }


def _is_moment(path: tuple[Any, ...], factors: set[str]) -> bool:
    """Whether a path of the optimizer's state ends like that of a factor: (…, leaf path, "a")."""
    names = [getattr(part, "key", None) for part in path[-2:]]
    return len(names) == 2 and names[0] in factors and names[1] in ("a", "b")
