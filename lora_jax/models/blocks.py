"""Blocks shared by the families of decoders.

Axes: B batch, T query positions, S key positions (cache slots), D model width, N query heads,
K key/value heads, H head width, V vocabulary, F = H // 2.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models import rotary
from lora_jax.models.sites import site

INITIALIZER = nn.initializers.normal(0.02)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a stack shares in one call.

    Attributes:
      cos: [B, T, F] float32, see `rotary.tables`.
      sin: [B, T, F] float32.
      mask: [B or 1, 1, T, S] bool, True where a query sees a key; None: plainly causal.
      slot: int scalar, the cache slot of the first query; None without a cache.
      keep_inputs: whether each layer also returns its input (static).
    """

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array | None = None
    slot: jax.Array | None = None
    keep_inputs: bool = dataclasses.field(default=False, metadata={"static": True})


def attention_masks(
    queries: int,
    slots: int,
    *,
    offset: int | jax.Array = 0,
    prefix: int = 0,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Who sees whom: bool [B or 1, 1, queries, slots].

    Query i sits in slot ``offset + i`` and sees slots up to its own. The first `prefix` slots are a
    prompt that every later query sees, whatever its segment.

    Args:
      queries, slots: lengths, the prompt included.
      offset: slot of the first query.
      prefix: length of the prompt, in slots.
      attention_mask: [B, slots - prefix], nonzero where a slot may be seen.
      segment_ids: [B, slots - prefix]; needs queries == slots. Only equal ids see each other.
    """
    row = offset + jnp.arange(queries)
    column = jnp.arange(slots)
    mask = (column[None, :] <= row[:, None])[None, None]
    if attention_mask is not None:
        seen_BS = jnp.pad(attention_mask != 0, ((0, 0), (prefix, 0)), constant_values=True)
        mask = mask & seen_BS[:, None, None, :]
    if segment_ids is not None:
        ids_BS = jnp.pad(segment_ids, ((0, 0), (prefix, 0)))
        same = ids_BS[:, None, :, None] == ids_BS[:, None, None, :]
        mask = mask & (same | (column < prefix)[None, None, None, :])
    return mask


def default_positions(shape: tuple[int, ...], segment_ids: jax.Array | None = None) -> jax.Array:
    """0, 1, 2, ... int32 [B, T], starting again at each new segment of a packed row."""
    index_BT = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    if segment_ids is None:
        return index_BT
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start_BT = jax.lax.cummax(jnp.where(segment_ids != before, index_BT, 0), axis=1)
    return index_BT - start_BT


def dense(features: int, bias: bool, dtype: Any, name: str) -> nn.Dense:
    """A Dense layer with a 2-D kernel (in, features)."""
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=INITIALIZER, name=name)


class RMSNorm(nn.Module):
    """x / rms(x) · scale (Zhang and Sennrich 2019, arXiv:1910.07467).

    Statistics are float32, or wider for wider inputs.
    """

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)
        # Normalised values are rounded before the scale, as transformers does.
        return normed * scale_D.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class Embed(nn.Module):
    """Token embedding, and its transpose as a tied head. Site: ``out``."""

    vocab_size: int
    features: int
    dtype: Any

    def setup(self) -> None:
        self.embedding = self.param("embedding", INITIALIZER, (self.vocab_size, self.features))

    def __call__(self, tokens: jax.Array, use_site: bool = True) -> jax.Array:
        """int [B, T] -> [B, P + T, D], P the site's length (0 without one)."""
        x_BTD = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        return site(self, "out", x_BTD, may_lengthen=True, tokens=tokens) if use_site else x_BTD

    def attend(self, x: jax.Array) -> jax.Array:
        """[..., D] -> logits [..., V]."""
        embedding = self.embedding.astype(self.dtype)
        contract = (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(x.astype(self.dtype), embedding, contract)


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped key/value heads. Sites: ``kv``, ``out``.

    Attributes:
      implementation: of `jax.nn.dot_product_attention`: None (let JAX choose), "xla" or "cudnn".
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool
    out_bias: bool
    dtype: Any
    implementation: Literal["xla", "cudnn"] | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: dict[str, jax.Array] | None, context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """x [B, T, D], this layer's cache {"key", "value": [B, S, K, H]} -> (x, cache)."""
        batch, length, width = x_BTD.shape

        def project(name: str, heads: int) -> jax.Array:
            y = dense(heads * self.head_dim, self.bias, self.dtype, name)(x_BTD)
            return y.reshape(batch, length, heads, self.head_dim)

        q_BTNH = rotary.rotate(project("query", self.num_heads), context.cos, context.sin)
        k_BSKH = rotary.rotate(project("key", self.num_kv_heads), context.cos, context.sin)
        v_BSKH = project("value", self.num_kv_heads)
        if cache is not None:
            k_BSKH = _write(cache["key"], k_BSKH, context.slot)
            v_BSKH = _write(cache["value"], v_BSKH, context.slot)
            cache = {"key": k_BSKH, "value": v_BSKH}
        slots = k_BSKH.shape[1]
        k_BSKH, v_BSKH = site(
            self,
            "kv",
            k_BSKH.astype(self.dtype),
            v_BSKH.astype(self.dtype),
            may_lengthen=True,
            inputs=x_BTD,
        )
        mask, prefix = context.mask, k_BSKH.shape[1] - slots
        if prefix:
            mask = attention_masks(length, slots) if mask is None else mask
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (prefix, 0)), constant_values=True)
        y_BTNH = jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask=mask,
            is_causal=mask is None,
            implementation=self.implementation,
        )
        y_BTD = dense(width, self.out_bias, self.dtype, "out")(y_BTNH.reshape(batch, length, -1))
        return site(self, "out", y_BTD, inputs=x_BTD), cache


def _write(cache_BSKH: jax.Array, new_BTKH: jax.Array, slot: jax.Array | None) -> jax.Array:
    start = (0, 0 if slot is None else slot, 0, 0)
    return jax.lax.dynamic_update_slice(cache_BSKH, new_BTKH.astype(cache_BSKH.dtype), start)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202). Site: ``out``."""

    hidden: int
    bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        gate = dense(self.hidden, self.bias, self.dtype, "gate")(x_BTD)
        up = dense(self.hidden, self.bias, self.dtype, "up")(x_BTD)
        y_BTD = dense(x_BTD.shape[-1], self.bias, self.dtype, "down")(nn.silu(gate) * up)
        return site(self, "out", y_BTD, inputs=x_BTD)
