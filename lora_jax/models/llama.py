"""Llama (Touvron et al. 2023, arXiv:2302.13971), with grouped heads, biases and rope scaling.

Parameters (a stack may be split into segments, e.g. ``layers[0:2]`` and ``layers[2:30]``):
``embed/embedding``, ``layers[0:N]/{attention_norm, attention/{query,key,value,out},
mlp_norm, mlp/{gate,up,down}}``, ``final_norm/scale``, and ``head/kernel`` unless tied.

Axes: L layers, B batch, T tokens, S cache slots, P prompt positions of the site ``embed/out``,
D width, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.errors import UserError
from lora_jax.models import rotary
from lora_jax.models.blocks import (
    Attention,
    Context,
    Embed,
    GatedMLP,
    RMSNorm,
    attention_masks,
    default_positions,
    dense,
)
from lora_jax.models.family import Family
from lora_jax.models.llama_config import (
    MODEL_TYPES,
    LlamaConfig,
    config_from_hf,
    config_to_hf,
    ignored,
    tensors,
)
from lora_jax.models.sites import find, length_at
from lora_jax.models.stack import scanned, segments_in

__all__ = ["FAMILIES", "Block", "Llama", "LlamaConfig", "config_from_hf", "config_to_hf", "tensors"]

Cache = dict[str, jax.Array]


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and added to its input."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: Cache | None, context: Context
    ) -> tuple[jax.Array, tuple[Cache | None, jax.Array | None]]:
        """x [B, T, D], this layer's cache -> (x, (cache, the layer's input if kept))."""
        c = self.config
        entered = x_BTD if context.keep_inputs else None
        y_BTD = RMSNorm(c.norm_eps, c.dtype, name="attention_norm")(x_BTD)
        y_BTD, cache = Attention(
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.attention_bias,
            c.out_bias,
            c.dtype,
            c.attention,
            name="attention",
        )(y_BTD, cache, context)
        x_BTD = x_BTD + y_BTD
        y_BTD = RMSNorm(c.norm_eps, c.dtype, name="mlp_norm")(x_BTD)
        x_BTD = x_BTD + GatedMLP(c.mlp_size, c.mlp_bias, c.dtype, name="mlp")(y_BTD)
        return x_BTD, (cache, entered)


class Llama(nn.Module):
    """A decoder with a language-model head.

    ``apply(variables, tokens, ...)`` gives logits; ``method="hidden"`` the hidden states after the
    final norm; ``method="logits"`` maps those to logits.

    Decoding: ``cache = model.init_cache(batch, slots, dtype)``, then ``apply(variables, tokens,
    positions=, attention_mask=, cache=cache, cache_index=)`` returns ``(logits, cache)``.
    `cache_index` and `attention_mask` count *tokens*, whatever sites are present. A prompt at
    ``embed/out`` occupies the first P slots: create the cache with ``P + tokens`` slots, where
    ``P = models.prompt_length(variables)``. The prompt is written together with the first tokens,
    by the call whose `cache_index` is a *concrete* 0; a traced index always continues. A prefix at
    ``attention/kv`` needs no slots.
    """

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        self.embed = Embed(c.vocab_size, c.hidden_size, c.dtype)
        present = () if self.is_initializing() else self.variables.get("params", {})
        self.segments = segments_in(present, c.num_layers)
        self.stack = [
            scanned(Block, segment, remat=c.remat, unroll=c.unroll, inputs=1, config=c)
            for segment in self.segments
        ]
        self.final_norm = RMSNorm(c.norm_eps, c.dtype)
        if not c.tied:
            self.head = dense(c.vocab_size, False, c.dtype, "head")

    @nn.nowrap
    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache: "key" and "value", each [L, B, S, K, H].

        Args:
          batch: rows.
          length: slots S: the most tokens, plus the length of a prompt at ``embed/out``.
          dtype: of the cache; None: the config's.
        """
        c = self.config
        shape = (c.num_layers, batch, length, c.num_kv_heads, c.head_dim)
        return {name: jnp.zeros(shape, dtype or c.dtype) for name in ("key", "value")}

    def __call__(
        self,
        tokens: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        deterministic: bool = True,
        *,
        output_hidden_states: bool = False,
        cache: Cache | None = None,
        cache_index: int | jax.Array = 0,
    ) -> Any:
        """Logits of the next token at every position.

        Args:
          tokens: int [B, T].
          attention_mask: [B, T], nonzero where a token may be seen; with a cache [B, slots].
          positions: int [B, T]; by default 0, 1, ... from cache_index, anew in each segment.
          segment_ids: int [B, T], for packed rows: tokens see only their own segment.
          token_type_ids: must be None; this family has none.
          deterministic: no effect; this family has no dropout.
          output_hidden_states: also return what each layer read, and the final norm's output.
          cache: from `init_cache` or the last call.
          cache_index: tokens already in the cache.

        Returns:
          logits [B, T, V]; then hidden states [L + 1, B, T, D] if asked for; then the cache if
          given. A tuple if more than one.
        """
        x_BTD, hidden, cache = self._run(
            tokens,
            attention_mask,
            positions,
            segment_ids,
            token_type_ids,
            output_hidden_states,
            cache,
            cache_index,
        )
        results: list[Any] = [self.logits(x_BTD)]
        if output_hidden_states:
            results.append(jnp.concatenate([*hidden, x_BTD[None]]))
        if cache is not None:
            results.append(cache)
        return results[0] if len(results) == 1 else tuple(results)

    def hidden(
        self,
        tokens: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Hidden states after the final norm, [B, T, D]; arguments as in `__call__`."""
        return self._run(
            tokens, attention_mask, positions, segment_ids, token_type_ids, False, None, 0
        )[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V]."""
        return self.embed.attend(hidden) if self.config.tied else self.head(hidden)

    def _run(
        self,
        tokens: jax.Array,
        attention_mask: jax.Array | None,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        token_type_ids: jax.Array | None,
        keep_inputs: bool,
        cache: Cache | None,
        cache_index: int | jax.Array,
    ) -> tuple[jax.Array, list[jax.Array], Cache | None]:
        """(normed hidden states [B, T, D], each segment's layer inputs, cache)."""
        if token_type_ids is not None:
            raise UserError("Llama has no token types; leave token_type_ids out.")
        if cache is not None and segment_ids is not None:
            raise UserError("packed rows cannot be decoded with a cache; leave segment_ids out.")
        prompt = _length(self.embed, "out")
        first = cache is None or _is_zero(cache_index)
        x_BTD = self.embed(tokens, use_site=first or not prompt)
        drop = x_BTD.shape[1] - tokens.shape[1]  # the prompt's length if it is part of this call
        if positions is None:
            positions = default_positions((tokens.shape[0], tokens.shape[1]), segment_ids)
            positions = positions if cache is None else positions + cache_index
        positions = positions + prompt
        if drop:
            front = default_positions((tokens.shape[0], drop))
            positions = jnp.concatenate([front, positions.astype(front.dtype)], axis=1)
        slot = None if cache is None else (0 if drop else prompt + cache_index)
        mask = _mask(x_BTD.shape[1], cache, slot, prompt, attention_mask, segment_ids)
        x_BTD, inputs, cache = self._layers(x_BTD, positions, mask, slot, keep_inputs, cache)
        hidden = [kept[:, :, drop:] for kept in inputs]
        return self.final_norm(x_BTD[:, drop:]), hidden, cache

    def _layers(
        self,
        x_BTD: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None,
        slot: int | jax.Array | None,
        keep_inputs: bool,
        cache: Cache | None,
    ) -> tuple[jax.Array, list[jax.Array], Cache | None]:
        c = self.config
        frequencies = rotary.frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        inputs = []
        for segment, layers in zip(self.segments, self.stack, strict=True):
            # Tokens after a prefix of keys and values start at its length.
            shift = length_at(self.variables, segment.name, "attention", "kv")
            cos, sin = rotary.tables(positions + shift, frequencies)
            context = Context(
                cos, sin, mask, None if slot is None else jnp.asarray(slot), keep_inputs
            )
            rows = slice(segment.start, segment.stop)
            part = None if cache is None else jax.tree.map(lambda a: a[rows], cache)  # noqa: B023
            x_BTD, (part, kept) = layers(x_BTD, part, context)
            if cache is not None:
                cache = jax.tree.map(lambda a, new: a.at[rows].set(new), cache, part)  # noqa: B023
            inputs.append(kept)
        return x_BTD, inputs if keep_inputs else [], cache


def _length(module: nn.Module, name: str) -> int:
    found = find(module, name)
    return found.length if found else 0


def _is_zero(index: int | jax.Array) -> bool:
    """Whether a cache index is known, while tracing, to be 0."""
    try:
        return operator.index(index) == 0
    except TypeError:  # a traced value has no concrete one
        return False


def _mask(
    queries: int,
    cache: Cache | None,
    slot: int | jax.Array | None,
    prompt: int,
    attention_mask: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array | None:
    """The mask of one call, None where it is plainly causal; see `attention_masks`."""
    if cache is None or slot is None:
        if attention_mask is None and segment_ids is None:
            return None
        return attention_masks(
            queries, queries, prefix=prompt, attention_mask=attention_mask, segment_ids=segment_ids
        )
    slots = cache["key"].shape[2]
    if attention_mask is not None:
        # The prompt's slots are not tokens: a mask as long as the cache has columns to spare.
        if attention_mask.shape[1] not in (slots - prompt, slots):
            raise UserError(
                f"with a cache of {slots} slots, {prompt} of them a prompt's, "
                f"attention_mask must be [B, {slots - prompt}], one column a token "
                f"slot; it has {attention_mask.shape[1]}."
            )
        attention_mask = attention_mask[:, : slots - prompt]
    return attention_masks(
        queries, slots, offset=slot, prefix=prompt, attention_mask=attention_mask
    )


FAMILIES = (Family("llama", MODEL_TYPES, config_from_hf, config_to_hf, Llama, tensors, ignored),)
