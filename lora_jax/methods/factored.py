"""An adapter as the factors of each matrix it changes, whatever its method, and as a LoRA again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base
from lora_jax.methods.lora import Layout, LoRA, rule_names
from lora_jax.methods.peft.patterns import regexes, rules
from lora_jax.methods.peft.whole import host
from lora_jax.tensors.base import is_weight
from lora_jax.tensors.low_rank import LowRank
from lora_jax.tensors.updates import factors_of, low_rank_parts

Pair = tuple[np.ndarray, np.ndarray]
"""(A [in, r], B [r, out]) of one matrix, any scale in B."""


@dataclasses.dataclass(frozen=True)
class Factored:
    """One leaf's update.

    Attributes:
      letters: of the leaf's axes: b, i, o.
      pairs: float64, of each of the leaf's matrices (layers, experts); None where one is left
        alone.
    """

    letters: str
    pairs: list[Pair | None]


@dataclasses.dataclass(frozen=True)
class Factors:
    """An adapter, by leaf path.

    Attributes:
      updates: of the leaves that it adds a product to.
      whole: the leaves that it replaces.
      layouts: as of `LoRA`.
    """

    updates: dict[str, Factored]
    whole: dict[str, np.ndarray]
    layouts: tuple[tuple[str, str], ...]


def read(method: base.Method, trainable: base.Trainable, params: Any) -> Factors:
    """UserError where the method does anything else than adding products and replacing leaves."""
    variables = method.combine(params, trainable)
    if set(variables) != {"params"}:
        raise UserError(f"{method.name!r} acts on activations: it has no updates that can be added")
    old, updates, whole = partition.flatten(params), {}, {}
    for path, leaf in partition.flatten(variables["params"]).items():
        if leaf is old[path]:
            continue
        parts = low_rank_parts(leaf, old[path])
        if parts:
            updates[path] = _factored(parts)
        elif is_weight(leaf) or is_weight(old[path]):
            raise UserError(
                f"{method.name!r} changes {path!r} by more than a product of two factors "
                f"({type(leaf).__name__}): adapters of this kind cannot be added"
            )
        else:
            whole[path] = host(leaf)
    return Factors(updates, whole, tuple(getattr(method, "layouts", ())))


def _factored(parts: Sequence[LowRank]) -> Factored:
    first = parts[0]
    kinds = {**dict.fromkeys(first.in_axes, "i"), **dict.fromkeys(first.out_axes, "o")}
    letters = "".join(kinds.get(i, "b") for i in range(-first.ndim, 0))
    a, b = factors_of(parts, np.float64)
    return Factored(letters, [_live(x, y) for x, y in zip(a, b, strict=True)])


def _live(a: np.ndarray, b: np.ndarray) -> Pair | None:
    """Without columns that are padding: zero in both."""
    live = np.any(a != 0, axis=0) | np.any(b != 0, axis=1)
    return (a[:, live], b[live]) if np.any(live) else None


def lora_of(
    factors: Factors, whole: Mapping[str, jax.Array], params: Any
) -> tuple[LoRA, base.Trainable]:
    """The LoRA with s = 1 that adds these products, and its tree with the leaves `whole` in it."""
    flat, names = partition.flatten(params), rule_names(params)
    ranks: dict[str, int] = {}
    tree: base.Trainable = {}
    for path, update in factors.updates.items():
        pairs, layers = update.pairs, partition.expand(path)
        each = len(pairs) // len(layers)
        of_layer = [
            max((p[1].shape[0] for p in pairs[at * each : (at + 1) * each] if p), default=0)
            for at in range(len(layers))
        ]
        if not any(of_layer):
            continue
        ranks |= {names[e]: r for e, r in zip(layers, of_layer, strict=True) if r}
        tree[path] = _leaf(pairs, update.letters, tuple(flat[path].shape), max(of_layer))
    every = [e for p in flat for e in partition.expand(p)]
    fields: dict[str, Any] = {"layouts": factors.layouts}
    if whole:
        fields["train"] = tuple(regexes([e for p in whole for e in partition.expand(p)], every))
    if not ranks:
        raise UserError(
            "the result would hold leaves trained whole and no update of a matrix, which is no LoRA"
            if whole
            else "no adapter changes any module: there is nothing to combine"
        )
    among = list(names.values())
    found = rules(ranks, among)
    method = LoRA(rank=found, alpha=_floats(found), targets=tuple(regexes(ranks, among)), **fields)
    return method, {**tree, **whole}


def _floats(ranks: Any) -> Any:
    """alpha = rank: s = 1."""
    return float(ranks) if isinstance(ranks, int) else tuple((p, float(r)) for p, r in ranks)


def _leaf(
    pairs: Sequence[Pair | None], letters: str, shape: tuple[int, ...], widest: int
) -> dict[str, jax.Array]:
    """{"a": [*batch, *in, r], "b": [*batch, r, *out]}, padded with zeros."""
    batch, ins, outs = (Layout(letters).sizes(shape, k) for k in "bio")
    a = np.zeros((len(pairs), int(np.prod(ins)), widest), np.float32)
    b = np.zeros((len(pairs), widest, int(np.prod(outs))), np.float32)
    for at, pair in enumerate(pairs):
        if pair is not None:
            a[at, :, : pair[0].shape[1]], b[at, : pair[1].shape[0]] = pair
    return {
        "a": jnp.asarray(a.reshape(*batch, *ins, widest)),
        "b": jnp.asarray(b.reshape(*batch, widest, *outs)),
    }
