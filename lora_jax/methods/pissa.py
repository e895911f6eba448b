"""PiSSA: the principal singular vectors are trained (Meng et al. 2024, arXiv:2404.02948)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax import partition
from lora_jax.methods import base
from lora_jax.methods.offset import Offset, Starts, as_factors, check_rank, matrices


@base.register("pissa", peft={"peft_type": "LORA"})
@dataclasses.dataclass(frozen=True)
class PiSSA(Offset):
    """A0 = U·√(S/s), B0 = √(S/s)·Vᵀ of W's first r singular values (eq. 2 and 3), over s = alpha/r.

    The model is unchanged at the start. The paper's W_res is W − s·A0·B0 here, so the base stays
    as it is and the adapter is a plain LoRA of rank 2r (section 3 of its appendix on conversion).
    """

    trains: ClassVar[str] = "A and B, from W's singular vectors"

    def starts(self, params: Any) -> Starts:
        flat, scales = partition.flatten(params), self.scales(params)
        found = {}
        for path, ranks in self.ranks(params).items():
            layout, r = self.layout(path, flat[path]), max(ranks)
            check_rank(path, flat[path], layout, r)
            w = matrices(flat[path], layout)
            u, s, vt = jnp.linalg.svd(w, full_matrices=False)
            root = jnp.sqrt(s[..., :r] / per_layer(scales[path], s))
            found[path] = as_factors(
                u[..., :r] * root[..., None, :], root[..., None] * vt[..., :r, :],
                flat[path], layout, ranks,
            )  # fmt: skip
        return found


def per_layer(scale: Any, s: jax.Array) -> jax.Array:
    """A leaf's scale beside its singular values [*batch, k]; 1 where the rank, and so it, is 0."""
    scale = jnp.asarray(scale)
    scale = jnp.where(scale == 0, 1.0, scale)
    return scale.reshape(scale.shape + (1,) * (s.ndim - scale.ndim))
