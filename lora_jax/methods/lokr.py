"""LoKr: a Kronecker product as the update (Yeh et al. 2023, arXiv:2309.14859, section 4.3)."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base, peft
from lora_jax.methods.structured import Part, Structured
from lora_jax.tensors.kronecker import Kronecker
from lora_jax.tensors.low_rank import LowRank

# C is PEFT's w1 and D its w2, of W held as (out, in); whole, or of two factors.
_PARTS = {
    "c": Part("lokr_w1"), "c_out": Part("lokr_w1_a", -2), "c_in": Part("lokr_w1_b", -1),
    "d": Part("lokr_w2"), "d_out": Part("lokr_w2_a", -2), "d_in": Part("lokr_w2_b", -1),
}  # fmt: skip


@base.register("lokr", peft={"peft_type": "LOKR"})
@dataclasses.dataclass(frozen=True)
class LoKr(Structured):
    """h = x·W0 + s·x·(C ⊗ D), s = alpha/r, with a small C and a D of rank r at most.

    W of (in, out) = (m·n, l·k) takes C of (m, l) and D of (n, k). As in PEFT, D is D_in·D_out of
    rank r where r is below half its longer side, and a whole matrix otherwise; C is whole unless
    `decompose_both`. C (or C_out) is zero at the start, so the model is unchanged.

    Args:
      decompose_factor: m and l, where it divides in and out; -1: the divisors nearest the root.
      decompose_both: C in two factors too, where r is below half its longer side.
    """

    trains: ClassVar[str] = "the factors of a Kronecker product"

    # Whether D is one array or two depends on the rank: padding would mix the two forms.
    padding_exact: ClassVar[bool] = False

    decompose_factor: int = -1
    decompose_both: bool = False

    def sides(self, leaf: Any) -> tuple[int, int, int, int]:
        """(m, n, l, k) of a leaf [*batch, m·n, l·k]."""
        return (
            *divide(leaf.shape[-2], self.decompose_factor),
            *divide(leaf.shape[-1], self.decompose_factor),
        )

    def _shapes(self, leaf: Any, r: int) -> dict[str, tuple[int, int]]:
        """The arrays of one layer, by name."""
        m, n, l, k = self.sides(leaf)  # noqa: E741
        small = self.decompose_both and r < max(m, l) / 2
        c = {"c_in": (m, r), "c_out": (r, l)} if small else {"c": (m, l)}
        d = {"d_in": (n, r), "d_out": (r, k)} if r < max(n, k) / 2 else {"d": (n, k)}
        return {**c, **d}

    def ranks(self, params: Any) -> dict[str, list[int]]:
        found = super().ranks(params)
        flat = partition.flatten(params)
        for path, ranks in found.items():
            forms = {tuple(self._shapes(flat[path], r)) for r in ranks if r}
            if len(forms) > 1:
                raise UserError(
                    f"ranks {sorted(set(ranks))} of the layers of {path!r} need arrays of "
                    "different kinds: choose them all below, or all above, half of LoKr's sides"
                )
        return found

    def _drawn(self, key: jax.Array, layer: str, leaf: Any, r: int, widest: int) -> dict[str, Any]:
        """A layer's arrays: uniform within 1/sqrt(fan-in), which is our first axis; C zero."""
        key = jax.random.fold_in(key, zlib.crc32(layer.encode()))
        found = {}
        for name, shape in self._shapes(leaf, widest).items():
            rank_axis = _PARTS[name].rank_axis
            live = np.ones(shape, bool)
            if rank_axis is not None:
                index = np.arange(widest)
                live = np.broadcast_to(
                    (index < r)[:, None] if rank_axis == -2 else index < r, shape
                )
            elif not r:
                live = np.zeros(shape, bool)
            fan_in = max(r, 1) if rank_axis == -2 else shape[0]
            bound = 0.0 if name in ("c", "c_out") else 1 / math.sqrt(fan_in)
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            drawn = jax.random.uniform(own, shape, minval=-1.0, maxval=1.0) * bound
            found[name] = jnp.where(live, drawn, 0.0)
        return found

    def _adapted(self, leaf: LowRank, value: Any, numbers: Mapping[str, Any]) -> Kronecker:
        c = value["c"] if "c" in value else value["c_in"] @ value["c_out"]
        d = value["d"] if "d" in value else value["d_in"] @ value["d_out"]
        return Kronecker(leaf.w, c, d, leaf.scale, leaf.key, leaf.rate, leaf.path)

    def _parameters(self, path: str, leaf: Any, ranks: list[int]) -> int:
        return sum(math.prod(s) for r in ranks if r for s in self._shapes(leaf, r).values())

    def to_peft(
        self, trainable: base.Trainable, names: peft.ModelNames, params: Any
    ) -> peft.AdapterFiles:
        return self._write(
            "LOKR", _PARTS, trainable, names, params,
            decompose_factor=self.decompose_factor, decompose_both=self.decompose_both,
        )  # fmt: skip

    @classmethod
    def from_peft(
        cls,
        files: peft.AdapterFiles,
        names: peft.ModelNames,
        params: Any,
        saved: base.Method | None = None,
    ) -> tuple[LoKr, base.Trainable]:
        return cls._read(
            _PARTS, files, names, params, saved,
            decompose_factor=int(files.config.get("decompose_factor", -1)),
            decompose_both=bool(files.config.get("decompose_both")),
        )  # fmt: skip


def divide(size: int, factor: int) -> tuple[int, int]:
    """size as (m, n), by PEFT's rule.

    m is `factor` where that divides the size, also where n is then smaller; else the largest
    divisor up to the root, and up to the factor, on the way to which m + n never grows.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    best = max(m for m in range(1, math.isqrt(size) + 1) if size % m == 0 and m <= max(limit, 1))
    return best, size // best
