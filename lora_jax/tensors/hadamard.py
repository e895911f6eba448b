"""W + s·(A1·B1) ∘ (A2·B2): the update of LoHa (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098).

Its rank reaches r², and it is exactly the low-rank update whose factors are the row-wise products
of A1 with A2 and of B1 with B2 (proposition 1 of the paper): so it is never made dense.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from lora_jax.tensors.folding import Folding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hadamard(Folding):
    """y = x·W + s·x·((A1·B1) ∘ (A2·B2)).

    Parts: a1, a2 [*batch, in, r] and b1, b2 [*batch, r, out].
    """

    OWN_AXES: ClassVar[dict[str, int]] = {"a1": 2, "b1": 2, "a2": 2, "b2": 2}

    def factors(self) -> tuple[jax.Array, jax.Array]:
        a1, a2, b1, b2 = (self.parts[k] for k in ("a1", "a2", "b1", "b2"))
        a = a1[..., :, None] * a2[..., None, :]  # [*batch, in, r, r]
        b = b1[..., :, None, :] * b2[..., None, :, :]  # [*batch, r, r, out]
        pairs = a.shape[-2] * a.shape[-1]
        return a.reshape(*a.shape[:-2], pairs), b.reshape(*b.shape[:-3], pairs, b.shape[-1])
