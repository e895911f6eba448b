"""The size at which a method has so many trainable parameters, for comparisons at one budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.errors import UserError
from lora_jax.methods.base import Method

_LARGEST = 1 << 40


def match_budget(method: Method, params: Any, n: int) -> int:
    """The size (rank, units, length, …: `Method.size_field`) whose count is closest to n.

    `method.with_size(size)` is then the method to use. `method.count` is taken to grow with the
    size, mostly in proportion: few sizes are counted where it does, and as bisection does where it
    does not. Leaves trained whole besides count too. Nothing is allocated.

    Args:
      method: with any size; its other fields (targets, `train`) stay.
      params: the base's parameters or their shapes.
      n: trainable parameters wanted; less than the smallest size has gives the smallest.

    Raises:
      UserError: the method has no size, or has rules in its place; or what it says where no size
        is possible.
    """
    if n < 1:
        raise UserError(f"a budget of {n} parameters: it must be at least 1")
    like = jax.eval_shape(lambda p: p, params)

    def count(size: int) -> int:
        sized = method.with_size(size)
        return sized.count(jax.eval_shape(sized.arrange, like)).total

    found = _Counts(count)
    smallest = _first(found.possible, 1)
    if smallest is None:
        count(1)  # says why
        raise UserError(f"{method.name!r} has no possible {type(method).size_field}")
    # Up to where it is too much, or no longer possible.
    low, high = smallest, smallest + 1
    while found.possible(high) and found(high) < n and high < _LARGEST:
        low, high = high, min(max(high + 1, found.line(low, high, n)), 2 * high)
    halve = False
    while low < high - 1:
        middle = (low + high) // 2
        if found.possible(high) and not halve:
            middle = min(max(low + 1, found.line(low, high, n) - 1), high - 1)
        if found.possible(middle) and found(middle) < n:
            low = middle
        else:
            high = middle
        halve = not halve
    return min(found.known, key=lambda size: (abs(found.known[size] - n), size))


class _Counts:
    """Counts by size, of the sizes that were asked for and are possible."""

    def __init__(self, count: Callable[[int], int]):
        self._count = count
        self.known: dict[int, int] = {}
        self._impossible: set[int] = set()

    def __call__(self, size: int) -> int:
        return self.known[size]

    def line(self, low: int, high: int, n: int) -> int:
        """The size from which on the straight line through two counts is n or more."""
        rise = self.known[high] - self.known[low]
        if rise <= 0:
            return 2 * high
        return low + -((self.known[low] - n) * (high - low) // rise)

    def possible(self, size: int) -> bool:
        if size not in self.known and size not in self._impossible:
            try:
                self.known[size] = self._count(size)
            except UserError:
                self._impossible.add(size)
        return size in self.known


def _first(possible: Callable[[int], bool], size: int) -> int | None:
    """The smallest possible size from this one on; None where doubling it finds none."""
    if possible(size):
        return size
    high = 2 * size
    while not possible(high):
        high *= 2
        if high > _LARGEST:
            return None
    low = high // 2
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (low, middle) if possible(middle) else (middle, high)
    return high
