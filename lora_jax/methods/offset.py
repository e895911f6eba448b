"""Low-rank updates that start from factors of their own: W − s·A0·B0 + s·A·B, with A = A0, B = B0.

The base is never changed: A0 and B0 are kept among the method's numbers. As a plain LoRA the
update has rank 2r, A beside A0 over B above −B0, which is exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base, peft
from lora_jax.methods.lora import LoRA
from lora_jax.methods.plain import plain_lora
from lora_jax.tensors.base import densify
from lora_jax.tensors.low_rank import LowRank

Starts = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Offset(LoRA):
    """Base of such methods; a subclass defines `starts`. Fields as in LoRA, without a start."""

    numeric: ClassVar[tuple[str, ...]] = ("rank", "alpha", "targets", "scaling", "dropout")
    # Zero columns beside zero rows stay so, whatever the other columns start from.
    padding_exact: ClassVar[bool] = True
    # Columns of its decomposition that a column of A takes.
    _each: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._left_out("start", "init_scale", why="has a start of its own")

    def starts(self, params: Any) -> Starts:
        """{"a": A0, "b": B0} by leaf path, zero where a layer has a smaller rank."""
        raise TypeError(f"{type(self).__name__} does not define starts")

    def knows_start(self, params: Any) -> bool:
        """Whether `starts` has what it needs: the base's weights, and whatever else."""
        return not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))

    def init(self, key: jax.Array, params: Any) -> base.Trainable:
        own: base.Trainable = jax.tree.map(jnp.copy, self.starts(params))
        return {**own, **base.copies(params, base.whole_leaves(params, self.train))}

    def numbers(self, params: Any) -> dict[str, Any]:
        """LoRA's, and {"start": A0 and B0 by leaf path}.

        They are computed anew (a decomposition of each target): call this once and hand the
        result to `combine` where it is used again and again, as the trainer does.
        """
        return {**super().numbers(params), "start": self.starts(params)}

    def _weights(
        self, params: Any, trainable: base.Trainable, key: Any, numbers: Mapping[str, Any]
    ) -> Any:
        tree = super()._weights(params, trainable, key, numbers)
        flat = partition.flatten(tree)
        new = {p: _offset(flat[p], start) for p, start in numbers["start"].items()}
        return partition.replace(tree, new)

    def _parameters(self, path: str, leaf: Any, ranks: list[int]) -> int:
        # Also where nothing is decomposed yet, so that `match_budget` knows where ranks end.
        check_rank(path, leaf, self.layout(path, leaf), max(ranks), self._each)
        return super()._parameters(path, leaf, ranks)

    def unmerge(self, merged: Any, trainable: base.Trainable) -> Any:
        """UserError: A0 and B0 are those of W, and cannot be had from what it became."""
        raise UserError(f"{type(self).__name__} cannot be unmerged: keep the base's parameters")

    def to_lora(self, params: Any, trainable: base.Trainable) -> tuple[LoRA, base.Trainable]:
        """The plain LoRA of twice the rank that computes the same on the unchanged base."""
        if not Offset.knows_start(self, params):
            raise UserError(f"{type(self).__name__} needs the base's weights: give params=")
        factors, columns = {}, {}
        for path, start in self.starts(params).items():
            leaf = LowRank(partition.flatten(params)[path], **trainable[path], scale=jnp.ones(()))
            both = _offset(self._axes(path, leaf), start)
            factors[path] = {"a": both.a, "b": both.b}
            widest = start["a"].shape[-1]
            columns[path] = [
                [*range(r), *range(widest, widest + r)] for r in self.ranks(params)[path]
            ]
        return plain_lora(self, params, trainable, factors, columns)

    def settle(self, params: Any, trainable: base.Trainable) -> tuple[LoRA, base.Trainable]:
        """The plain LoRA: after training the start is no longer needed to know what was learnt."""
        return self.to_lora(params, trainable)

    def _axes(self, path: str, leaf: LowRank) -> LowRank:
        layout = self.layout(path, leaf.w)
        return dataclasses.replace(leaf, in_axes=layout.axes("i"), out_axes=layout.axes("o"))

    def to_peft(
        self, trainable: base.Trainable, names: peft.ModelNames, params: Any
    ) -> peft.AdapterFiles:
        lora, tree = self.to_lora(params, trainable)
        return lora.to_peft(tree, names, params)

    @classmethod
    def from_peft(
        cls,
        files: peft.AdapterFiles,
        names: peft.ModelNames,
        params: Any,
        saved: base.Method | None = None,
    ) -> tuple[LoRA, base.Trainable]:
        """The plain LoRA of the file where it is not, or cannot be seen to be, `saved`'s."""
        lora, tree = LoRA.from_peft(files, names, params)
        if not isinstance(saved, Offset) or not saved.knows_start(params):
            return lora, tree
        ranks = saved.ranks(params)
        if lora.ranks(params) != {p: [2 * r for r in layers] for p, layers in ranks.items()}:
            return lora, tree
        found = {}
        for path, start in saved.starts(params).items():
            own, rest = _halves(tree[path], ranks[path], saved, path, params)
            was, now = (_product(x) for x in ({"a": rest["a"], "b": -rest["b"]}, start))
            if not np.allclose(was, now, rtol=1e-3, atol=1e-3 * float(np.abs(now).max())):
                return lora, tree  # of another base
            found[path] = own
        return saved, {p: found.get(p, v) for p, v in tree.items()}


