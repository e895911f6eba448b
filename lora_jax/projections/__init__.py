"""Random projections P of a short vector into all parameters, never held as a matrix.

`make("fastfood", size)` gives a `Projection`; P is decided by its kind, its size D and a key.
"""

from __future__ import annotations

from lora_jax.errors import UserError, nearest
from lora_jax.projections.base import LONG, Projection
from lora_jax.projections.dense import Dense
from lora_jax.projections.fastfood import Fastfood
from lora_jax.projections.sparse import Sparse

__all__ = ["KINDS", "LONG", "Dense", "Fastfood", "Projection", "Sparse", "check", "make"]

KINDS: dict[str, type[Projection]] = {"dense": Dense, "sparse": Sparse, "fastfood": Fastfood}


def check(kind: str) -> None:
    """UserError where there is no such kind of projection."""
    if kind not in KINDS:
        raise UserError(f"no projection {kind!r}; {nearest(kind, KINDS)}")


def make(kind: str, size: int, cached: bool | None = None) -> Projection:
    """The projection to R^size.

    Args:
      kind: "dense", "sparse" or "fastfood".
      cached: whether the random arrays are held between passes or drawn anew in each (the same
        P either way); None: held where `size` is at most the kind's `CACHED_UP_TO`.
    """
    check(kind)
    cls = KINDS[kind]
    return cls(size, size <= cls.CACHED_UP_TO if cached is None else cached)
