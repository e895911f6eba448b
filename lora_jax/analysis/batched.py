"""Spectra of many products of two factors, of several shapes, in one compiled program."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lora_jax.analysis.arrays import dot, turned


def all_singular_values(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
    """[M, k] of each A·B, falling; as `singular_values` of each pair, in few large calls.

    Factors of one shape are decomposed together, whichever pair they are of.

    Args:
      pairs: (A [M, in, r], B [M, r, out]); M, in, out and r may differ between pairs.
    """
    tall = [x for a, b in pairs for x in (a, turned(b))]
    r = _grouped(lambda x: jnp.linalg.qr(x, mode="r"), tall)
    cores = [dot(ra, turned(rb)) for ra, rb in zip(r[::2], r[1::2], strict=True)]
    return _grouped(lambda x: jnp.linalg.svd(x, compute_uv=False), cores)


def _grouped(
    function: Callable[[jax.Array], jax.Array], xs: Sequence[jax.Array]
) -> list[jax.Array]:
    """`function` of each x [M, …], called once for each shape of matrices, in turn."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for at, x in enumerate(xs):
        groups.setdefault(x.shape[1:], []).append(at)
    stacks = [jnp.concatenate([xs[at] for at in group]) for group in groups.values()]
    found: list[jax.Array] = [jnp.zeros(())] * len(xs)
    for group, y in zip(groups.values(), _in_turn(function, stacks), strict=True):
        pieces = jax.lax.split(y, [xs[at].shape[0] for at in group])
        for at, piece in zip(group, pieces, strict=True):
            found[at] = piece
    return found


def _in_turn(
    function: Callable[[jax.Array], jax.Array], xs: Sequence[jax.Array]
) -> Sequence[jax.Array]:
    """[function(x) for x in xs], no two calls at one time.

    On a CPU a batched decomposition waits for threads of the pool that it runs in itself. Where
    one program holds several that do not depend on each other, all threads may come to wait: with
    jaxlib 0.10 on two cores this hangs for ever. So they are steps of a loop.
    """
    if len(xs) == 1:
        return [function(xs[0])]

    def calling(at: int) -> Callable[[list[jax.Array]], list[jax.Array]]:
        return lambda done: [*done[:at], function(xs[at]), *done[at + 1 :]]

    branches = [calling(at) for at in range(len(xs))]
    empty = [jnp.zeros(y.shape, y.dtype) for y in (jax.eval_shape(function, x) for x in xs)]
    numbers = jnp.arange(len(xs))
    return jax.lax.scan(lambda done, i: (jax.lax.switch(i, branches, done), None), empty, numbers)[
        0
    ]
