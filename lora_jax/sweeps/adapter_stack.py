"""Trained adapters of one base, stacked as a pack's states are, to serve or to train together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.errors import UserError
from lora_jax.methods import Method
from lora_jax.methods.members import combine_members
from lora_jax.sweeps import padding


@dataclasses.dataclass(frozen=True)
class AdapterStack:
    """M adapters in one tree, padded with zeros to their hull.

    Attributes:
      method: whose structure all share; nothing is read from its numeric fields.
      methods: each adapter's own.
      trainable, numbers: with a leading axis over the adapters.
      shapes: of each adapter's own trainable tree.
    """

    method: Method
    methods: tuple[Method, ...]
    trainable: Any
    numbers: Any
    shapes: tuple[Any, ...]

    def combine(
        self, params: Any, rows: Any, *, trainable: Any = None, key: jax.Array | None = None
    ) -> Any:
        """Variables for a batch whose row b is the adapter rows[b]'s: see `combine_members`.

        Args:
          trainable: in place of the stack's own, as while it trains.
        """
        trainable = self.trainable if trainable is None else trainable
        return combine_members(self.method, params, trainable, rows, numbers=self.numbers, key=key)

    def take(self, index: int, trainable: Any = None) -> tuple[Method, Any]:
        """(method, trainable) of one adapter, without padding: as it went in, or as trained."""
        trainable = self.trainable if trainable is None else trainable
        return self.methods[index], padding.cut(padding.take(trainable, index), self.shapes[index])


def stack_adapters(params: Any, adapters: Sequence[tuple[Method, Any]]) -> AdapterStack:
    """Adapters of one method that differ in numbers (rank, alpha, targets, …), as one stack.

    Args:
      params: the base's parameters.
      adapters: (method, trainable) each.

    Raises:
      UserError: methods of different kinds or structure, or whose padding is not exact and whose
        sizes differ. `combine_adapters` makes plain LoRAs of others.
    """
    if not adapters:
        raise UserError("no adapters to stack")
    methods, trees = tuple(m for m, _ in adapters), [dict(t) for _, t in adapters]
    first = methods[0]
    for other in methods[1:]:
        if (odd := _odd_field(first, other)) is not None:
            raise UserError(
                f"adapters of {first.name!r} and {other.name!r} that differ in {odd} cannot share "
                "a program; lora_jax.combine_adapters(params, [one], [1.0]) makes a plain LoRA"
            )
    shapes = tuple(jax.eval_shape(lambda t=t: t) for t in trees)
    if not type(first).padding_exact and any(s != shapes[0] for s in shapes):
        raise UserError(f"adapters of {first.name!r} cannot be padded: all must be of one size")
    numbers = [m.numbers(params) for m in methods]
    like, like_numbers = padding.hull(trees), padding.hull(numbers)
    return AdapterStack(
        method=first,
        methods=methods,
        trainable=padding.stack([padding.pad(t, like) for t in trees]),
        numbers=padding.stack([padding.pad(n, like_numbers) for n in numbers]),
        shapes=shapes,
    )


def _odd_field(one: Method, other: Method) -> str | None:
    if type(one) is not type(other):
        return "kind"
    numeric = type(one).numeric
    for field in dataclasses.fields(one):
        if field.name not in numeric and getattr(one, field.name) != getattr(other, field.name):
            return field.name
    return None
