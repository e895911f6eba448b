"""LoRA: low-rank adaptation of large language models (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base, peft
from lora_jax.methods.peft import lora_read, lora_write
from lora_jax.tensors.base import densify
from lora_jax.tensors.low_rank import LowRank

ALL_LINEAR = "all-linear"
_STARTS = ("uniform", "gaussian")
_SCALINGS = ("standard", "rslora")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a leaf are batch (b), input (i) and output (o), e.g. `bio`, `ioo`, `iiio`."""

    letters: str

    def axes(self, letter: str) -> tuple[int, ...]:
        n = len(self.letters)
        return tuple(i - n for i, x in enumerate(self.letters) if x == letter)

    def sizes(self, shape: tuple[int, ...], letter: str) -> tuple[int, ...]:
        return tuple(n for n, x in zip(shape, self.letters, strict=True) if x == letter)


@base.register("lora", peft={"peft_type": "LORA"})
@dataclasses.dataclass(frozen=True)
class LoRA(base.Method):
    """h = x·W0 + (alpha / r)·x·A·B with W0 frozen (eq. 3), A random and B zero at the start.

    Regexes are searched in expanded leaf paths and in their modules' paths
    (`layers/3/attention/query`); in an ordered tuple of (regex, value) the first match wins.

    Args:
      rank: r, or rules. Layers of a stack may differ: the factors are padded with zero columns,
        which stay zero under training. Rank 0 leaves a module alone.
      alpha: numerator of the scale, or rules.
      targets: regex(es) of the modules to adapt, or "all-linear": every matrix inside a stack.
      scaling: "standard" alpha/r, "rslora" alpha/sqrt(r) (Kalajdzievski 2023).
      dropout: rate of the dropout on the input of A; a lookup in an embedding has none, as in
        PEFT.
      start: "uniform" U(±1/sqrt(d_in)), what PEFT and microsoft/LoRA do; "gaussian"
        N(0, 1/d_in), as the paper's text says. Embeddings: A zero, B normal, as in PEFT. Every
        column has a key of its own, so a rank-4 start is the prefix of the rank-8 one.
      init_scale: multiplies the start.
      train: regexes of further leaves trained whole (a head, biases).
      layouts: rules of axis letters (see Layout) where they are not evident: leaves in a stack
        are "bio", elsewhere 2-D is "io" and 4-D a convolution "iiio"; 3-D must be told.
    """

    trains: ClassVar[str] = "A and B of each target"
    numeric: ClassVar[tuple[str, ...]] = (
        "rank", "alpha", "targets", "scaling", "dropout", "start", "init_scale",
    )  # fmt: skip
    # A zero column of A beside a zero row of B has no gradient.
    padding_exact: ClassVar[bool] = True
    size_field: ClassVar[str | None] = "rank"

    rank: Any = 8
    alpha: Any = 16.0
    targets: str | tuple[str, ...] = r"attention/(query|value)$"
    scaling: str = "standard"
    dropout: float = 0.0
    start: str = "uniform"
    init_scale: float = 1.0
    train: tuple[str, ...] = ()
    layouts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.scaling not in _SCALINGS:
            raise UserError(f"scaling must be one of {_SCALINGS}, not {self.scaling!r}")
        if self.start not in _STARTS:
            raise UserError(f"start must be one of {_STARTS}, not {self.start!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout must be in [0, 1), not {self.dropout}")

    def _left_out(self, *names: str, why: str) -> None:
        """UserError where a subclass without these fields is given one of them."""
        for name in names:
            if getattr(self, name) != getattr(LoRA, name):
                raise UserError(f"{type(self).__name__} {why}: leave out {name}")

    # Which leaves, with which ranks and scales.

    def ranks(self, params: Any) -> dict[str, list[int]]:
        """Rank per layer of every targeted leaf, by leaf path (one entry outside of stacks).

        Raises UserError for a pattern that matches nothing, and for a negative rank.
        """
        found = self._ranks_of(params)
        rules = partition.Rules.of(self.rank)
        self._check(self._patterns(), rules, partition.flatten(params), found)
        return found

    def _patterns(self) -> tuple[str, ...]:
        return partition.listed(self.targets)

    def _ranks_of(self, params: Any) -> dict[str, list[int]]:
        """`ranks` of a tree that may be a part of the base's, where a pattern has no leaf."""
        patterns, rules = self._patterns(), partition.Rules.of(self.rank)
        whole = set(base.whole_leaves(params, self.train))
        found: dict[str, list[int]] = {}
        for path, leaf in partition.flatten(params).items():
            if path in whole:
                continue
            ranks = [
                _whole(rules.get(e, 0)) if self._targeted(patterns, path, e, leaf) else 0
                for e in partition.expand(path)
            ]
            if any(ranks):
                if min(ranks) < 0:
                    raise UserError(f"rank must not be negative, at {path!r}")
                found[path] = ranks
        return found

    def _targeted(self, patterns: tuple[str, ...], path: str, expanded: str, leaf: Any) -> bool:
        if not takes_factors(path, leaf):
            return False
        if patterns == (ALL_LINEAR,):
            return partition.stack_of(path) is not None
        return any(partition.matches(p, expanded) for p in patterns)

    def _check(
        self,
        patterns: tuple[str, ...],
        rules: partition.Rules,
        flat: dict[str, Any],
        found: dict[str, list[int]],
    ) -> None:
        every = [e for p in flat for e in partition.expand(p)]
        if patterns != (ALL_LINEAR,):
            partition.check_patterns(patterns, every, "targets")
        hit = [e for p in found for e in partition.expand(p)]
        if not hit:
            why = (
                "no matrix inside a stack such as layers[0:12] takes a rank above 0; where there "
                "are no stacks, name targets by regex"
                if patterns == (ALL_LINEAR,)
                else "no matrix with them takes a rank above 0: a low-rank update needs at least "
                "two axes (name biases and norms in `train`)"
            )
            raise UserError(f"targets {patterns}: {why}")
        rules.check(every, "rank")
        alphas = partition.Rules.of(self.alpha)
        alphas.check(hit, "alpha")
        for path, ranks in found.items():
            for one, r in zip(partition.expand(path), ranks, strict=True):
                if r and alphas.get(one) is None:
                    raise UserError(
                        f"alpha: no rule matches {one!r}, whose rank is {r}; add one that takes "
                        "the rest, ('.*', 16.0), at the end"
                    )

    def layout(self, path: str, leaf: Any) -> Layout:
        """The leaf's axis letters; UserError where they are not evident or do not fit."""
        ndim = len(leaf.shape)
        told = partition.Rules.of(self.layouts or ((".*", None),)).get(partition.expand(path)[0])
        stacked = partition.stack_of(path) is not None
        letters = told or ("b" * stacked + {2: "io", 4: "iiio"}.get(ndim - stacked, ""))
        fits = len(letters) == ndim and set(letters) <= set("bio") and {"i", "o"} <= set(letters)
        if not fits:
            tail = re.escape(re.sub(r"^.*\[\d+:\d+\]/", "", partition.module(path)))
            example = "b" * stacked + "io" + "o" * (ndim - stacked - 2)
            raise UserError(
                f"{path!r} has shape {tuple(leaf.shape)}: say which axes are batch, input and "
                f"output, e.g. layouts=((r'{tail}$', {example!r}),); got {letters!r}"
            )
        return Layout(letters)

    def scales(self, params: Any) -> dict[str, np.ndarray]:
        """s per leaf: float32, shape (layers,) in a stack and () elsewhere; 0 where rank is 0."""
        rules = partition.Rules.of(self.alpha)
        power = 0.5 if self.scaling == "rslora" else 1.0
        scales = {}
        for path, ranks in self.ranks(params).items():
            layers = partition.expand(path)
            values = [
                float(rules.get(e, 0.0)) / r**power if r else 0.0
                for e, r in zip(layers, ranks, strict=True)
            ]
            stacked = partition.stack_of(path) is not None
            scales[path] = np.asarray(values if stacked else values[0], np.float32)
        return scales

    # The protocol.

    def init(self, key: jax.Array, params: Any) -> base.Trainable:
        flat = partition.flatten(params)
        factors = {
            path: self._factors(key, path, flat[path], ranks)
            for path, ranks in self.ranks(params).items()
        }
        return {**factors, **base.copies(params, base.whole_leaves(params, self.train))}

    def _factors(self, key: jax.Array, path: str, leaf: Any, ranks: list[int]) -> Any:
        """What trains for a leaf at the start."""
        layout = self.layout(path, leaf)
        shape = tuple(leaf.shape)
        ins, outs = layout.sizes(shape, "i"), layout.sizes(shape, "o")
        batch, widest = layout.sizes(shape, "b"), max(ranks)
        embedding = partition.is_embedding(path)
        drawn = outs if embedding else ins
        n_other = math.prod(batch) // len(ranks)  # experts, or a stack that the path does not show
        own = [f"#{j}" for j in range(n_other)] if n_other > 1 else [""]
        layers = [f"{layer}{j}" for layer in partition.expand(path) for j in own]
        each = [r for r in ranks for _ in own]
        columns = self._columns(key, layers, drawn, each, widest, embedding)
        random = columns.reshape(*batch, widest, *drawn)
        if embedding:
            return {"a": jnp.zeros((*batch, *ins, widest)), "b": random}
        a = jnp.moveaxis(random, len(batch), -1)
        return {"a": a, "b": jnp.zeros((*batch, widest, *outs))}

    def _columns(
        self,
        key: jax.Array,
        layers: Sequence[str],
        size: tuple[int, ...],
        ranks: Sequence[int],
        widest: int,
        normal: bool,
    ) -> jax.Array:
        """[layers, widest, *size]: each layer's number of random columns, then zeros. Column j of a
        layer depends on (its name, j) alone."""
        names = np.array([zlib.crc32(layer.encode()) for layer in layers], np.uint32)
        std = 1.0 if normal else 1.0 / math.sqrt(math.prod(size))
        bound = None if normal or self.start == "gaussian" else std
        columns = _random_columns(key, names, widest, size, bound)
        columns = columns if bound else columns * std
        live = np.arange(widest) < np.asarray(ranks)[:, None]
        live = live.reshape(*live.shape, *[1] * len(size))
        return jnp.where(live, columns * self.init_scale, 0.0)

    def numbers(self, params: Any) -> dict[str, Any]:
        """{"scale": s by leaf path, "rate": the dropout rate where there is one}."""
        rate = {"rate": np.float32(self.dropout)} if self.dropout else {}
        return {"scale": self.scales(params), **rate}

    def combine(
        self,
        params: Any,
        trainable: base.Trainable,
        *,
        key: jax.Array | None = None,
        numbers: Mapping[str, Any] | None = None,
    ) -> Any:
        numbers = self.numbers(params) if numbers is None else numbers
        return {"params": self._weights(params, trainable, key, numbers)}

    def _weights(
        self, params: Any, trainable: base.Trainable, key: Any, numbers: Mapping[str, Any]
    ) -> Any:
        flat = partition.flatten(params)
        new: dict[str, Any] = {}
        for path, value in trainable.items():
            if path not in flat:
                raise UserError(
                    f"the adapter has {path!r}, which the parameters lack: other model?"
                )
            new[path] = value
            if path in numbers["scale"]:
                dropout = (key, numbers["rate"]) if key is not None and "rate" in numbers else None
                new[path] = self._weight(path, flat[path], value, numbers["scale"][path], dropout)
        return partition.combine(params, new)

    def _weight(self, path: str, w: Any, ab: Any, scale: Any, dropout: Any = None) -> LowRank:
        layout = self.layout(path, w)
        ranks = ab["a"].shape[-1], ab["b"].shape[-1 - len(layout.axes("o"))]
        if ranks[0] != ranks[1]:  # with a rank of 1 a product would broadcast
            raise UserError(f"the factors of {path!r} are of ranks {ranks[0]} and {ranks[1]}")
        scale = jnp.asarray(scale, jnp.float32)
        # A scale or key per layer also where there are further batch axes, such as experts.
        further = (1,) * (layout.letters.count("b") - 1) if scale.ndim else ()
        keys = rate = None
        if dropout is not None:
            key, rate = dropout
            layers = [
                jax.random.fold_in(key, zlib.crc32(e.encode())) for e in partition.expand(path)
            ]
            keys = jnp.stack(layers) if partition.stack_of(path) else layers[0]
            keys = keys.reshape(keys.shape + further)
            rate = jnp.asarray(rate, jnp.float32)
        return LowRank(
            w, ab["a"], ab["b"], scale.reshape(scale.shape + further), keys, rate,
            layout.axes("i"), layout.axes("o"), path,
        )  # fmt: skip

    def merge(self, params: Any, trainable: base.Trainable) -> Any:
        """W + s·A·B, summed in float32 and rounded once to W's dtype.

        So merged and unmerged weights differ by at most half a unit in the last place of W's
        dtype, an element; `unmerge` gives W back to one unit of the larger of |W|, |W + s·A·B|.
        """
        return densify(self._weights(params, trainable, None, self.numbers(params)))

    def unmerge(self, merged: Any, trainable: base.Trainable) -> Any:
        """Takes s·A·B off again; leaves trained whole stay as they are in `merged`."""
        scales = self.scales(merged)
        flat = partition.flatten(merged)
        new = {}
        for path, scale in scales.items():
            leaf = self._weight(path, flat[path], trainable[path], -scale)
            new[path] = leaf.dense()
        return partition.replace(merged, new)

    def count(self, params: Any) -> base.Counts:
        flat = partition.flatten(params)
        own = [
            (base.target_name(path), self._parameters(path, flat[path], ranks))
            for path, ranks in self.ranks(params).items()
        ]
        whole = base.count_whole(params, base.whole_leaves(params, self.train))
        return base.Counts.of(own, whole.items())

    def _parameters(self, path: str, leaf: Any, ranks: list[int]) -> int:
        """Numbers that train in what `_factors` gives for a leaf, without padding."""
        layout, shape = self.layout(path, leaf), tuple(leaf.shape)
        width = math.prod(layout.sizes(shape, "i")) + math.prod(layout.sizes(shape, "o"))
        return sum(ranks) * width * (math.prod(layout.sizes(shape, "b")) // len(ranks))

    def frozen(self, params: Any) -> Any:
        return base.holes(params, base.whole_leaves(params, self.train))

    def to_peft(
        self, trainable: base.Trainable, names: peft.ModelNames, params: Any
    ) -> peft.AdapterFiles:
        return lora_write.write(self, trainable, names, params)

    @classmethod
    def from_peft(
        cls,
        files: peft.AdapterFiles,
        names: peft.ModelNames,
        params: Any,
        saved: base.Method | None = None,
    ) -> tuple[LoRA, base.Trainable]:
        return lora_read.read(cls, files, names, params, saved)


def takes_factors(path: str, leaf: Any) -> bool:
    """Whether the leaf is a matrix, or more than one: biases and norms go in `train`."""
    own = len(leaf.shape) - (partition.stack_of(path) is not None)
    # DenseGeneral's bias has two axes.
    return own >= 2 and path.removesuffix("/value").rsplit("/", 1)[-1] not in ("bias", "scale")


def rule_names(params: Any) -> dict[str, str]:
    """What rules call each leaf that takes factors, by its expanded path: its module, or, where
    that owns several of them, the leaf itself."""
    flat = partition.flatten(params)
    leaves = [e for p, x in flat.items() if takes_factors(p, x) for e in partition.expand(p)]
    owned = collections.Counter(map(partition.module, leaves))
    modules = {e: partition.module(e) for e in leaves}
    return {e: module if owned[module] == 1 else e for e, module in modules.items()}


def _whole(rank: Any) -> int:
    number = isinstance(rank, int | float | np.integer) and not isinstance(rank, bool)
    if not number or int(rank) != rank:
        raise UserError(f"rank={rank!r} must be a whole number")
    return int(rank)


@functools.partial(jax.jit, static_argnames=("widest", "size", "bound"))
def _random_columns(
    key: jax.Array, names: np.ndarray, widest: int, size: tuple[int, ...], bound: float | None
) -> jax.Array:
    """[names, widest, *size], each column by a key of its own: U(±bound), or N(0, 1) without one.

    Compiled, once for each size: a sweep draws the starts of many members.
    """
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(fold, (0, None))(fold(key, names), np.arange(widest))

    def draw(k: jax.Array) -> jax.Array:
        if bound is None:
            return jax.random.normal(k, size)
        return jax.random.uniform(k, size, minval=-bound, maxval=bound)

    return jax.vmap(jax.vmap(draw))(keys)