def matrices(leaf: Any, layout: Any) -> jax.Array:
    """A leaf as float32 matrices [*batch, in, out], with input and output axes flattened."""
    w = densify(leaf)
    shape = tuple(w.shape)
    order = [i for letter in "bio" for i, x in enumerate(layout.letters) if x == letter]
    sizes = {k: layout.sizes(shape, k) for k in "bio"}
    n_in, n_out = (int(np.prod(sizes[k])) for k in "io")
    return jnp.transpose(jnp.asarray(w, jnp.float32), order).reshape(*sizes["b"], n_in, n_out)


def as_factors(a: jax.Array, b: jax.Array, leaf: Any, layout: Any, ranks: list[int]) -> Any:
    """{"a": [*batch, *in, r], "b": [*batch, r, *out]} of [*batch, in, r] and [*batch, r, out].

    Columns beyond a layer's rank become zero.
    """
    shape, r = tuple(leaf.shape), a.shape[-1]
    batch, ins, outs = (layout.sizes(shape, k) for k in "bio")
    live = np.arange(r) < np.asarray(ranks)[:, None]  # [layers, r]
    further = int(np.prod(batch)) // len(ranks)
    live = np.repeat(live, further, axis=0).reshape(*batch, r)
    a, b = jnp.where(live[..., None, :], a, 0.0), jnp.where(live[..., :, None], b, 0.0)
    return {"a": a.reshape(*batch, *ins, r), "b": b.reshape(*batch, r, *outs)}


def check_rank(path: str, leaf: Any, layout: Any, rank: int, each: int = 1) -> None:
    """UserError where a decomposition of the leaf's matrices has fewer than each·rank columns."""
    shape = tuple(leaf.shape)
    most = min(math.prod(layout.sizes(shape, k)) for k in "io")
    if each * rank > most:
        raise UserError(
            f"rank {rank} at {path!r}, whose decomposition has only {most} columns: choose "
            f"{most // each} or less, or leave it out of targets"
        )


def _offset(leaf: LowRank, start: Mapping[str, jax.Array]) -> LowRank:
    """leaf − s·A0·B0."""
    axis = leaf.b.ndim - len(leaf.out_axes) - 1
    if leaf.key is None:
        # One product for both: at the start they cancel before anything is rounded.
        a = jnp.concatenate([leaf.a, start["a"]], -1)
        b = jnp.concatenate([leaf.b, -start["b"]], axis)
        return dataclasses.replace(leaf, a=a, b=b)
    inner = dataclasses.replace(leaf, a=start["a"], b=-start["b"], key=None, rate=None)
    return dataclasses.replace(leaf, w=inner)  # dropout is of what is trained alone


def _halves(
    ab: Any, ranks: list[int], method: LoRA, path: str, params: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each layer's first r columns and its next r, as two pairs of factors."""
    layout = method.layout(path, partition.flatten(params)[path])
    axis = layout.letters.count("b")
    index = np.asarray([[*range(max(ranks))]] * len(ranks))
    pairs = []
    for offset in (0, 1):
        at = np.where(index < np.asarray(ranks)[:, None], index, 0)
        at = at + offset * np.asarray(ranks)[:, None]
        live = index < np.asarray(ranks)[:, None]
        stacked = partition.stack_of(path) is not None
        a, b = np.asarray(ab["a"]), np.moveaxis(np.asarray(ab["b"]), axis, -1)
        halves = []
        for x in (a, b):
            x = x if stacked else x[None]
            rows = [
                np.where(live[i], x[i][..., at[i]], 0.0).astype(np.float32)
                for i in range(len(ranks))
            ]
            halves.append(np.stack(rows) if stacked else rows[0])
        b = np.moveaxis(halves[1], -1, axis)
        pairs.append({"a": jnp.asarray(halves[0]), "b": jnp.asarray(b)})
    return pairs[0], pairs[1]


def _product(ab: Mapping[str, Any]) -> np.ndarray:
    """A·B of matrices, or of a stack of them."""
    return np.einsum("...ir,...ro->...io", np.asarray(ab["a"]), np.asarray(ab["b"]))
