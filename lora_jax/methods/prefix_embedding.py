"""Prefix-embedding and prefix-layer tuning, baselines of the LoRA paper.

Hu et al. 2021, arXiv:2106.09685, section 5.1.

Special tokens, `prefix` of them before the text and `infix` between prompt and completion, whose
embeddings train (PreEmbed), or whose activations after every layer do (PreLayer).

The prefix lengthens the sequence at `embed/out`. The infix are placeholders in the text, ids from
the vocabulary's size on (`Method.placeholders`), for which the model has no rows of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import activations, base
from lora_jax.methods.activations import SITES
from lora_jax.methods.prompt import EMBEDDING, rows_before_text

_BEFORE, _BETWEEN = "embed/out", "embed/tokens"


@dataclasses.dataclass(frozen=True)
class Between:
    """The function at embed/tokens: rows [I, D] for the tokens from `vocabulary` on."""

    vocabulary: int

    def __call__(
        self, params: Any, x_BTD: jax.Array, *, tokens: jax.Array, **context: Any
    ) -> jax.Array:
        rows_ID = params["rows"].astype(x_BTD.dtype)
        which_BT = tokens - self.vocabulary
        found_BTD = jnp.take(rows_ID, jnp.clip(which_BT, 0, rows_ID.shape[0] - 1), axis=0)
        return jnp.where(which_BT[..., None] >= 0, found_BTD, x_BTD)


@dataclasses.dataclass(frozen=True)
class InLayer:
    """The function at a layer's `in`: the special tokens' activations replaced by trained ones.

    params: maybe prefix [P, D], maybe infix [I, D].
    """

    vocabulary: int

    def __call__(
        self, params: Any, x_BTD: jax.Array, *, tokens: jax.Array, **context: Any
    ) -> jax.Array:
        front = x_BTD.shape[1] - tokens.shape[1]  # 0 once the prefix is in the cache
        text = x_BTD[:, front:]
        if "infix" in params:
            text = Between(self.vocabulary)({"rows": params["infix"]}, text, tokens=tokens)
        return activations.rows_in_front(params["prefix"], text) if front else text


@dataclasses.dataclass(frozen=True)
class _Special(activations.ActivationMethod):
    """What both have: how many special tokens, and their ids."""

    inference: ClassVar[str] = "`prefix` + `infix` more positions"
    numeric: ClassVar[tuple[str, ...]] = ("init_std",)
    size_field: ClassVar[str | None] = "prefix"

    prefix: int = 32
    infix: int = 0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if min(self.prefix, self.infix) < 0 or self.prefix + self.infix < 1:
            raise UserError(
                f"prefix={self.prefix} and infix={self.infix} must be at least 0, one of them more"
            )

    def placeholders(self, params: Any) -> tuple[int, ...]:
        size = self._vocabulary(params)
        return tuple(range(size, size + self.infix))

    def _vocabulary(self, params: Any) -> int:
        activations.width(params, EMBEDDING, self.name)
        return int(partition.flatten(params)[EMBEDDING].shape[0])

    def _rows(self, key: jax.Array, path: str, count: int, d: int) -> jax.Array:
        return activations.draw(key, path, (count, d), activations.Draw("normal", self.init_std))


@base.register("prefix_embedding")
@dataclasses.dataclass(frozen=True)
class PrefixEmbedding(_Special):
    """Special tokens with trained embeddings; D·(prefix + infix) parameters.

    Args:
      prefix: before the text (l_p).
      infix: between prompt and completion (l_i); for language models, trained on completions.
      init_std: they start as N(0, init_std²).
      train: further leaves trained whole.
    """

    trains: ClassVar[str] = "embeddings of special tokens"

    def fresh(self, key: jax.Array, params: Any) -> base.Trainable:
        """{sites/embed/out: {rows [P, D]}, sites/embed/tokens: {rows [I, D]}}."""
        d = activations.width(params, EMBEDDING, self.name)
        counts = {_BEFORE: self.prefix, _BETWEEN: self.infix}
        return {SITES + p: {"rows": self._rows(key, p, n, d)} for p, n in counts.items() if n}

    def sites(self, trained: base.Trainable, params: Any) -> activations.Sites:
        found: activations.Sites = {}
        for path, values in trained.items():
            if path == SITES + _BEFORE:
                found[_BEFORE] = (values, rows_before_text, values["rows"].shape[0])
            else:
                found[_BETWEEN] = (values, Between(self._vocabulary(params)), 0)
        return found


@base.register("prefix_layer")
@dataclasses.dataclass(frozen=True)
class PrefixLayer(_Special):
    """Special tokens whose activations are replaced by trained ones in front of every layer;
    L·D·(prefix + infix) parameters.

    Args: as of `PrefixEmbedding`.
    """

    trains: ClassVar[str] = "activations of special tokens in every layer"
    prefix: int = 8

    def fresh(self, key: jax.Array, params: Any) -> base.Trainable:
        """{sites/layers[i:j]/in: {prefix [L, P, D], infix [L, I, D]}}."""
        d = activations.width(params, EMBEDDING, self.name)
        counts = {"prefix": self.prefix, "infix": self.infix}
        found: base.Trainable = {}
        for stack in activations.layer_stacks(params, self.name):
            activations.width(params, f"{stack}/attention/out/kernel", self.name)
            path = f"{SITES}{stack}/in"
            found[path] = {
                name: self._rows(key, f"{path}/{name}", n, d) for name, n in counts.items() if n
            }
        return found

    def sites(self, trained: base.Trainable, params: Any) -> activations.Sites:
        fn = InLayer(self._vocabulary(params))
        found: activations.Sites = {p.removeprefix(SITES): (x, fn, 0) for p, x in trained.items()}
        first = next(iter(trained.values()))
        # Places for them in the sequence: what stands there does not matter, it is replaced.
        if "prefix" in first:
            zeros = jnp.zeros(first["prefix"].shape[1:])
            found[_BEFORE] = ({"rows": zeros}, rows_before_text, zeros.shape[0])
        if "infix" in first:
            found[_BETWEEN] = (
                {"rows": jnp.zeros(first["infix"].shape[1:])}, Between(fn.vocabulary), 0,
            )  # fmt: skip
        return found
