"""The updates of all matrices that a method changed, whatever the method."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.inside.update import Update, live_columns, placed
from lora_jax.tensors.base import densify, is_weight
from lora_jax.tensors.low_rank import LowRank
from lora_jax.tensors.updates import factors_of, low_rank_parts

_log = logging.getLogger(__name__)
Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Reader = Callable[[str], np.ndarray]


def updates(
    method: Any,
    trainable: Mapping[str, Any],
    params: Any,
    *,
    dense: bool = False,
    modules: str | None = None,
) -> list[Update]:
    """The updates of every matrix that the method changed, in the order of the parameters.

    Whatever a method calls itself: a leaf that it makes W + s·A·B, or something that multiplies
    out to that (LoRA and its kin, AdaLoRA, VeRA, LoHa, PiSSA and others with their start taken
    off), is analysed through its factors. Vectors (biases, norms) are no matrices and left out.

    Args:
      method, trainable: as from `load_adapter` or training.
      params: the base's parameters, with no leaf taken out.
      dense: also take updates that are not low-rank (DoRA, LoKr, IA3, ReLoRA, leaves trained
        whole), as the difference of two matrices: decompositions as large as the weights.
      modules: a regex of the modules to take, searched in `layers/3/attention/query`.

    Raises:
      UserError: nothing low-rank in it, and no `dense`; no matrix changed; a hole in `params`.
    """
    base = _float32(params) if dense else params
    old, changed = _changed(method, trainable, base)
    low = {p: parts for p, x in changed.items() if (parts := low_rank_parts(x, old[p]))}
    other = [p for p in changed if p not in low]
    odd = [p for p in other if is_weight(changed[p])] or ([] if low else other)
    if odd and not dense:
        raise UserError(
            f"{method.name!r} changes {odd[0]!r} by more than a product of two factors. Ask for "
            "differences of whole matrices: dense=True, on the command line --dense"
        )
    if other and not dense:
        _log.warning("left out, since trained whole (dense takes them in): %s", ", ".join(other))
    weights, differences = _on_host(old, changed)
    found: list[Update] = []
    for path in changed if dense else low:
        axes = _axes_of(low[path][0]) if path in low else _usual_axes(path, old[path])
        shape = tuple(old[path].shape)
        of_w = _Matrices(functools.partial(weights, path), axes, shape)
        of_delta = _Matrices(functools.partial(differences, path), axes, shape)
        factors = _factors(low[path]) if path in low else [None] * of_w.count
        for at, (name, ab) in enumerate(zip(of_w.names(path), factors, strict=True)):
            delta = None if path in low else functools.partial(of_delta.get, at)
            if ab is None and (delta is None or not np.any(delta())):
                continue  # a layer that is not adapted
            weight = functools.partial(of_w.get, at)
            found.append(Update(name, None, "", of_w.matrix_shape, ab, delta, weight))
    if not found:
        raise UserError(f"{method.name!r} changed no matrix of the model: there is nothing to see")
    return placed(found, modules)


def _changed(
    method: Any, trainable: Mapping[str, Any], params: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(leaves of the base, leaves of the adapted model that are other ones and hold matrices)."""
    old = partition.flatten(params)
    for path, leaf in old.items():
        if isinstance(leaf, partition.Hole):
            raise UserError(f"the base lacks {path!r}: give the parameters as they were loaded")
    new = partition.flatten(method.combine(params, dict(trainable))["params"])
    return old, {p: x for p, x in new.items() if x is not old[p] and _is_matrix(p, x)}


def _on_host(old: Mapping[str, Any], changed: Mapping[str, Any]) -> tuple[Reader, Reader]:
    """(W, ΔW) by path, as NumPy arrays; of each only the last that was asked for is kept."""

    @functools.lru_cache(maxsize=1)
    def weight(path: str) -> np.ndarray:
        return np.asarray(jax.device_get(densify(old[path])))

    @functools.lru_cache(maxsize=1)
    def difference(path: str) -> np.ndarray:
        after = np.asarray(jax.device_get(densify(changed[path])))
        return after.astype(np.float32) - weight(path).astype(np.float32)

    return weight, difference


@dataclasses.dataclass(frozen=True)
class _Matrices:
    """A leaf as matrices [in, out], one at a time.

    Attributes:
      whole: gives the leaf's numbers.
      axes: its (batch, input, output) axes.
      shape: the leaf's.
    """

    whole: Callable[[], np.ndarray]
    axes: Axes
    shape: tuple[int, ...]

    def sizes(self, which: int) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.axes[which])

    @property
    def count(self) -> int:
        return math.prod(self.sizes(0))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return math.prod(self.sizes(1)), math.prod(self.sizes(2))

    def get(self, at: int) -> np.ndarray:
        batch, ins, outs = self.axes
        moved = self.whole().transpose(*(i % len(self.shape) for i in (*batch, *ins, *outs)))
        one = moved[np.unravel_index(at, self.sizes(0))] if batch else moved
        return one.reshape(self.matrix_shape).astype(np.float32)

    def names(self, path: str) -> Iterator[str]:
        """Of every matrix: the module, and the expert or other copy in it where there are more."""
        layers = partition.expand(path)
        copies = self.count // len(layers)
        for layer in layers:
            name = re.sub(r"/(kernel|embedding|weight)$", "", layer.removesuffix("/value"))
            yield from (f"{name}[{j}]" if copies > 1 else name for j in range(copies))


def _float32(params: Any) -> Any:
    """Differences are of numbers that were not rounded once more on the way."""

    def widen(x: Any) -> Any:
        if is_weight(x) or not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.float32:
            return x
        return jnp.asarray(x, jnp.float32)

    flat = partition.flatten(params)
    return partition.unflatten_like(
        params, {p: x if isinstance(x, partition.Hole) else widen(x) for p, x in flat.items()}
    )


def _is_matrix(path: str, leaf: Any) -> bool:
    return len(leaf.shape) - (partition.stack_of(path) is not None) >= 2


def _axes_of(leaf: LowRank) -> Axes:
    return leaf.batch_axes, leaf.in_axes, leaf.out_axes


def _usual_axes(path: str, leaf: Any) -> Axes:
    """Layers in front where there is a stack, outputs last, inputs between."""
    stacked, n = int(partition.stack_of(path) is not None), len(leaf.shape)
    return tuple(range(stacked)), tuple(range(stacked, n - 1)), (n - 1,)


def _factors(parts: Sequence[LowRank]) -> list[tuple[np.ndarray, np.ndarray] | None]:
    """(A, B) of every matrix of a leaf, without padding; None where it is all padding."""
    return [live_columns(x, y) for x, y in zip(*factors_of(parts, np.float32), strict=True)]
