"""What a weight type must say of itself, and the error for what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.extend.core import primitives
from jax.sharding import PartitionSpec

from lora_jax.errors import UserError


class WeightError(UserError):
    """An operation met a weight that has no rule for it."""


class Weight:
    """Base of leaves that know how to multiply: frozen pytree dataclasses standing for an array.

    A subclass has `shape` and `dtype` (those of the array it stands for), `path` (static, for
    errors), `dense()`, and a method per primitive it has a rule for, named after the primitive:
    `rule(self, args, position, params)` gets the equation's inputs, its own position among them
    and the primitive's parameters, and returns the output (or NotImplemented, with the error
    then saying that the rule does not cover this use).
    """

    is_weight: ClassVar[bool] = True
    # What to do where a rule is missing, for errors; `{path}` stands for the weight's.
    advice: ClassVar[str] = (
        "Leave {path!r} out of the targets, or make it dense first (lora_jax.densify)."
    )
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        raise TypeError(f"{type(self).__name__} does not define shape")

    @property
    def dtype(self) -> Any:
        raise TypeError(f"{type(self).__name__} does not define dtype")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dense(self) -> jax.Array:
        """The array this stands for."""
        raise TypeError(f"{type(self).__name__} does not define dense")

    def stacked(self) -> Any:
        """A tree of bools shaped like self: does this array carry the leading axis of `shape`?

        Scan slices those along their first axis and hands the others whole to every step.
        """
        raise TypeError(f"{type(self).__name__} does not define stacked")

    def specs(self, spec: Sequence[Any], sizes: Mapping[str, int]) -> Any:
        """A tree of PartitionSpecs shaped like self: where its arrays lie on a mesh.

        Whole on every device, unless a subclass knows better.

        Args:
          spec: the mesh axes (None, a name, or a tuple of names) of each axis of `shape`.
          sizes: devices along each mesh axis.
        """
        return jax.tree.map(lambda _: PartitionSpec(), self)

    def rule_unstack(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """The layers of a stack (or other unit slices), as slices that lose the axis."""
        axis, found = params["axis"], []
        for i in range(self.shape[axis]):
            start, limit = [0] * self.ndim, list(self.shape)
            start[axis], limit[axis] = i, i + 1
            cut = dict(start_indices=tuple(start), limit_indices=tuple(limit), strides=None)
            one = apply_primitive("slice", [self], 0, cut)
            found.append(apply_primitive("squeeze", [one], 0, {"dimensions": (axis,)}))
        return found


class Over(Weight):
    """A weight that stands over another, its field `w`: an array or a weight in turn."""

    w: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.shape)

    @property
    def dtype(self) -> Any:
        return self.w.dtype


def is_weight(x: Any) -> bool:
    return getattr(type(x), "is_weight", False)


def stacked(x: Any) -> Any:
    """`Weight.stacked` of a weight; True for an array."""
    return x.stacked() if is_weight(x) else True


def wide(dtype: Any) -> Any:
    """What products are summed in: float32, or the wider type of what is multiplied."""
    return jnp.promote_types(dtype, jnp.float32)


def densify(tree: Any) -> Any:
    """The tree with every weight replaced by the dense array it stands for."""
    return jax.tree.map(lambda x: x.dense() if is_weight(x) else x, tree, is_leaf=is_weight)


def apply_primitive(name: str, args: Sequence[Any], at: int, params: Any) -> Any:
    """The primitive on the array or weight `args[at]`: by its own rule where it is a weight.

    What a rule of one weight type uses for the weight inside it, so that types compose.
    """
    weight = args[at]
    if is_weight(weight):
        rule = getattr(weight, f"rule_{name}", None)
        result = NotImplemented if rule is None else rule(args, at, params)
        if result is NotImplemented:
            advice = weight.advice.format(path=weight.path)
            kind = type(weight).__name__
            raise WeightError(f"{name} is not possible on {weight.path!r} ({kind}). {advice}")
        return result
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](*args, **params)
    return getattr(primitives, f"{name}_p").bind(*args, **params)


# Primitives that JAX does not export, as the functions that bind them.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "split": jax.lax.split,
    "ragged_dot_general": jax.lax.ragged_dot_general,
}
