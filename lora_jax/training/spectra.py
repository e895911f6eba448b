"""What training has made of each weight so far: size and spectrum of its low-rank updates.

At a time in training, of every layer of every target: the scale s, ‖ΔW‖_F with ΔW = s·A·B (alone
and over ‖W‖_F), the first singular values, stable and effective rank. They are had from QR
decompositions of the factors, O((in + out)·r² + r³) a matrix: no ΔW is ever formed. Rank, alpha and
learning rate act on a model through these numbers together, so runs that differ in all three can be
compared by them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import analysis, partition
from lora_jax.tensors.base import densify, is_weight
from lora_jax.tensors.low_rank import LowRank
from lora_jax.tensors.updates import low_rank_parts, traced_factors

Row = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectra:
    """Of one leaf's M matrices (layers, experts), each ΔW = s·A·B.

    Attributes:
      scale: s, [M].
      rank: int32 [M], columns of A and B that are not padding; 0 where a layer is not adapted.
      norm, weight_norm: ‖ΔW‖_F and ‖W‖_F, [M].
      stable_rank, effective_rank: see `analysis.spectra`, [M].
      singular_values: the first k of ΔW, falling, [M, k].
    """

    scale: jax.Array
    rank: jax.Array
    norm: jax.Array
    weight_norm: jax.Array
    stable_rank: jax.Array
    effective_rank: jax.Array
    singular_values: jax.Array


def update_spectra(
    method: Any,
    frozen: Any,
    trainable: Any,
    numbers: Any,
    norms: Mapping[str, jax.Array],
    *,
    k: int,
) -> dict[str, Spectra]:
    """The spectra of every leaf that the method adds a low-rank product to, by leaf path.

    Pure, to be jitted or mapped over the members of a pack; padding adds nothing to any of it.
    Empty for methods without such leaves, which are those that change weights otherwise (DoRA,
    LoKr, IA3, leaves trained whole) or not at all (prefixes, adapters).

    Args:
      frozen, trainable, numbers: as of `method.combine`.
      norms: of `frozen`, from `weight_norms`.
      k: singular values to keep of each matrix.
    """
    parts = _updates(method, frozen, trainable, numbers)
    if not parts:
        return {}
    factors = {path: traced_factors(found) for path, found in parts.items()}
    values = analysis.all_singular_values(list(factors.values()))
    return {
        path: _of_leaf(parts[path], *factors[path], s, norms[path], k)
        for path, s in zip(parts, values, strict=True)
    }


def _updates(method: Any, frozen: Any, trainable: Any, numbers: Any) -> dict[str, list[LowRank]]:
    old = partition.flatten(frozen)
    new = partition.flatten(method.combine(frozen, trainable, numbers=numbers)["params"])
    return {p: found for p, x in new.items() if (found := low_rank_parts(x, old[p]))}


def weight_norms(method: Any, frozen: Any, trainable: Any, numbers: Any) -> dict[str, jax.Array]:
    """‖W‖_F [M] of the matrices of every leaf that `update_spectra` has, by leaf path.

    Frozen weights do not change, so once for a base. A quantised leaf is made dense one layer at a
    time.

    Args:
      frozen, trainable, numbers: as of `method.combine`; of the last two only shapes are used.
    """
    axes: dict[str, tuple[int, ...]] = {}

    def look(*args: Any) -> None:
        for path, parts in _updates(method, *args).items():
            axes[path] = (*parts[-1].in_axes, *parts[-1].out_axes)

    jax.eval_shape(look, frozen, trainable, numbers)
    flat = partition.flatten(frozen)
    return {path: _weight_norm(flat[path], matrix) for path, matrix in axes.items()}


@functools.partial(jax.jit, static_argnames="axes")
def _weight_norm(w: Any, axes: tuple[int, ...]) -> jax.Array:
    if not is_weight(w) or -w.ndim in axes:
        return jnp.sqrt(_square(w, axes)).reshape(-1)
    leaves, like = jax.tree.flatten(w)
    cut = jax.tree.leaves(w.stacked())

    def layer(sliced: Sequence[jax.Array]) -> jax.Array:
        mine = iter(sliced)
        one = [next(mine) if own else x for x, own in zip(leaves, cut, strict=True)]
        return _square(jax.tree.unflatten(like, one), axes)

    squares = jax.lax.map(layer, [x for x, own in zip(leaves, cut, strict=True) if own])
    return jnp.sqrt(squares).reshape(-1)


def _square(w: Any, axes: tuple[int, ...]) -> jax.Array:
    """‖W‖² over its matrices' axes."""
    w = densify(w)
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    return jnp.sum(w * w, axis=axes)


def _of_leaf(
    parts: Sequence[LowRank],
    a: jax.Array,
    b: jax.Array,
    s: jax.Array,
    weight_norm: jax.Array,
    k: int,
) -> Spectra:
    in_a, in_b = jnp.any(a != 0, axis=-2), jnp.any(b != 0, axis=-1)
    # Before the first update one factor is zero altogether: its columns are no padding.
    both = in_a & in_b
    live = jnp.where(jnp.any(both, axis=-1, keepdims=True), both, in_a | in_b)
    first = parts[0]
    batch = tuple(first.shape[i] for i in first.batch_axes)
    return Spectra(
        scale=jnp.broadcast_to(first.scale, batch).reshape(-1),
        rank=jnp.minimum(jnp.sum(live, axis=-1), s.shape[-1]),
        norm=analysis.norm(s),
        weight_norm=weight_norm,
        stable_rank=analysis.stable_rank(s),
        effective_rank=analysis.effective_rank(s),
        singular_values=s[..., :k],
    )


# On the host.


def rows(found: Mapping[str, Spectra]) -> list[Row]:
    """A row a matrix, of `update_spectra` on the host; layers that are not adapted have none.

    Keys: path (`layers/3/attention/query`, and `[j]` where a layer has several matrices), scale,
    rank, norm, relative_norm ‖ΔW‖/‖W‖, stable_rank, effective_rank, singular_values (list).
    """
    made = []
    for path, leaf in found.items():
        for at, name in enumerate(_names(path, len(leaf.rank))):
            if rank := int(leaf.rank[at]):
                made.append({"path": name, **_numbers(leaf, at, rank)})
    return made


def _names(path: str, count: int) -> list[str]:
    modules = [partition.module(layer) for layer in partition.expand(path)]
    copies = count // len(modules)
    return [f"{m}[{j}]" if copies > 1 else m for m in modules for j in range(copies)]


def _numbers(leaf: Spectra, at: int, rank: int) -> Row:
    norm, of_w = float(leaf.norm[at]), float(leaf.weight_norm[at])
    return {
        "scale": _short(leaf.scale[at]),
        "rank": rank,
        "norm": _short(norm),
        "relative_norm": _short(norm / of_w if of_w else math.nan),
        "stable_rank": _short(leaf.stable_rank[at]),
        "effective_rank": _short(leaf.effective_rank[at]),
        "singular_values": [_short(x) for x in leaf.singular_values[at][:rank]],
    }


def _short(x: Any) -> float:
    """To as many digits as float32 has."""
    return float(f"{float(x):.7g}")


def summary(found: Sequence[Row]) -> dict[str, float]:
    """Of all matrices together, for the log: `update/…`; nothing where there are none.

    norm: ‖ΔW‖_F of them all as one vector. The others are means over matrices.
    """
    if not found:
        return {}
    means = ("scale", "relative_norm", "stable_rank", "effective_rank")
    return {
        "update/norm": math.sqrt(sum(row["norm"] ** 2 for row in found)),
        **{f"update/{name}": float(np.mean([row[name] for row in found])) for name in means},
    }
