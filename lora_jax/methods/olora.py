"""OLoRA: an orthonormal start from W's QR decomposition (Büyükakyüz 2024, arXiv:2406.01775)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from lora_jax import partition
from lora_jax.methods import base
from lora_jax.methods.offset import Offset, Starts, as_factors, check_rank, matrices


@base.register("olora", peft={"peft_type": "LORA"})
@dataclasses.dataclass(frozen=True)
class OLoRA(Offset):
    """Wᵀ = Q·R; B0 = the first r columns of Q, A0 the first r rows of R (algorithm 1), transposed.

    The paper's W is (out, in), ours (in, out): hence the transpose. The model is unchanged at the
    start, and the base stays as it is: what the paper takes from W is kept beside it.
    """

    trains: ClassVar[str] = "A and B, from W's QR decomposition"

    def starts(self, params: Any) -> Starts:
        flat = partition.flatten(params)
        found = {}
        for path, ranks in self.ranks(params).items():
            layout, r = self.layout(path, flat[path]), max(ranks)
            check_rank(path, flat[path], layout, r)
            w = matrices(flat[path], layout)
            q, upper = jnp.linalg.qr(jnp.swapaxes(w, -1, -2))
            found[path] = as_factors(
                jnp.swapaxes(upper[..., :r, :], -1, -2), jnp.swapaxes(q[..., :, :r], -1, -2),
                flat[path], layout, ranks,
            )  # fmt: skip
        return found
