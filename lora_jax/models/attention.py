"""Attention for all families: causal or not, rotary or not, with a cache, masks and sites.

Axes: B batch, T query positions, S key positions (cache slots), D model width, N query heads,
K key/value heads, H head width, F = H // 2.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models import rotary
from lora_jax.models.blocks import dense
from lora_jax.models.norms import RMSNorm
from lora_jax.models.sites import site


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a stack shares in one call.

    Attributes:
      cos, sin: [B, T, F] float32, see `rotary.tables`; None: positions are not rotary.
      mask: [B or 1, 1, T, S] bool, True where a query sees a key; None: plainly causal, or
        everything if not causal.
      slot: int scalar, the cache slot of the first query; None without a cache.
      tokens: int [B, T - P], those of this call: without the P positions of a prompt.
      read: int [B], the only position whose output is read after this layer; None: all are.
      causal: whether a query sees only keys up to its own (static).
      deterministic: whether dropout is off (static).
      keep_inputs: whether each layer also returns its input (static).
    """

    cos: jax.Array | None = None
    sin: jax.Array | None = None
    mask: jax.Array | None = None
    slot: jax.Array | None = None
    tokens: jax.Array | None = None
    read: jax.Array | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    deterministic: bool = dataclasses.field(default=True, metadata={"static": True})
    keep_inputs: bool = dataclasses.field(default=False, metadata={"static": True})

    def narrow(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] -> the positions that are read, [B, 1, ...]; `x` itself where all are."""
        return x if self.read is None else at(x, self.read)

    def passed_on(
        self, entered_BTD: jax.Array, left: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """(what the next layer reads, what a layer gives beside it): its input if `keep_inputs`.

        Layers are scanned, and a scan's carry keeps its shape: what is narrowed leaves beside it.
        """
        if self.read is not None:
            return entered_BTD, left
        return left, entered_BTD if self.keep_inputs else None


def at(x: jax.Array, index_B: jax.Array, axis: int = 1) -> jax.Array:
    """x's entry at each row's own index along `axis`, whose size becomes 1."""
    index = index_B.reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=axis)


def attention_masks(
    queries: int,
    slots: int,
    *,
    offset: int | jax.Array = 0,
    prefix: int = 0,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
) -> jax.Array:
    """Who sees whom: bool [B or 1, 1, queries, slots].

    Query i sits in slot ``offset + i`` and, if causal, sees slots up to its own. The first `prefix`
    slots are a prompt that every later query sees, whatever its segment.

    Args:
      queries, slots: lengths, the prompt included.
      offset: slot of the first query.
      prefix: length of the prompt, in slots.
      attention_mask: [B, slots - prefix], nonzero where a slot may be seen.
      segment_ids: [B, slots - prefix]; needs queries == slots. Only equal ids see each other.
      causal: whether later slots are hidden.
      window: how many tokens up to its own a query sees (a sliding window); None: all.
    """
    row = offset + jnp.arange(queries)
    column = jnp.arange(slots)
    seen = (column[None, :] <= row[:, None]) if causal else jnp.ones((queries, slots), bool)
    mask = seen[None, None]
    if window is not None:
        # In tokens: a prompt is as near to a text behind padding or behind another text.
        place_BS = _places(slots, prefix, attention_mask, segment_ids)
        own_BT = jax.lax.dynamic_slice_in_dim(place_BS, offset, queries, axis=1)
        mask = mask & (own_BT[:, None, :, None] - place_BS[:, None, None, :] < window)
    if attention_mask is not None:
        seen_BS = jnp.pad(attention_mask != 0, ((0, 0), (prefix, 0)), constant_values=True)
        mask = mask & seen_BS[:, None, None, :]
    if segment_ids is not None:
        ids_BS = jnp.pad(segment_ids, ((0, 0), (prefix, 0)))
        same = ids_BS[:, None, :, None] == ids_BS[:, None, None, :]
        mask = mask & (same | (column < prefix)[None, None, None, :])
    return mask


def _places(
    slots: int, prefix: int, attention_mask: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array:
    """Which token of its text a slot holds, counted from the prompt's first: [B or 1, slots]."""
    if segment_ids is not None:
        place = default_positions((segment_ids.shape[0], slots - prefix), segment_ids)
    elif attention_mask is not None:
        place = jnp.cumsum(attention_mask != 0, axis=1, dtype=jnp.int32) - 1
    else:
        place = default_positions((1, slots - prefix))
    front = default_positions((place.shape[0], prefix))
    return jnp.concatenate([front, prefix + place], axis=1)


def default_positions(shape: tuple[int, ...], segment_ids: jax.Array | None = None) -> jax.Array:
    """0, 1, 2, ... int32 [B, T], starting again at each new segment of a packed row."""
    index_BT = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    if segment_ids is None:
        return index_BT
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start_BT = jax.lax.cummax(jnp.where(segment_ids != before, index_BT, 0), axis=1)
    return index_BT - start_BT


