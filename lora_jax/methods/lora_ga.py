"""LoRA-GA: the first step is as full fine-tuning's (Wang et al. 2024, arXiv:2407.05000)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base, data_driven
from lora_jax.methods.offset import Offset, Starts, as_factors, check_rank, matrices
from lora_jax.tensors.base import is_weight
from lora_jax.tensors.summed import Summed


@base.register("lora_ga", peft={"peft_type": "LORA"})
@dataclasses.dataclass(frozen=True)
class LoRAGA(Offset):
    """A0 and B0 from singular vectors of the gradient on W (theorem 3.1), W − s·A0·B0 + s·A·B.

    With ∂L/∂W = U·S·Vᵀ (W here (in, out)): A0 = c·U[:, 1:r], B0 = c·V[:, r+1:2r]ᵀ with
    c = d_out^(1/4)/√gamma. `prepare` computes the gradient on `batches` batches; it needs room for
    one gradient of the targets. The model is unchanged at the start.

    Args:
      batches: whose mean gradient is taken.
      gamma: the stable scale's number (section 3.3); the paper takes 16 with scaling "rslora".
      split: "ArB2r": A0 from the first r vectors and B0 from the next; "A2rBr": the other way.
    """

    trains: ClassVar[str] = "A and B, from W's gradient"
    _each: ClassVar[int] = 2
    _start: ClassVar[Starts | None] = None

    batches: int = 1
    gamma: float = 16.0
    split: str = "ArB2r"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in ("ArB2r", "A2rBr"):
            raise UserError(f"split must be 'ArB2r' or 'A2rBr', not {self.split!r}")
        if self.batches < 1 or self.gamma <= 0:
            raise UserError(f"LoRA-GA needs batches >= 1 and gamma > 0: {self}")

    def prepare(self, apply: Callable[..., Any], params: Any, batches: Iterable[Any]) -> LoRAGA:
        seen, paths = data_driven.first(batches, self.batches, "LoRA-GA"), list(self.ranks(params))
        flat = partition.flatten(params)

        def total(targets: Any, params: Any, batch: Any) -> jax.Array:
            own = partition.flatten(params)
            new = {p: Summed(own[p], x, p) if is_weight(own[p]) else x for p, x in targets.items()}
            return data_driven.loss(apply, partition.replace(params, new), batch)

        @jax.jit
        def gradient(*arguments: Any) -> Any:  # float32: batches are summed, and then decomposed
            return jax.tree.map(lambda x: x.astype(jnp.float32), jax.grad(total)(*arguments))

        # Of a weight that is no array, the gradient is that of a zero added to it.
        targets = {p: jnp.zeros(flat[p].shape) if is_weight(flat[p]) else flat[p] for p in paths}
        sums = gradient(targets, params, seen[0])
        for batch in seen[1:]:
            sums = jax.tree.map(jnp.add, sums, gradient(targets, params, batch))
        start = {}
        for path, ranks in self.ranks(params).items():
            start[path] = self._factors_of(path, flat[path], sums[path], ranks)
        return data_driven.with_start(self, start)

    def _factors_of(
        self, path: str, leaf: Any, gradient: Any, ranks: list[int]
    ) -> dict[str, jax.Array]:
        """A layer of rank r takes its gradient's first 2r singular vectors."""
        layout, widest = self.layout(path, leaf), max(ranks)
        check_rank(path, leaf, layout, widest, self._each)
        g = np.asarray(matrices(gradient, layout))
        u, _, vt = np.linalg.svd(g, full_matrices=False)
        c = g.shape[-1] ** 0.25 / self.gamma**0.5
        layers = len(ranks)
        u = u.reshape(layers, -1, *u.shape[-2:])
        vt = vt.reshape(layers, -1, *vt.shape[-2:])
        a = np.zeros((*u.shape[:-1], widest), np.float32)
        b = np.zeros((*vt.shape[:2], widest, vt.shape[-1]), np.float32)
        for layer, r in enumerate(ranks):
            one, two = slice(0, r), slice(r, 2 * r)
            of_a, of_b = (one, two) if self.split == "ArB2r" else (two, one)
            a[layer, ..., :r] = c * u[layer][..., of_a]
            b[layer, ..., :r, :] = c * vt[layer][..., of_b, :]
        batch = g.shape[:-2]
        a, b = a.reshape(*batch, *a.shape[-2:]), b.reshape(*batch, *b.shape[-2:])
        return as_factors(jnp.asarray(a), jnp.asarray(b), leaf, layout, ranks)

    def knows_start(self, params: Any) -> bool:
        return self._start is not None and super().knows_start(params)

    def starts(self, params: Any) -> Starts:
        if self._start is None:
            raise UserError(
                "LoRA-GA starts from a gradient: use the method that "
                "method.prepare(lora_jax.adapt(model.apply), params, batches) returns"
            )
        return self._start
