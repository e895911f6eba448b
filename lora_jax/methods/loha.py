"""LoHa: a Hadamard product of two low-rank updates (Hyeon-Woo et al. 2022, arXiv:2108.06098)."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.methods import base, peft
from lora_jax.methods.structured import Part, Structured
from lora_jax.tensors.hadamard import Hadamard
from lora_jax.tensors.low_rank import LowRank

# PEFT's parts, of W held as (out, in), beside ours, and the axis of ours along which ranks run.
_PARTS = {
    "b1": Part("hada_w1_a", -2), "a1": Part("hada_w1_b", -1),
    "b2": Part("hada_w2_a", -2), "a2": Part("hada_w2_b", -1),
}  # fmt: skip


@base.register("loha", peft={"peft_type": "LOHA"})
@dataclasses.dataclass(frozen=True)
class LoHa(Structured):
    """h = x·W0 + s·x·((A1·B1) ∘ (A2·B2)), s = alpha/r: rank up to r² from 2r(in + out) numbers.

    A1, B1 and B2 are uniform as in PEFT (He's start with the fan-in of PEFT's layout) and A2 is
    zero, so the model is unchanged at the start. Other fields as in LoRA; only matrices.
    """

    trains: ClassVar[str] = "the factors of two products, multiplied entry by entry"

    # Columns that are zero in A1, B1, A2 and B2 have no gradient in any of them.
    padding_exact: ClassVar[bool] = True

    def _drawn(self, key: jax.Array, layer: str, leaf: Any, r: int, widest: int) -> dict[str, Any]:
        n_in, n_out = leaf.shape[-2:]

        def columns(name: str, size: int, bound: float) -> jax.Array:
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            # LoRA's columns are within 1/sqrt(size); a layer of rank 0 has none.
            drawn = self._columns(own, [layer], (size,), [r], widest, False)[0]
            return drawn * (math.sqrt(size) * bound)

        root_r, root_in = 1 / math.sqrt(max(r, 1)), 1 / math.sqrt(n_in)
        return {
            "a1": columns("a1", n_in, root_in).T,
            "b1": columns("b1", n_out, root_r),
            "a2": jnp.zeros((n_in, widest)),
            "b2": columns("b2", n_out, root_r),
        }

    def _adapted(self, leaf: LowRank, value: Any, numbers: Mapping[str, Any]) -> Hadamard:
        return Hadamard(leaf.w, dict(value), leaf.scale, leaf.key, leaf.rate, leaf.path)

    def _parameters(self, path: str, leaf: Any, ranks: list[int]) -> int:
        return 2 * super()._parameters(path, leaf, ranks)

    def to_peft(
        self, trainable: base.Trainable, names: peft.ModelNames, params: Any
    ) -> peft.AdapterFiles:
        return self._write("LOHA", _PARTS, trainable, names, params)

    @classmethod
    def from_peft(
        cls,
        files: peft.AdapterFiles,
        names: peft.ModelNames,
        params: Any,
        saved: base.Method | None = None,
    ) -> tuple[LoHa, base.Trainable]:
        return cls._read(_PARTS, files, names, params, saved)
