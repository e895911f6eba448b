"""Sums of adapters: new adapters whose update ΔW is made from those of others.

The update of a matrix is what counts, s·A·B with the adapter's own scale, whatever its rank,
alpha and scaling: weights multiply updates, so the result does not depend on how an update is
split in A and B. (To add the A's and the B's apart, as PEFT's "linear", "ties" and "dare_linear"
do, adds products of one adapter's A with another's B.) The new adapter is a plain LoRA with s = 1.

All is done on the host, in float64, one matrix at a time.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import analysis, partition
from lora_jax.errors import UserError, nearest
from lora_jax.methods import base
from lora_jax.methods.factored import Factored, Factors, Pair, lora_of, read
from lora_jax.methods.lora import LoRA
from lora_jax.methods.peft.whole import host

HOWS = ("linear", "cat", "svd", "ties", "dare")


class Combined(NamedTuple):
    """A new adapter.

    Attributes:
      method, trainable: a plain LoRA and its tree.
      energy: by expanded leaf path, the share of ‖ΔW‖² that its rank holds: 1 where nothing was
        left out.
    """

    method: LoRA
    trainable: base.Trainable
    energy: dict[str, float]


def combine_adapters(
    params: Any,
    adapters: Sequence[tuple[base.Method, base.Trainable]],
    weights: Sequence[float],
    how: str = "cat",
    *,
    rank: Any = None,
    density: float = 0.2,
    seed: int = 0,
) -> Combined:
    """One adapter from several on one base, which may differ in rank, alpha and targets.

    With τ_i = weight_i · ΔW_i, by `how`:

    - "linear", "cat" (two names of one thing): Σ τ_i, exactly, the factors side by side. Its rank
      is the sum of the ranks.
    - "svd": the best approximation of Σ τ_i of the given rank (Eckart–Young), from a QR
      decomposition of the factors side by side and the SVD of a small matrix: never dense.
    - "ties" (Yadav et al. 2023, arXiv:2306.01708, algorithm 1): of each τ_i only the share
      `density` of largest entries is kept; where Σ τ_i is positive the mean of the positive
      entries, where it is negative that of the negative ones.
    - "dare" (Yu et al. 2023, arXiv:2311.03099, section 3.2): Σ δ_i, with δ_i the entries of τ_i,
      kept with probability `density` (1 - p) and divided by it.

    The last two are of dense matrices, one of the model's at a time, and their results are then
    approximated to the rank by an SVD. Shares are of each matrix (of each layer). Leaves that
    adapters train whole are base + Σ weight_i · (leaf_i − base), or what "ties" and "dare" make
    of these differences, dense.

    Args:
      params: the base's parameters, with no leaf taken out.
      adapters: (method, trainable) each; any method whose update is a product of two factors in
        the end (LoRA, VeRA, LoHa, PiSSA with its start taken off, …). An adapter that leaves a
        module alone adds nothing there.
      rank: of "svd", "ties" and "dare": a number or (regex, number) rules; by default the
        largest that an adapter has in the module.
      seed: of "dare".

    Raises:
      UserError: an update that is no product (DoRA, IA3, …), weights that are not as many as
        adapters, an unknown `how`, a density outside of (0, 1], or `rank` where it means nothing.
    """
    if how not in HOWS:
        raise UserError(f"how={how!r} is unknown; {nearest(str(how), HOWS)}")
    if not adapters or len(adapters) != len(weights):
        raise UserError(f"{len(adapters)} adapters and {len(weights)} weights: one weight for each")
    if not 0.0 < density <= 1.0:
        raise UserError(f"density={density} must be above 0 and at most 1")
    exact = how in ("linear", "cat")
    if exact and rank is not None:
        raise UserError(f"{how!r} is exact, of the sum of the ranks: leave out rank, or take 'svd'")
    found = [read(method, trainable, params) for method, trainable in adapters]
    merge = _Merge(how, [float(w) for w in weights], density, seed)
    flat, ranks = partition.flatten(params), None
    if rank is not None:
        ranks = partition.Rules.of(rank)
        ranks.check([e for p in flat for e in partition.expand(p)], "rank")
    updates: dict[str, Factored] = {}
    energy: dict[str, float] = {}
    whole: dict[str, jax.Array] = {}
    for path, leaf in flat.items():
        there = {i: x.updates[path] for i, x in enumerate(found) if path in x.updates}
        if any(path in x.whole for x in found):
            whole[path] = _combine_whole(merge, path, leaf, found)
        elif there:
            updates[path] = _combine_leaf(merge, path, there, ranks, energy)
    layouts = dict(pair for x in found for pair in x.layouts)
    factors = Factors(updates, {}, tuple(layouts.items()))
    method, trainable = lora_of(factors, whole, params)
    return Combined(method, trainable, energy)


def reduce_rank(method: base.Method, trainable: base.Trainable, params: Any, rank: Any) -> Combined:
    """The best approximation of one adapter's update by one of a smaller rank (Eckart–Young).

    Args: as of `combine_adapters`.
    """
    return combine_adapters(params, [(method, trainable)], [1.0], "svd", rank=rank)


def _combine_leaf(
    merge: _Merge,
    path: str,
    there: Mapping[int, Factored],
    ranks: partition.Rules | None,
    energy: dict[str, float],
) -> Factored:
    """The new factors of one leaf; adds what their ranks keep to `energy`."""
    letters = {x.letters for x in there.values()}
    if len(letters) > 1:
        raise UserError(f"the adapters disagree which axes of {path!r} are inputs and outputs")
    layers, pairs = partition.expand(path), list[Pair | None]()
    each = len(next(iter(there.values())).pairs) // len(layers)  # experts
    for layer in layers:
        kept = total = 0.0
        for j in range(each):
            found = {i: p for i, x in there.items() if (p := x.pairs[len(pairs)]) is not None}
            if not found:
                pairs.append(None)
                continue
            rank = max(b.shape[0] for _, b in found.values())
            if ranks is not None and (rank := int(ranks.get(layer, rank))) < 1:
                raise UserError(f"rank={rank} at {layer!r} must be at least 1")
            pair, of_rank, of_all = merge.pair(f"{layer}#{j}", found, rank)
            pairs.append(pair)
            kept, total = kept + of_rank, total + of_all
        if any(p is not None for p in pairs[-each:]):
            energy[layer] = min(1.0, kept / total) if total else 1.0
    return Factored(letters.pop(), pairs)


def _combine_whole(merge: _Merge, path: str, old: Any, found: Sequence[Factors]) -> jax.Array:
    """A leaf trained whole: base and the merged differences from it, layer by layer."""
    if any(path in x.updates for x in found):
        raise UserError(f"{path!r} is trained whole by one adapter and adapted by another")
    start = host(old).astype(np.float64)
    new = {i: x.whole[path] for i, x in enumerate(found) if path in x.whole}
    odd = [x.shape for x in new.values() if x.shape != start.shape]
    if odd:
        raise UserError(f"{path!r} is {start.shape} in the base and {odd[0]} in an adapter")
    tau = {i: merge.weights[i] * (x - start) for i, x in new.items()}
    if partition.stack_of(path) is None:
        delta = merge.dense(path, tau)
    else:
        delta = np.stack([
            merge.dense(name, {i: x[at] for i, x in tau.items()})
            for at, name in enumerate(partition.expand(path))
        ])  # fmt: skip
    return jnp.asarray(start + delta, old.dtype)


@dataclasses.dataclass(frozen=True)
class _Merge:
    how: str
    weights: list[float]
    density: float
    seed: int

    def pair(self, name: str, found: Mapping[int, Pair], rank: int) -> tuple[Pair, float, float]:
        """((A, B), energy kept, energy there was) of one matrix, from those of some adapters."""
        weighted = {i: (a, self.weights[i] * b) for i, (a, b) in found.items()}
        if self.how in ("ties", "dare"):
            delta = self.dense(name, {i: a @ b for i, (a, b) in weighted.items()})
            return _cut(analysis.svd(delta), rank)
        a = np.concatenate([x for x, _ in weighted.values()], axis=1)
        b = np.concatenate([x for _, x in weighted.values()], axis=0)
        if self.how == "svd":
            return _cut(analysis.factored_svd(a, b), rank)
        return (a, b), 1.0, 1.0

    def dense(self, name: str, weighted: Mapping[int, np.ndarray]) -> np.ndarray:
        """The sum of τ_i, an array each, as "ties" or "dare" or neither has it."""
        if self.how == "ties":
            return _ties(list(weighted.values()), self.density)
        if self.how == "dare":
            weighted = {i: self._dropped(name, i, x) for i, x in weighted.items()}
        return np.sum(list(weighted.values()), axis=0)

    def _dropped(self, name: str, adapter: int, x: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, adapter, zlib.crc32(name.encode())])
        return np.where(rng.random(x.shape) < self.density, x, 0.0) / self.density


def _ties(tau: Sequence[np.ndarray], density: float) -> np.ndarray:
    kept = np.stack([_largest(x, density) for x in tau])
    sign = np.sign(kept.sum(axis=0))
    agree = (np.sign(kept) == sign[None]) & (kept != 0)
    return (kept * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def _largest(x: np.ndarray, density: float) -> np.ndarray:
    size = np.abs(x)
    count = max(1, int(density * x.size))
    return np.where(size >= np.partition(size.reshape(-1), x.size - count)[x.size - count], x, 0.0)


def _cut(svd: analysis.SVD, rank: int) -> tuple[Pair, float, float]:
    """The first `rank` directions, the root of each singular value in A and in B."""
    u, s, vt = (np.asarray(x) for x in svd)
    root = np.sqrt(s[:rank])
    pair = u[:, :rank] * root[None], root[:, None] * vt[:rank]
    return pair, float(np.sum(s[:rank] ** 2)), float(np.sum(s**2))
