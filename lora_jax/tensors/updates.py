"""What stands over a leaf, once a method is combined: its low-rank products, as matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.analysis.arrays import library
from lora_jax.tensors.folding import Folding
from lora_jax.tensors.low_rank import LowRank


def low_rank_parts(leaf: Any, old: Any) -> list[LowRank]:
    """The low-rank updates that stand over the old leaf; none where there is anything else."""
    parts = []
    while isinstance(leaf, LowRank | Folding):
        parts.append(leaf.folded() if isinstance(leaf, Folding) else leaf)
        leaf = leaf.w
    return parts if leaf is old else []


def factors_of(parts: Sequence[LowRank], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """(A [M, in, r], B [M, r, out]) of the sum of the parts, on the host.

    M are the leaf's matrices (layers, experts). The scale is in B; where it is 0, so is A.
    """
    return _joined(parts, lambda x: np.asarray(jax.device_get(x)).astype(dtype))


def traced_factors(parts: Sequence[LowRank]) -> tuple[jax.Array, jax.Array]:
    """`factors_of` inside of `jit` and `vmap`, in float32 or wider."""
    return _joined(parts, lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)))


def _joined(parts: Sequence[LowRank], read: Callable[[Any], Any]) -> tuple[Any, Any]:
    pairs = []
    for leaf in parts:
        batch, ins, outs = (
            tuple(leaf.shape[i] for i in axes)
            for axes in (leaf.batch_axes, leaf.in_axes, leaf.out_axes)
        )
        a, b, scale = (read(x) for x in (leaf.a, leaf.b, leaf.scale))
        xp = library(a, b)
        r, n_in, n_out = a.shape[-1], math.prod(ins), math.prod(outs)
        a = a.reshape(*a.shape[: a.ndim - len(ins) - 1], n_in, r)
        b = b.reshape(*b.shape[: b.ndim - len(outs) - 1], r, n_out)
        # As many axes as the matrices have: a scale may have fewer, a shared factor too.
        scale = scale.reshape(*(1,) * (len(batch) - scale.ndim), *scale.shape, 1, 1)
        a = xp.broadcast_to(a, (*batch, n_in, r)) * (scale != 0)
        b = xp.broadcast_to(b, (*batch, r, n_out)) * scale
        pairs.append((a.reshape(-1, n_in, r), b.reshape(-1, r, n_out)))
    xp = library(pairs[0][0])
    return xp.concatenate([a for a, _ in pairs], -1), xp.concatenate([b for _, b in pairs], -2)