class Attention(nn.Module):
    """Attention with grouped key/value heads. Sites: ``kv``, ``out``.

    Attributes:
      implementation: None: `attend`; "xla" or "cudnn": of `jax.nn.dot_product_attention`.
      dropout: rate on the attention probabilities, outside of deterministic calls.
      head_norm_eps: epsilon of an RMSNorm over each head of query and key; None: no such norm.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool
    out_bias: bool
    dtype: Any
    implementation: Literal["xla", "cudnn"] | None = None
    dropout: float = 0.0
    head_norm_eps: float | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: dict[str, jax.Array] | None, context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """x [B, T, D], this layer's cache {"key", "value": [B, S, K, H]} -> (x, cache).

        Where only one position is read (`Context.read`), x comes out as [B, 1, D].
        """
        batch, length, width = x_BTD.shape
        # What queries are made of, and what keys are: activations, cosines and sines.
        keys = (x_BTD, context.cos, context.sin)
        queries = jax.tree.map(context.narrow, keys)

        def project(name: str, heads: int, x_BTD: jax.Array) -> jax.Array:
            y = dense(heads * self.head_dim, self.bias, self.dtype, name)(x_BTD)
            return y.reshape(batch, -1, heads, self.head_dim)

        def placed(
            name: str, heads: int, x_BTD: jax.Array, cos: jax.Array | None, sin: jax.Array | None
        ) -> jax.Array:
            y = project(name, heads, x_BTD)
            if self.head_norm_eps is not None:
                y = RMSNorm(self.head_norm_eps, self.dtype, name=f"{name}_norm")(y)
            return y if cos is None or sin is None else rotary.rotate(y, cos, sin)

        q_BTNH = placed("query", self.num_heads, *queries)
        k_BSKH = placed("key", self.num_kv_heads, *keys)
        v_BSKH = project("value", self.num_kv_heads, x_BTD)
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
        if mask is None and context.causal and (prefix or context.read is not None):
            mask = attention_masks(length, slots)
        if mask is not None and context.read is not None:
            mask = at(jnp.broadcast_to(mask, (batch, *mask.shape[1:])), context.read, axis=2)
        if mask is not None and prefix:
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (prefix, 0)), constant_values=True)
        y_BTNH = self._attend(q_BTNH, k_BSKH, v_BSKH, mask, context)
        y_BTD = dense(width, self.out_bias, self.dtype, "out")(
            y_BTNH.reshape(batch, y_BTNH.shape[1], -1)
        )
        return site(self, "out", y_BTD, inputs=queries[0]), cache

    def _attend(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask: jax.Array | None,
        context: Context,
    ) -> jax.Array:
        causal = mask is None and context.causal
        drops = bool(self.dropout) and not context.deterministic
        if self.implementation is not None and not drops:
            return jax.nn.dot_product_attention(
                q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=causal,
                implementation=self.implementation,
            )  # fmt: skip
        if causal:
            mask = attention_masks(q_BTNH.shape[1], k_BSKH.shape[1])
        key = self.make_rng("dropout") if drops else None
        return attend(q_BTNH, k_BSKH, v_BSKH, mask, self.dropout, key)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: jax.Array | None = None,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q·k / sqrt(H))·v, [B, T, N, H]; the softmax in float32 at least.

    In the backward pass it keeps one array of B·N·T·S numbers a layer, where
    `jax.nn.dot_product_attention` keeps two, and drops probabilities, which that cannot.

    Args:
      q_BTNH: queries; N is a multiple of K.
      k_BSKH, v_BSKH: keys and values.
      mask: bool [B or 1, 1, T, S], True where a query sees a key; None: everywhere. A query that
        sees none takes the mean of all values.
      rate: of dropout on the probabilities, with a key.
      key: for dropout; None: there is none.
    """
    batch, length, heads, size = q_BTNH.shape
    groups = k_BSKH.shape[2]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    # Heads lead: products then run over whole matrices, with no transposition of the scores.
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BSKH, v_BSKH))
    q_BNTH = q_BNTH * jnp.asarray(size**-0.5, q_BNTH.dtype)  # G = N // K queries share a key
    q_BKGTH = q_BNTH.reshape(batch, groups, heads // groups, length, size)
    scores = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, k_BKSH, preferred_element_type=wide)
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(wide).min)
    shares = softmax(scores)
    if key is not None:
        kept = jax.random.bernoulli(key, 1.0 - rate, shares.shape)
        shares = jnp.where(kept, shares / (1.0 - rate), 0.0)
    y_BKGTH = jnp.einsum("bkgts,bksh->bkgth", shares.astype(v_BKSH.dtype), v_BKSH)
    return y_BKGTH.reshape(batch, heads, length, size).transpose(0, 2, 1, 3)


@jax.custom_jvp
def softmax(scores: jax.Array) -> jax.Array:
    """Over the last axis; its derivative needs the result alone, which is all that is kept."""
    powers = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return powers / jnp.sum(powers, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    shares = softmax(primals[0])
    moved = shares * tangents[0]
    return shares, moved - shares * jnp.sum(moved, axis=-1, keepdims=True)


def _write(cache_BSKH: jax.Array, new_BTKH: jax.Array, slot: jax.Array | None) -> jax.Array:
    start = 0 if slot is None else slot
    new_BTKH = new_BTKH.astype(cache_BSKH.dtype)
    return jax.lax.dynamic_update_slice_in_dim(cache_BSKH, new_BTKH, start, axis=1)
