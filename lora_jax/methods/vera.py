"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2024, arXiv:2310.11454)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base, peft
from lora_jax.methods.peft import parts
from lora_jax.methods.structured import Structured
from lora_jax.tensors.low_rank import LowRank
from lora_jax.tensors.vera import VeraWeight

_PARTS = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
_SHARED = ("base_model.vera_A", "base_model.vera_B")


@base.register("vera", peft={"peft_type": "VERA"})
@dataclasses.dataclass(frozen=True)
class VeRA(Structured):
    """h = x·W0 + ((x·A) ∘ d)·B ∘ b with A and B frozen, random and shared by all layers (eq. 2).

    The vectors d (rank numbers) and b (one an output) are trained; b starts at zero, so the model
    is unchanged at the start. A and B are as wide as the widest target; a smaller target uses
    their first rows and columns.

    Args:
      rank: r, one number for all targets (0 leaves a module alone).
      d_initial: what d starts with, 0.1 in the paper.
      projection_seed: of A and B, which are uniform (Kaiming with the fan-in of PEFT's layout).
      alpha, scaling, start, init_scale: as they are; VeRA has no such choice.
    """

    trains: ClassVar[str] = "two vectors a target; A and B are random and shared"
    numeric: ClassVar[tuple[str, ...]] = (
        "rank", "targets", "dropout", "d_initial", "projection_seed",
    )  # fmt: skip
    # Padding of A and B is zero in a pack, so what pads d and b has no gradient.
    padding_exact: ClassVar[bool] = True
    _shared: ClassVar[Any] = None  # A and B of an adapter that another program drew

    rank: Any = 256
    d_initial: float = 0.1
    projection_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._left_out("alpha", "scaling", why="has no such choice")

    def ranks(self, params: Any) -> dict[str, list[int]]:
        found = super().ranks(params)
        different = {r for ranks in found.values() for r in ranks if r}
        if len(different) > 1:
            raise UserError(f"VeRA shares A and B: one rank for all targets, not {different}")
        return found

    def scales(self, params: Any) -> dict[str, np.ndarray]:
        """1 where a layer is adapted, else 0."""
        found = {}
        for path, ranks in self.ranks(params).items():
            on = np.asarray([float(r > 0) for r in ranks], np.float32)
            found[path] = on if partition.stack_of(path) is not None else on[0]
        return found

    def projections(self, params: Any) -> dict[str, jax.Array]:
        """{"a": A [widest in, r], "b": B [r, widest out]}."""
        if self._shared is not None:
            return dict(self._shared)
        flat, ranks = partition.flatten(params), self.ranks(params)
        n_in = max(flat[p].shape[-2] for p in ranks)
        n_out = max(flat[p].shape[-1] for p in ranks)
        rank = max(map(max, ranks.values()))
        key_a, key_b = jax.random.split(jax.random.key(self.projection_seed))
        bound_a, bound_b = math.sqrt(6.0 / n_in), math.sqrt(6.0 / rank)
        return {
            "a": jax.random.uniform(key_a, (n_in, rank), minval=-bound_a, maxval=bound_a),
            "b": jax.random.uniform(key_b, (rank, n_out), minval=-bound_b, maxval=bound_b),
        }

    def init(self, key: jax.Array, params: Any) -> base.Trainable:
        flat, ranks = partition.flatten(params), self.ranks(params)
        own: base.Trainable = {}
        for path, on in self.scales(params).items():
            d = jnp.full((*np.shape(on), max(ranks[path])), self.d_initial)
            b = jnp.zeros((*np.shape(on), flat[path].shape[-1]))
            own[path] = {"d": d * jnp.expand_dims(on, -1), "b": b}
        return {**own, **base.copies(params, base.whole_leaves(params, self.train))}

    def numbers(self, params: Any) -> dict[str, Any]:
        """LoRA's, and {"shared": A and B}, held once for all layers."""
        return {**super().numbers(params), "shared": self.projections(params)}

    def _adapted(self, leaf: LowRank, value: Any, numbers: Mapping[str, Any]) -> VeraWeight:
        arrays = {**numbers["shared"], "d": value["d"], "g": value["b"]}
        return VeraWeight(leaf.w, arrays, leaf.scale, leaf.key, leaf.rate, leaf.path)

    def _parameters(self, path: str, leaf: Any, ranks: list[int]) -> int:
        return sum(r + leaf.shape[-1] for r in ranks if r)

    def to_peft(
        self, trainable: base.Trainable, names: peft.ModelNames, params: Any
    ) -> peft.AdapterFiles:
        ranks, shared = self.ranks(params), self.projections(params)
        files = parts.write(
            names,
            {
                p: {n: parts.layers_of(p, trainable[p][k]) for k, n in _PARTS.items()}
                for p in ranks
            },
            ranks,
            {p: v for p, v in trainable.items() if p not in ranks},
            params,
            {
                "peft_type": "VERA", "r": max(map(max, ranks.values())), "save_projection": True,
                "projection_prng_key": self.projection_seed, "d_initial": self.d_initial,
                "vera_dropout": self.dropout, "bias": "none", "fan_in_fan_out": False,
            },
        )  # fmt: skip
        for name, x in zip(_SHARED, (shared["a"], shared["b"]), strict=True):
            files.tensors[name] = np.ascontiguousarray(np.asarray(x).T)
        return files

    @classmethod
    def from_peft(
        cls,
        files: peft.AdapterFiles,
        names: peft.ModelNames,
        params: Any,
        saved: base.Method | None = None,
    ) -> tuple[VeRA, base.Trainable]:
        config = files.config
        stored = parts.read(
            files, names, tuple(_PARTS.values()), shared=_SHARED,
            known={"r", "save_projection", "projection_prng_key", "d_initial", "vera_dropout",
                   "bias", "init_weights"},
        )  # fmt: skip
        lacking = [n for n in _SHARED if n not in files.tensors]
        if lacking:
            raise UserError(
                f"{files.where} has no {lacking[0]}: save it with save_projection=True, since "
                "PyTorch's random numbers cannot be drawn again here"
            )
        method = saved if isinstance(saved, VeRA) else cls(
            rank=int(config.get("r", 256)), targets=stored.targets, train=stored.train,
            dropout=float(config.get("vera_dropout") or 0.0),
            d_initial=float(config.get("d_initial", 0.1)),
            projection_seed=int(config.get("projection_prng_key") or 0),
        )  # fmt: skip
        shared = {k: jnp.asarray(files.tensors[n].T) for k, n in zip("ab", _SHARED, strict=True)}
        if saved is None or not _equal(shared, method.projections(params)):
            method = copy.copy(method)
            object.__setattr__(method, "_shared", shared)  # no field: it is in the file
        like = jax.eval_shape(lambda: method.init(jax.random.key(0), params))
        return method, parts.fill(stored, like, _PARTS, files.where)


def _equal(a: Mapping[str, jax.Array], b: Mapping[str, jax.Array]) -> bool:
    return all(np.array_equal(a[k], b[k]) for k in "ab")
