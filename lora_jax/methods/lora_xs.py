"""LoRA-XS: a small matrix between frozen singular vectors (Bałazy et al. 2024, 2405.17604)."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base
from lora_jax.methods.lora import LoRA
from lora_jax.methods.offset import Starts, as_factors, check_rank, matrices
from lora_jax.methods.plain import as_lora


@base.register("lora_xs")
@dataclasses.dataclass(frozen=True)
class LoRAXS(LoRA):
    """h = x·W + s·x·A·R·B with A = U·S and B = Vᵀ of W's first r singular values, frozen (eq. 3).

    R (r × r) alone is trained: r² numbers a module, whatever its width. R starts as N(0, sigma²),
    so the model is nearly, not exactly, unchanged at the start. An adapter holds R, and A and B
    are computed again from the base; `to_lora` gives an ordinary LoRA with A and R·B.
    """

    trains: ClassVar[str] = "an r x r matrix between W's singular vectors"
    numeric: ClassVar[tuple[str, ...]] = (
        "rank", "alpha", "targets", "scaling", "dropout", "sigma",
    )  # fmt: skip
    # Padded columns of A and rows of B are zero, so R's have no gradient there.
    padding_exact: ClassVar[bool] = True

    sigma: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._left_out("start", "init_scale", why="starts from sigma")

    def projections(self, params: Any) -> Starts:
        """{"a": U·S, "b": Vᵀ} by leaf path."""
        flat, found = partition.flatten(params), {}
        for path, ranks in self.ranks(params).items():
            layout, r = self.layout(path, flat[path]), max(ranks)
            check_rank(path, flat[path], layout, r)
            w = matrices(flat[path], layout)
            u, s, vt = jnp.linalg.svd(w, full_matrices=False)
            # Only the signs of singular vectors are free, and R depends on them: fix them, so
            # that another machine's decomposition gives the same A and B.
            at = jnp.argmax(jnp.abs(u), axis=-2, keepdims=True)
            sign = jnp.sign(jnp.take_along_axis(u, at, axis=-2))
            u, vt = u * sign, vt * jnp.swapaxes(sign, -1, -2)
            a, b = u[..., :r] * s[..., None, :r], vt[..., :r, :]
            found[path] = as_factors(a, b, flat[path], layout, ranks)
        return found

    def _factors(self, key: jax.Array, path: str, leaf: Any, ranks: list[int]) -> Any:
        batch = self.layout(path, leaf).sizes(tuple(leaf.shape), "b")
        r, layers = max(ranks), partition.expand(path)
        own = math.prod(batch) // len(ranks)
        drawn = [
            _square(jax.random.fold_in(key, zlib.crc32(f"{e}#{j}".encode())), n, r)
            for e, n in zip(layers, ranks, strict=True)
            for j in range(own)
        ]
        return {"r": self.sigma * jnp.stack(drawn).reshape(*batch, r, r)}

    def numbers(self, params: Any) -> dict[str, Any]:
        """LoRA's, and {"frozen": A and B by leaf path} (a singular value decomposition each)."""
        return {**super().numbers(params), "frozen": self.projections(params)}

    def _weights(
        self, params: Any, trainable: base.Trainable, key: Any, numbers: Mapping[str, Any]
    ) -> Any:
        return super()._weights(params, _folded(trainable, numbers["frozen"]), key, numbers)

    def unmerge(self, merged: Any, trainable: base.Trainable) -> Any:
        """UserError: A and B are those of W, and cannot be had from what it became."""
        raise UserError("LoRA-XS cannot be unmerged: keep the base's parameters")

    def _parameters(self, path: str, leaf: Any, ranks: list[int]) -> int:
        layout = self.layout(path, leaf)
        check_rank(path, leaf, layout, max(ranks))
        batch = layout.sizes(tuple(leaf.shape), "b")
        return sum(r * r for r in ranks) * (math.prod(batch) // len(ranks))

    def to_lora(self, params: Any, trainable: base.Trainable) -> tuple[LoRA, base.Trainable]:
        """The plain LoRA with A and R·B, which `save_adapter` writes for PEFT."""
        return as_lora(self), _folded(trainable, self.projections(params))


def _square(key: jax.Array, n: int, size: int) -> jax.Array:
    """n × n normal numbers in a square of zeros; entry (i, j) does not depend on n."""
    keys = jax.vmap(lambda i: jax.vmap(lambda j: jax.random.fold_in(jax.random.fold_in(key, i), j))(
        jnp.arange(size)
    ))(jnp.arange(size))  # fmt: skip
    drawn = jax.vmap(jax.vmap(jax.random.normal))(keys)
    live = jnp.arange(size) < n
    return jnp.where(live[:, None] & live[None], drawn, 0.0)


def _folded(trainable: base.Trainable, frozen: Mapping[str, Any]) -> base.Trainable:
    """Factors A and R·B in place of R."""
    new = dict(trainable)
    for path, ab in frozen.items():
        r = trainable[path]["r"]
        n = r.ndim - 2  # batch axes
        flat = ab["b"].reshape(*ab["b"].shape[: n + 1], -1)
        new[path] = {"a": ab["a"], "b": (r @ flat).reshape(ab["b"].shape)}
    return new
