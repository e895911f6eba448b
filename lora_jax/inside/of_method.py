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
from lora_jax.methods import LoRA
from lora_jax.tensors.adapt import adapt
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
    layouts: Sequence[tuple[str, str]] = (),
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
      modules: a regex of the modules to take, searched in `layers/3/attention/query`; of others
        no difference is taken.
      layouts: rules of axis letters as of `LoRA`, first match first, for such differences. Where
        none matches, a leaf that the method adapts has the method's own layout, and any other
        its layers in front where there is a stack, its outputs last, and inputs between.

    Raises:
      UserError: nothing low-rank in it, and no `dense`; no matrix changed; a hole in `params`; a
        leaf of another shape than the base's; a layout that does not fit or matches nothing.
    """
    old, changed = _changed(method, trainable, params, _float32(params) if dense else params)
    every = [e for p in old for e in partition.expand(p)]
    partition.Rules.of(layouts).check(every, "layouts")
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
        if path in low:
            axes = _axes_of(low[path][0])
        else:
            own = getattr(method, "layouts", ()) if is_weight(changed[path]) else ()
            axes = _axes_told(path, old[path], (*layouts, *own))
        shape = tuple(old[path].shape)
        of_w = _Matrices(functools.partial(weights, path), axes, shape)
        of_delta = _Matrices(functools.partial(differences, path), axes, shape)
        factors = _factors(low[path]) if path in low else [None] * of_w.count
        for at, (name, ab) in enumerate(zip(of_w.names(path), factors, strict=True)):
            if path in low and ab is None:
                continue  # a layer that is not adapted
            delta = None if path in low else functools.partial(of_delta.get, at)
            weight = functools.partial(of_w.get, at)
            found.append(Update(name, None, "", of_w.matrix_shape, ab, delta, weight))
    chosen = placed(found, modules) if found else []
    chosen = [x for x in chosen if x.difference is None or np.any(x.difference())]
    if not chosen:
        which = "" if modules is None else f" that modules={modules!r} matches"
        raise UserError(
            f"{method.name!r} changed no matrix of the model{which}: there is nothing to see"
        )
    return chosen


def _changed(
    method: Any, trainable: Mapping[str, Any], params: Any, base: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(leaves of the base, leaves of the adapted model that are other ones and hold matrices).

    Args:
      params: what the method was trained on.
      base: the same, in the precision to see it in.
    """
    old = partition.flatten(base)
    for path, leaf in old.items():
        if isinstance(leaf, partition.Hole):
            raise UserError(f"the base lacks {path!r}: give the parameters as they were loaded")
    # A start or norms of W are those of training: of the base as it was rounded there.
    numbers = method.numbers(params)
    new = partition.flatten(method.combine(base, dict(trainable), numbers=numbers)["params"])
    for path, leaf in new.items():
        if tuple(leaf.shape) != tuple(old[path].shape):
            raise UserError(
                f"{path!r} is {list(leaf.shape)} as trained and {list(old[path].shape)} in the "
                "base: give the base that it was trained from, resized alike"
            )
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
    """Differences are of numbers that were not rounded once more on the way.

    A quantised leaf keeps its codes and stands for float32.
    """
    cast = adapt(lambda x: x.astype(jnp.float32))

    def widen(x: Any) -> Any:
        if isinstance(x, partition.Hole) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x if x.dtype == jnp.float32 else cast(x)

    flat = partition.flatten(params)
    return partition.unflatten_like(params, {p: widen(x) for p, x in flat.items()})


def _is_matrix(path: str, leaf: Any) -> bool:
    return len(leaf.shape) - (partition.stack_of(path) is not None) >= 2


def _axes_of(leaf: LowRank) -> Axes:
    return leaf.batch_axes, leaf.in_axes, leaf.out_axes


def _axes_told(path: str, leaf: Any, layouts: tuple[tuple[str, str], ...]) -> Axes:
    """As the first rule says that matches; else layers, inputs, and the last axis for outputs."""
    stacked, n = int(partition.stack_of(path) is not None), len(leaf.shape)
    if partition.Rules.of(layouts).get(partition.expand(path)[0]) is None:
        return tuple(range(stacked)), tuple(range(stacked, n - 1)), (n - 1,)
    layout = LoRA(layouts=layouts).layout(path, leaf)
    if stacked and not layout.letters.startswith("b"):
        raise UserError(
            f"layouts: {path!r} is a stack of layers, so its letters begin with b; got "
            f"{layout.letters!r}"
        )
    return layout.axes("b"), layout.axes("i"), layout.axes("o")


def _factors(parts: Sequence[LowRank]) -> list[tuple[np.ndarray, np.ndarray] | None]:
    """(A, B) of every matrix of a leaf, without padding; None where it is all padding."""
    return [live_columns(x, y) for x, y in zip(*factors_of(parts, np.float32), strict=True)]
