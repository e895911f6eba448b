"""Several weights over one W, chosen for each row of a batch: row i has that of member rows[i].

What differs between the members, the arrays of W + s·A·B or of any other weight over W, has an axis
over members; W does not. In a product every row takes its member's arrays, and W is multiplied
once for all rows. Rows are the first axis of what is multiplied.

Axis letters: M members, B rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import partition
from lora_jax.tensors.base import Weight, WeightError, apply_primitive, is_weight, stacked

_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Members(Weight):
    """y_b = x_b·V_m with m = rows[b] and V_m a weight over W, or an array of the member's own.

    Made by `members`. Views (transposes, one layer of a stack, …) are views of every member's.

    Args:
      w: the shared W [...]: an array, or another weight type; None where the members have arrays
        of their own in its place.
      arrays: of the members, each with an axis of M.
      rows: int32 [B], the member of each row; not sliced by scans.
      axes: where each array has M, as negative positions: they survive slicing by a scan.
      like: structure of a member's weight, with None in W's place.
      depth: how many weights a member's has over W; 0 where there is no W.
      path: W's path, for errors.
    """

    w: Any
    arrays: tuple[jax.Array, ...]
    rows: jax.Array
    axes: tuple[int, ...] = dataclasses.field(default=(), metadata=_STATIC)
    like: Any = dataclasses.field(default=None, metadata=_STATIC)
    depth: int = dataclasses.field(default=1, metadata=_STATIC)
    path: str = dataclasses.field(default="", metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.w is not None:
            return tuple(self.w.shape)
        (x,), (axis,) = self.arrays, self.axes
        return tuple(n for i, n in enumerate(x.shape) if i != x.ndim + axis)

    @property
    def dtype(self) -> Any:
        return self.arrays[0].dtype if self.w is None else self.w.dtype

    @property
    def count(self) -> int:
        """M."""
        return int(self.arrays[0].shape[self.axes[0]])

    def member(self, index: Any) -> Any:
        """The weight (or array) of one member."""
        pairs = zip(self.arrays, self.axes, strict=True)
        return self._of([jnp.take(x, index, axis=axis) for x, axis in pairs])

    def _of(self, arrays: Sequence[Any]) -> Any:
        return over(jax.tree.unflatten(self.like, arrays), self.w, self.depth)

    def dense(self) -> jax.Array:
        raise WeightError(f"{self.path!r} is another weight in each row: take one, `.member(i)`")

    def stacked(self) -> Any:
        flags: list[Any] = [True]
        w = self.w
        if w is not None:
            flags = jax.tree.leaves(over(self.member(0).stacked(), None, self.depth))
            w = stacked(w)
        new: dict[str, Any] = dict(w=w, arrays=tuple(flags), rows=False)
        return dataclasses.replace(self, **new)

    # Products: each row with its member's arrays.

    def _by_row(self, x: jax.Array, one: Callable[[Any, jax.Array], Any], place: int) -> Any:
        """one(weight, row of x) of all rows, whose results have the rows at axis `place`."""
        pairs = zip(self.arrays, self.axes, strict=True)
        of_rows = [_of_rows(a, self.rows, axis) for a, axis in pairs]
        run = jax.vmap(
            lambda arrays, x: one(self._of(arrays), x), in_axes=(list(self.axes), 0), out_axes=place
        )
        return run(of_rows, x)

    def _check(self, x: jax.Array, name: str) -> None:
        if x.ndim == 0 or x.shape[0] != self.rows.shape[0]:
            raise WeightError(
                f"{name} of {self.path!r} with an array of shape {x.shape}: its first axis should "
                f"be the {self.rows.shape[0]} rows that choose among {self.count} members"
            )

    def rule_dot_general(self, args: Sequence[Any], at: int, params: Any) -> Any:
        x, (contract, batch) = args[1 - at], params["dimension_numbers"]
        self._check(x, "a product")
        theirs, shared = contract[1 - at], batch[1 - at]
        if 0 in (*theirs, *shared):
            return NotImplemented  # summed over the rows
        less = (tuple(i - 1 for i in theirs), tuple(i - 1 for i in shared))
        pairs = [(mine, its) for mine, its in zip((contract[at], batch[at]), less, strict=True)]
        numbers = tuple((mine, its) if at == 0 else (its, mine) for mine, its in pairs)

        less_rows = {**params, "dimension_numbers": numbers}

        def one(weight: Any, row: jax.Array) -> Any:
            pair = [row, weight] if at == 1 else [weight, row]
            return apply_primitive("dot_general", pair, at, less_rows)

        # The output has the batch axes, then the left side's own, then the right side's own.
        own = self.ndim - len(contract[at]) - len(batch[at])
        return self._by_row(x, one, len(shared) + (0 if at == 1 else own))

    def rule_gather(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """Rows of an embedding (V, D) at indices [B, …]."""
        numbers, indices = params["dimension_numbers"], args[1]
        if at != 0 or 0 in numbers.offset_dims or numbers.operand_batching_dims:
            return NotImplemented
        self._check(indices, "a lookup")
        offsets = tuple(i - 1 for i in numbers.offset_dims)
        fewer = {**params, "dimension_numbers": numbers._replace(offset_dims=offsets)}
        return self._by_row(
            indices, lambda weight, row: apply_primitive("gather", [weight, row], 0, fewer), 0
        )

    # Views.

    def rule_broadcast_in_dim(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """A vector (a bias, a norm's scale) onto activations: each row gets its member's."""
        shape, axes = tuple(params["shape"]), tuple(params["broadcast_dimensions"])
        onto = self.w is None and len(shape) > 1 and shape[0] == self.rows.shape[0]
        if len(args) > 1 or not onto or (0 in axes and self.shape[axes.index(0)] != 1):
            return self._view("broadcast_in_dim", args, at, params)
        mine = self._vectors()
        if 0 in axes:
            mine = mine.squeeze(1 + axes.index(0))
        return jax.lax.broadcast_in_dim(mine, shape, (0, *(i for i in axes if i != 0)))

    def _vectors(self) -> jax.Array:
        """[B, …]: the arrays that the rows have in W's place."""
        (x,), (axis,) = self.arrays, self.axes
        return jnp.moveaxis(jnp.take(x, self.rows, axis=axis), axis, 0)

    def _elementwise(self, name: str, args: Sequence[Any], at: int, params: Any) -> Any:
        """A vector [1, …, D] with activations [B, …, D]; or a scalar with everything."""
        other = args[1 - at]
        if jnp.ndim(other) == 0:
            return self._view(name, args, at, params)
        if self.w is not None or other.ndim != self.ndim or self.shape[0] != 1:
            return NotImplemented
        self._check(other, f"{name}")
        mine = self._vectors().squeeze(1)
        return apply_primitive(name, [mine, other] if at == 0 else [other, mine], at, params)

    def _view(self, name: str, args: Sequence[Any], at: int, params: Any) -> Any:
        def viewed(weight: Any) -> Any:
            return apply_primitive(name, [*args[:at], weight, *args[at + 1 :]], at, params)

        def parts(arrays: Any) -> list[Any]:
            return jax.tree.leaves(over(viewed(self._of(arrays)), None, self.depth))

        one = viewed(self.member(0))
        w = None if self.w is None else viewed(self.w)
        like, axes = places(one, self.depth, sliced=len(one.shape) > 2 or self.w is None)
        made = jax.vmap(parts, in_axes=(list(self.axes),), out_axes=list(axes))(list(self.arrays))
        return dataclasses.replace(self, w=w, arrays=tuple(made), axes=axes, like=like)


def _view(name: str) -> Any:
    def rule(self: Members, args: Sequence[Any], at: int, params: Any) -> Any:
        return self._view(name, args, at, params)

    return rule


def _elementwise(name: str) -> Any:
    def rule(self: Members, args: Sequence[Any], at: int, params: Any) -> Any:
        return self._elementwise(name, args, at, params)

    return rule


for _name in (
    "convert_element_type", "reduce_precision", "sharding_constraint", "copy", "stop_gradient",
    "neg", "transpose", "reshape", "squeeze", "slice", "dynamic_slice",
):  # fmt: skip
    setattr(Members, f"rule_{_name}", _view(_name))
for _name in ("add", "sub", "mul", "div"):
    setattr(Members, f"rule_{_name}", _elementwise(_name))


def over(weight: Any, w: Any, depth: int) -> Any:
    """The weight with its innermost W, `depth` weights below, replaced."""
    if depth == 0:
        return weight if w is None else w
    return dataclasses.replace(weight, w=over(weight.w, w, depth - 1))


def take_rows(tree: Any, index: Any) -> Any:
    """The tree for another batch, whose row i is row index[i] of the old one; without `Members` it
    is as it was."""

    def taken(x: Any) -> Any:
        return dataclasses.replace(x, rows=x.rows[index]) if isinstance(x, Members) else x

    return jax.tree.map(taken, tree, is_leaf=is_weight)


def rows_of(tree: Any) -> int | None:
    """How many rows a batch must have for the tree's `Members`; None where it has none."""
    leaves = jax.tree.leaves(tree, is_leaf=is_weight)
    return next((len(x.rows) for x in leaves if isinstance(x, Members)), None)


def places(one: Any, depth: int, *, sliced: bool) -> tuple[Any, tuple[int, ...]]:
    """(`like`, `axes`) of members like this one: M behind the axis that a scan would slice.

    Args:
      one: a member's weight or array.
      sliced: whether it has an axis over layers.
    """
    bare = over(one, None, depth) if depth else one
    leaves, like = jax.tree.flatten(bare)
    flags = [sliced] * len(leaves)
    if depth and sliced:
        try:
            flags = jax.tree.leaves(over(one.stacked(), None, depth))
        except WeightError:  # its further axes are inputs or outputs: no scan runs along them
            flags = [False] * len(leaves)
    return like, tuple(int(f) - x.ndim - 1 for x, f in zip(leaves, flags, strict=True))


def _of_rows(x: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
    """M's axis as one of rows. Keys of dropout are made different in rows of one member."""
    x = jnp.take(x, rows, axis=axis)
    if not partition.is_key(x):
        return x
    fold = jax.random.fold_in
    for _ in range(x.ndim - 1):
        fold = jax.vmap(fold, (0, None))
    return jax.vmap(fold, (axis, 0), axis)(x, jnp.arange(rows.shape[0]))
