"""EVA: A starts from what its inputs vary along (Paischer et al. 2024, arXiv:2410.07170)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base, data_driven
from lora_jax.methods.lora import LoRA, rule_names
from lora_jax.methods.offset import as_factors
from lora_jax.methods.peft.patterns import rules, seven_digits
from lora_jax.tensors.probe import Probe


@base.register("eva", peft={"peft_type": "LORA"})
@dataclasses.dataclass(frozen=True)
class EVA(LoRA):
    """LoRA whose A holds the first principal directions of each module's inputs (section 3).

    `prepare` looks at `batches` batches, whose padding is left out, and gives ranks to the
    modules by the share of variance that a direction explains: the best of all modules' first
    rho·rank directions, as many as uniform ranks have in sum (algorithm 1). B is zero, so the
    model is unchanged at the start. The prepared method has the ranks as rules, and its file is
    an ordinary LoRA; before `prepare`, and where it is read from a file, the start is LoRA's.

    Args:
      rank: r on average, one number.
      batches: to look at.
      rho: a module's rank is at most rho·rank; 1: ranks stay uniform.
      whiten: divides a direction by the standard deviation of the inputs along it.
      alpha: with unequal ranks the scale alpha/rank is that of the uniform rank for all, as PEFT
        does it by adjusting alpha.
    """

    trains: ClassVar[str] = "A and B, A from its inputs' principal directions"
    numeric: ClassVar[tuple[str, ...]] = (*LoRA.numeric, "batches", "rho", "whiten")
    _start: ClassVar[Any] = None  # {leaf path: A [*batch, in, r]}, set by `prepare`

    batches: int = 4
    rho: float = 2.0
    whiten: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 1 or self.rho < 1.0:
            raise UserError(f"EVA needs batches={self.batches} and rho={self.rho} at least 1")

    def prepare(self, apply: Callable[..., Any], params: Any, batches: Iterable[Any]) -> EVA:
        if not isinstance(self.rank, int):
            raise UserError("EVA chooses ranks itself: give it one number, not rules")
        seen = data_driven.first(batches, self.batches, "EVA")
        ratios, vectors, deviations = {}, {}, {}
        widest = int(self.rank * self.rho)
        for path, moments in self._moments(apply, params, seen).items():
            if np.any(moments[..., -1, -1] == 0):
                raise UserError(f"EVA: no input goes through {path!r}; take it off targets")
            ratios[path], vectors[path], deviations[path] = _principal(moments, widest)
        ranks = self._allocate(params, ratios)
        flat, start = partition.flatten(params), {}
        kept = {path: layers for path, layers in ranks.items() if any(layers)}
        for path, layers in kept.items():
            most = max(layers)
            a = vectors[path][..., :most]
            if self.whiten:
                a = a / deviations[path][..., None, :most]
            layout = self.layout(path, flat[path])
            none = jnp.zeros((*a.shape[:-2], most, flat[path].shape[-1]))
            start[path] = as_factors(jnp.asarray(a), none, flat[path], layout, layers)["a"]
        names = rule_names(params)
        every = list(names.values())
        by_module, alphas = {}, {}
        power = 0.5 if self.scaling == "rslora" else 1.0
        for path, layers in ranks.items():
            for ours, r in zip(partition.expand(path), layers, strict=True):
                by_module[names[ours]] = r
                if path in kept and (old := partition.Rules.of(self.alpha).get(ours)) is not None:
                    alphas[names[ours]] = seven_digits(old * (r / self.rank) ** power)
        method = dataclasses.replace(self, rank=rules(by_module, every), alpha=rules(alphas, every))
        return data_driven.with_start(method, start)

    def _moments(
        self, apply: Callable[..., Any], params: Any, seen: list[dict[str, Any]]
    ) -> dict[str, np.ndarray]:
        """Sums of [x, 1]ᵀ[x, 1] over the batches' tokens, [layers, in + 1, in + 1] float64."""
        flat, paths = partition.flatten(params), list(self.ranks(params))
        for path in paths:
            if self.layout(path, flat[path]).letters not in ("io", "bio"):
                raise UserError(f"EVA adapts matrices, not {path!r} of {flat[path].shape}")
        zero = {p: jnp.zeros((*flat[p].shape[:-2], *[flat[p].shape[-2] + 1] * 2)) for p in paths}

        def total(moments: Any, params: Any, batch: Any) -> jax.Array:
            weights = data_driven.real_tokens(batch)
            own = partition.flatten(params)
            new = {p: Probe(own[p], moments[p], weights, p) for p in paths}
            return jnp.sum(data_driven.outputs(apply, partition.replace(params, new), batch))

        gradient = jax.jit(jax.grad(total))
        sums = {p: np.zeros(x.shape) for p, x in zero.items()}
        for batch in seen:
            for path, x in gradient(zero, params, batch).items():
                sums[path] += np.asarray(x, np.float64)
        return sums

    def _allocate(self, params: Any, ratios: dict[str, np.ndarray]) -> dict[str, list[int]]:
        """The ranks that take the directions of largest explained variance ratio."""
        uniform = self.ranks(params)
        candidates = []
        for path, layers in uniform.items():
            rows = ratios[path] if partition.stack_of(path) is not None else ratios[path][None]
            for layer, r in enumerate(layers):
                if r:
                    candidates += [(v, path, layer) for v in rows[layer]]
        budget = sum(map(sum, uniform.values()))
        found = {p: [0] * len(layers) for p, layers in uniform.items()}
        # Within a module ratios fall, so the best candidates are each module's first.
        for _, path, layer in sorted(candidates, key=lambda c: -c[0])[:budget]:
            found[path][layer] += 1
        return found

    def _parameters(self, path: str, leaf: Any, ranks: list[int]) -> int:
        inputs = math.prod(self.layout(path, leaf).sizes(tuple(leaf.shape), "i"))
        if max(ranks) > inputs:
            raise UserError(
                f"rank {max(ranks)} at {path!r}, whose inputs vary along {inputs} directions at "
                "most: choose a smaller rank"
            )
        return super()._parameters(path, leaf, ranks)

    def init(self, key: jax.Array, params: Any) -> base.Trainable:
        trainable = super().init(key, params)
        for path, a in (self._start or {}).items():
            trainable[path] = {**trainable[path], "a": self.init_scale * jnp.array(a, copy=True)}
        return trainable


def _principal(moments: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shares of variance [*, k], directions [*, in, k], deviations [*, k]), largest first."""
    count = moments[..., -1, -1]
    mean = moments[..., :-1, -1] / count[..., None]
    second = moments[..., :-1, :-1] / count[..., None, None]
    covariance = second - mean[..., :, None] * mean[..., None, :]
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = np.maximum(values[..., ::-1], 0.0), vectors[..., ::-1]
    sums = np.maximum(values.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
    deviations = np.maximum(np.sqrt(values), 1e-6)
    return (
        (values / sums)[..., :most],
        vectors[..., :most].astype(np.float32),
        deviations[..., :most],
    )
