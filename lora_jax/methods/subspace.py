"""Training in a random subspace: theta = theta_0 + P·theta_d (intrinsic dimension).

Li et al. 2018, arXiv:1804.08838, eq. 2; Aghajanyan et al. 2020, arXiv:2012.13255, eqs. 1 to 3.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition, projections
from lora_jax.errors import UserError
from lora_jax.methods import base
from lora_jax.tensors.base import densify, is_weight, wide
from lora_jax.tensors.summed import Summed

OWN = "subspace"
"""Where the trainable tree holds the coordinates: no leaf of a model's has this path."""
_SCOPES = ("global", "tensor")
_SCALES = ("none", "layer", "tensor")


@dataclasses.dataclass(frozen=True)
class Span:
    """A leaf that the subspace covers.

    Attributes:
      path: of the leaf.
      layers: its expanded paths; one outside of stacks.
      size: parameters of one of them.
    """

    path: str
    layers: tuple[str, ...]
    size: int


@base.register("subspace")
@dataclasses.dataclass(frozen=True)
class Subspace(base.Method):
    """Only the d coordinates theta_d are trained, from zero; P is random and fixed.

    Every covered leaf is summed with its part of P·theta_d in each step, so memory is that of a
    second set of weights: this measures, it does not save. An adapter holds theta_d; P comes
    from `projection_seed` again.

    Published settings: Li et al.: the defaults, or another projection, with the head in the
    subspace. Aghajanyan et al.: scope="tensor" is DID, and with scales="layer" it is SAID.

    Args:
      dimension: d, scales included (and leaves trained whole, see `train_counts`).
      projection: "dense", "sparse" or "fastfood".
      scope: "global": P maps to all covered leaves as one vector. "tensor": each tensor (each
        layer of a stack) has a P of its own, of unit columns, and all share theta_d.
      scales: SAID's trained factor of P·theta_d, from 1: one a "layer" (a stack's layer, and each
        module outside), as its text says, or one a "tensor", as its code does ("none": none).
        The paper's d of 207 for RoBERTa-large is below its number of tensors.
      projection_seed: of P. A run's own seed decides nothing here.
      targets: regex(es) of the leaves that are covered, the head too if it matches.
      train: regexes of leaves that are trained whole, outside of the subspace ("^head/").
      train_counts: False: they are trained beside the d coordinates. True: their parameters are
        some of the d, and so many coordinates are fewer.
      cached: whether P's random numbers are held between steps or drawn in each one; None: held
        where there are few (see `projections`). The same P either way.
    """

    trains: ClassVar[str] = "d coordinates of a random subspace"
    numeric: ClassVar[tuple[str, ...]] = ("dimension", "projection_seed")
    # Coordinates beyond a member's own meet zeros in `numbers`: they move nothing.
    padding_exact: ClassVar[bool] = True
    size_field: ClassVar[str | None] = "dimension"

    dimension: int = 1000
    projection: str = "fastfood"
    scope: str = "global"
    scales: str = "none"
    projection_seed: int = 0
    targets: str | tuple[str, ...] = ".*"
    train: tuple[str, ...] = ()
    train_counts: bool = False
    cached: bool | None = None

    def __post_init__(self) -> None:
        projections.check(self.projection)
        for name, known in (("scope", _SCOPES), ("scales", _SCALES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        if not 0 <= self.projection_seed < 2**32:
            raise UserError(f"projection_seed={self.projection_seed} must be in [0, 2^32)")
        if self.train_counts and not self.train:
            raise UserError("train_counts says where leaves of `train` count: name some there")

    # What is covered, and how d is spent.

    @property
    def patterns(self) -> tuple[str, ...]:
        return partition.listed(self.targets)

    def spans(self, params: Any) -> list[Span]:
        """The covered leaves, in an order that cutting a stack in segments does not change.

        Raises UserError for a pattern that matches nothing, a stack of which only some layers
        match, or a leaf that is not of floating point.
        """
        flat = partition.flatten(params)
        every = [e for p in flat for e in partition.expand(p)]
        partition.check_patterns(self.patterns, every, "targets")
        whole = set(self._whole(params))
        found = []
        for path, leaf in flat.items():
            layers = tuple(partition.expand(path))
            hits = [any(partition.matches(p, e) for p in self.patterns) for e in layers]
            if path in whole or not any(hits):
                continue
            if not all(hits):
                raise UserError(
                    f"targets: {path!r} is stacked and only some of its layers match; cut it "
                    "first: params = method.arrange(params)"
                )
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise UserError(f"targets: {path!r} holds {leaf.dtype}: leave it out")
            found.append(Span(path, layers, math.prod(leaf.shape) // len(layers)))
        if not found:
            raise UserError("the subspace covers no leaf: `train` takes all that targets match")
        return sorted(
            found, key=lambda s: (base.target_name(s.path), partition.stack_of(s.path) or (0, 0))
        )

    def _whole(self, params: Any) -> list[str]:
        return base.whole_leaves(params, self.train)

    def arrange(self, params: Any) -> Any:
        """Cuts stacks where the layers that are covered, or trained whole, begin and end."""
        return base.cut_between(params, self.train, self.patterns)

    def groups(self, spans: list[Span]) -> dict[str, int]:
        """The place of each expanded path's scale; empty with scales="none"."""
        if self.scales == "none":
            return {}
        named = {e: e if self.scales == "tensor" else _layer(e) for s in spans for e in s.layers}
        place = {name: i for i, name in enumerate(sorted(set(named.values()), key=_natural))}
        return {e: place[name] for e, name in named.items()}

    def coordinates(self, params: Any) -> int:
        """The length of theta_d: d without what scales, and counted leaves, take of it."""
        spans = self.spans(params)
        scales = len(set(self.groups(spans).values()))
        whole = base.count_whole(params, self._whole(params)) if self.train_counts else {}
        taken, most = scales + sum(whole.values()), sum(s.size * len(s.layers) for s in spans)
        if self.dimension <= taken:
            raise UserError(
                f"dimension={self.dimension} must be above the {scales} scales and "
                f"{taken - scales} parameters of `train` that count in it"
            )
        if self.dimension - taken > most:
            raise UserError(
                f"dimension={self.dimension}, but the covered leaves have only {most:,} parameters"
            )
        return self.dimension - taken

    # P.

    def _projections(self, spans: list[Span]) -> dict[str, projections.Projection]:
        """P of all leaves as one vector, or the one of each size: tensors of a size are a batch."""
        sizes = [sum(s.size * len(s.layers) for s in spans)]
        if self.scope == "tensor":
            sizes = sorted({s.size for s in spans})
        return {str(n): projections.make(self.projection, n, self.cached) for n in sizes}

    def _keys(self, seed: Any, spans: list[Span]) -> dict[str, jax.Array]:
        """The keys of each of `_projections`: one, or one a tensor (each layer of a stack)."""
        # Threefry whatever JAX's default is: P must not change.
        root = jax.random.key(seed, impl="threefry2x32")
        if self.scope == "global":
            return dict.fromkeys(self._projections(spans), root[None])
        names: dict[str, list[int]] = {}
        for span in spans:
            names.setdefault(str(span.size), []).extend(zlib.crc32(e.encode()) for e in span.layers)
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        return {n: fold(root, np.array(hashes, np.uint32)) for n, hashes in names.items()}

    def numbers(self, params: Any) -> dict[str, Any]:
        """{"seed": uint32, "projections": the numbers of each, one row a tensor}."""
        spans, d = self.spans(params), self.coordinates(params)
        seed = np.uint32(self.projection_seed)
        keys = self._keys(seed, spans)
        drawn = {n: _drawn(p, d, keys[n]) for n, p in self._projections(spans).items()}
        return {"seed": seed, "projections": drawn}

    def offsets(
        self, params: Any, vector: jax.Array, numbers: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """P·theta_d by leaf path, each [layers, size]; `vector` is theta_d, padded or not."""
        spans = self.spans(params)
        keys, held = self._keys(numbers["seed"], spans), numbers["projections"]
        found: dict[str, jax.Array] = {}
        for name, p in self._projections(spans).items():
            flat = _applied(p, keys[name], held[name], vector).reshape(-1)
            here = [s for s in spans if self.scope == "global" or s.size == p.size]
            pieces = jax.lax.split(flat, [s.size * len(s.layers) for s in here])
            found |= {s.path: x for s, x in zip(here, pieces, strict=True)}
        return {s.path: found[s.path].reshape(len(s.layers), s.size) for s in spans}

    # The protocol.

    def init(self, key: jax.Array, params: Any) -> base.Trainable:
        """theta_d = 0 and scales of 1, whatever the key: the model is unchanged."""
        own = {"vector": jnp.zeros(self.coordinates(params))}
        if groups := self.groups(self.spans(params)):
            own["scales"] = jnp.ones(len(set(groups.values())))
        return {OWN: own, **base.copies(params, self._whole(params))}

    def combine(
        self,
        params: Any,
        trainable: base.Trainable,
        *,
        key: jax.Array | None = None,
        numbers: Mapping[str, Any] | None = None,
    ) -> Any:
        numbers = self.numbers(params) if numbers is None else numbers
        own, spans, flat = trainable[OWN], self.spans(params), partition.flatten(params)
        offsets, groups = self.offsets(params, own["vector"], numbers), self.groups(spans)
        new = {p: x for p, x in trainable.items() if p != OWN}
        for span in spans:
            w, delta = flat[span.path], offsets[span.path]
            if groups:
                delta = delta * own["scales"][np.array([groups[e] for e in span.layers])][:, None]
            delta = delta.reshape(w.shape)
            new[span.path] = Summed(w, delta, span.path) if is_weight(w) else _sum(w, delta)
        return {"params": partition.combine(params, new)}

    def merge(self, params: Any, trainable: base.Trainable) -> Any:
        """theta_0 + P·theta_d, summed in float32 at least and rounded once."""
        return densify(self.combine(params, trainable)["params"])

    def count(self, params: Any) -> base.Counts:
        counts = {f"{OWN}/vector": self.coordinates(params)}
        if groups := self.groups(self.spans(params)):
            counts[f"{OWN}/scales"] = len(set(groups.values()))
        return base.Counts({**counts, **base.count_whole(params, self._whole(params))})

    def frozen(self, params: Any) -> Any:
        return base.holes(params, self._whole(params))


def _sum(w: Any, delta: jax.Array) -> jax.Array:
    return (w.astype(wide(w.dtype)) + delta).astype(w.dtype)


def _drawn(p: projections.Projection, d: int, keys: jax.Array) -> dict[str, jax.Array]:
    """The numbers of d coordinates, as a part of those of somewhat more.

    So a search over d compiles four programs an octave, not one for every d.
    """
    step = 2 ** max(0, (d - 1).bit_length() - 3)
    more = _numbers(p, -(-d // step) * step, keys)
    like = jax.eval_shape(lambda: _numbers(p, d, keys))
    return {n: x[tuple(slice(k) for k in like[n].shape)] for n, x in more.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _numbers(p: projections.Projection, d: int, keys: jax.Array) -> dict[str, jax.Array]:
    return jax.vmap(lambda key: p.numbers(key, d))(keys)


@functools.partial(jax.jit, static_argnums=0)
def _applied(
    p: projections.Projection, keys: jax.Array, numbers: Mapping[str, Any], vector: jax.Array
) -> jax.Array:
    """[tensors, size]."""
    if p.size < projections.LONG:
        return jax.vmap(p.apply, (0, 0, None))(keys, numbers, vector)

    def one(drawn: tuple[jax.Array, Mapping[str, Any]]) -> jax.Array:
        key, held = drawn
        return p.apply(key, held, vector)

    return jax.lax.map(one, (keys, numbers))


def _layer(path: str) -> str:
    """The layer an expanded path is in: up to the first name that is a number, or ends in one as
    Linen's do (`Transformer/encoderblock_3`), or its first name."""
    match = re.match(r"(?:.*?/)?(?:[^/]*_)?\d+(?=/|$)", path)
    return match[0] if match else path.split("/")[0]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split("/")]
