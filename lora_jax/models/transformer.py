"""The part that all text families share: calls, masks, positions, caches, scanned layers, heads.

A family subclasses `Transformer`: it names its block and overrides the few hooks that differ.

Axes: L layers, B batch, T tokens, S cache slots, P prompt positions of the site ``embed/out``,
D width, K key/value heads, H head width, V vocabulary, C outputs of a scoring head.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.errors import UserError
from lora_jax.models import rotary
from lora_jax.models.attention import Context, at, attention_masks, default_positions
from lora_jax.models.blocks import Embed, dense
from lora_jax.models.sites import find, length_at
from lora_jax.models.stack import scanned, segments_in
from lora_jax.models.text_config import SCORING

Cache = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """The arguments of one call."""

    tokens: jax.Array
    attention_mask: jax.Array | None = None
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    token_type_ids: jax.Array | None = None
    deterministic: bool = True
    keep_inputs: bool = False
    cache: Cache | None = None
    cache_index: int | jax.Array = 0


class Transformer(nn.Module):
    """A text model. ``apply(variables, tokens, ...)`` gives what ``config.head`` says.

    ``method="hidden"`` gives the last hidden states, ``method="logits"`` maps those to logits.

    Decoding: ``cache = model.init_cache(batch, slots, dtype)``, then ``apply(variables, tokens,
    positions=, attention_mask=, cache=cache, cache_index=)`` returns ``(logits, cache)``.
    `cache_index` and `attention_mask` count *tokens*, whatever sites are present. A prompt at
    ``embed/out`` occupies the first P slots: create the cache with ``P + tokens`` slots, where
    ``P = models.prompt_length(variables)``. The prompt is written together with the first tokens,
    by the call whose `cache_index` is a *concrete* 0; a traced index always continues. A prefix at
    ``attention/kv`` needs no slots.
    """

    config: Any

    block: ClassVar[type[nn.Module]]
    causal: ClassVar[bool] = True

    def setup(self) -> None:
        c = self.config
        self.embed = Embed(c.vocab_size, c.hidden_size, c.dtype)
        present = () if self.is_initializing() else self.variables.get("params", {})
        self.segments = segments_in(present, c.num_layers, c.cuts)
        self.stack = [
            scanned(self.block, segment, remat=c.remat, unroll=c.unroll, inputs=1, config=c)
            for segment in self.segments
        ]
        for name, part in self.parts().items():
            setattr(self, name, part)

    # --- what a family may override ---------------------------------------------------------------

    @nn.nowrap
    def parts(self) -> dict[str, nn.Module]:
        """Submodules besides ``embed`` and the layers, by the attribute they become."""
        return self.head_parts()

    @nn.nowrap
    def head_parts(self) -> dict[str, nn.Module]:
        """The head of a decoder: one kernel, unless it is the embedding."""
        c = self.config
        if c.head == "pooling":
            raise self._no_pooling()
        if c.head is None or (c.head == "lm" and c.tied):
            return {}
        outputs = c.vocab_size if c.head == "lm" else c.num_labels
        return {"head": dense(outputs, False, c.dtype, "head")}

    @nn.nowrap
    def positions_of(self, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """Positions where none are given: int32 [B, T], counted from 0."""
        return default_positions((tokens.shape[0], tokens.shape[1]), segment_ids)

    @property
    def position_limit(self) -> int | None:
        """Positions that there are embeddings for; None: as many as one likes."""
        return None

    @nn.nowrap
    def rotary_tables(self, positions: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """Cosines and sines of positions [B, T], for families that rotate."""
        c = self.config
        if getattr(c, "rope_theta", None) is None:
            return None, None
        return rotary.tables(
            positions, rotary.frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        )

    def enter(
        self,
        x_BTD: jax.Array,
        positions: jax.Array,
        token_type_ids: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """Token embeddings (a prompt's in front) -> what the first layer reads."""
        return x_BTD

    def leave(self, x_BTD: jax.Array) -> jax.Array:
        """The last layer's output -> hidden states."""
        return self.final_norm(x_BTD)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V]."""
        if self.config.head != "lm":
            raise UserError(f"a model with head={self.config.head!r} has no logits of tokens.")
        return self.embed.attend(hidden) if self.config.tied else self.head(hidden)

    def read(self, tokens: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        """The position that a scoring head reads, int [B]: here, a decoder's last token."""
        return last_token(tokens, attention_mask, self.config.pad_id)

    def scores(self, x_BD: jax.Array, deterministic: bool) -> jax.Array:
        """The hidden state of that position, [B, D] -> [B, C]."""
        return self.head(x_BD)

    def pooled(self, hidden: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        """Hidden states [B, T, D] -> [B, D], for head="pooling"; here, there is none."""
        raise self._no_pooling()

    @nn.nowrap
    def _no_pooling(self) -> UserError:
        return UserError(f"{type(self).__name__} has no pooling head; use an encoder (BERT).")

    # --- calls ------------------------------------------------------------------------------------

    @nn.nowrap
    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache: "key" and "value", each [L, B, S, K, H].

        Args:
          batch: rows.
          length: slots S: the most tokens, plus the length of a prompt at ``embed/out``.
          dtype: of the cache; None: the config's.
        """
        c = self.config
        if not self.causal:
            raise UserError(f"{type(self).__name__} is an encoder: it does not decode.")
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
        """What the config's head says: logits, scores, pooled vectors, or hidden states.

        Args:
          tokens: int [B, T].
          attention_mask: [B, T], nonzero where a token may be seen; with a cache [B, slots].
          positions: int [B, T]; by default 0, 1, ... from cache_index, anew in each segment.
          segment_ids: int [B, T], for packed rows: tokens see only their own segment.
          token_type_ids: int [B, T]; 0 by default. Families without token types ignore it.
          deterministic: whether dropout is off; if not, give rngs={"dropout": key}.
          output_hidden_states: also return what each layer read, and the last hidden states.
          cache: from `init_cache` or the last call.
          cache_index: tokens already in the cache.

        Returns:
          head "lm": [B, T, V]; "classification" and "regression": [B, C]; "pooling": [B, D]; None:
          [B, T, D]. Then hidden states [L + 1, B, T, D] if asked for; then the cache if given. A
          tuple if more than one.
        """
        inputs = _Inputs(
            tokens,
            attention_mask,
            positions,
            segment_ids,
            token_type_ids,
            deterministic,
            output_hidden_states,
            cache,
            cache_index,
        )
        # All hidden states are wanted where they are asked for; a scoring head reads one position.
        one = self.config.head in SCORING and not output_hidden_states
        x_BTD, hidden, cache = self._run(inputs, one)
        results: list[Any] = [self._read_out(x_BTD, inputs)]
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
        """The last hidden states, after the final norm: [B, T, D]; arguments as in `__call__`."""
        inputs = _Inputs(
            tokens, attention_mask, positions, segment_ids, token_type_ids, deterministic
        )
        return self._run(inputs)[0]

    def _read_out(self, x_BTD: jax.Array, inputs: _Inputs) -> jax.Array:
        head = self.config.head
        if head is None:
            return x_BTD
        if head == "lm":
            return self.logits(x_BTD)
        if inputs.segment_ids is not None or inputs.cache is not None:
            raise UserError(
                f"head={head!r} gives one result a row: rows must not be packed (segment_ids) nor "
                "come in parts (cache)."
            )
        if head not in SCORING:
            return self.pooled(x_BTD, inputs.attention_mask)
        if x_BTD.shape[1] != 1:
            x_BTD = at(x_BTD, self.read(inputs.tokens, inputs.attention_mask))
        return self.scores(x_BTD[:, 0], inputs.deterministic)

    def _run(
        self, inputs: _Inputs, one: bool = False
    ) -> tuple[jax.Array, list[jax.Array], Cache | None]:
        """(hidden states [B, T, D], each segment's layer inputs, cache).

        With `one`, hidden states may be [B, 1, D], of the position that `read` says: they are where
        the last layer is a segment of its own, which then computes no other.
        """
        tokens, cache = inputs.tokens, inputs.cache
        if cache is not None and inputs.segment_ids is not None:
            raise UserError("packed rows cannot be decoded with a cache; leave segment_ids out.")
        prompt = found.length if (found := find(self.embed, "out")) else 0
        if prompt and inputs.segment_ids is not None and not self.causal:
            raise UserError(
                "an encoder's prompt sees every token, so packed rows cannot share one; leave "
                "segment_ids out (packing=False)."
            )
        first = cache is None or _is_zero(inputs.cache_index)
        x_BTD = self.embed(tokens, use_site=first or not prompt)
        drop = x_BTD.shape[1] - tokens.shape[1]  # the prompt's length if it is part of this call
        positions = inputs.positions
        if positions is None:
            positions = self.positions_of(tokens, inputs.segment_ids)
            positions = positions if cache is None else positions + inputs.cache_index
        positions, types = positions + prompt, inputs.token_type_ids
        if drop:
            front = default_positions((tokens.shape[0], drop))
            positions = jnp.concatenate([front, positions.astype(front.dtype)], axis=1)
            types = None if types is None else jnp.pad(types, ((0, 0), (drop, 0)))
        slot = None if cache is None else (0 if drop else prompt + inputs.cache_index)
        mask = self._mask(x_BTD.shape[1], slot, prompt, inputs)
        # Tokens after a prefix of keys and values start at its length.
        shifts = [length_at(self.variables, s.name, "attention", "kv") for s in self.segments]
        longest = x_BTD.shape[1] if cache is None else cache["key"].shape[2]
        _check_positions(longest + max(shifts), self.position_limit)
        x_BTD = self.enter(x_BTD, positions + max(shifts), types, inputs.deterministic)
        shared = Context(
            mask=mask,
            slot=None if slot is None else jnp.asarray(slot),
            tokens=tokens,
            causal=self.causal,
            deterministic=inputs.deterministic,
            keep_inputs=inputs.keep_inputs,
        )
        kept: list[jax.Array] = []
        one = one and self.segments[-1].size == 1 and cache is None
        for segment, layers, shift in zip(self.segments, self.stack, shifts, strict=True):
            cos, sin = self.rotary_tables(positions + shift)
            context = dataclasses.replace(shared, cos=cos, sin=sin)
            if one and segment is self.segments[-1]:
                read_B = self.read(tokens, inputs.attention_mask) + drop
                _, (_, left) = layers(x_BTD, None, dataclasses.replace(context, read=read_B))
                return self.leave(left[0]), kept, cache
            rows = slice(segment.start, segment.stop)
            part = None if cache is None else jax.tree.map(lambda a: a[rows], cache)  # noqa: B023
            x_BTD, (part, entered) = layers(x_BTD, part, context)
            if cache is not None:
                cache = jax.tree.map(lambda a, new: a.at[rows].set(new), cache, part)  # noqa: B023
            if inputs.keep_inputs:
                kept.append(entered[:, :, drop:])
        return self.leave(x_BTD[:, drop:]), kept, cache

    def _mask(
        self, queries: int, slot: int | jax.Array | None, prompt: int, inputs: _Inputs
    ) -> jax.Array | None:
        """The mask of one call, None where `Context.causal` says it all."""
        attention_mask, cache = inputs.attention_mask, inputs.cache
        window = getattr(self.config, "window", None)
        if cache is None or slot is None:
            if attention_mask is None and inputs.segment_ids is None and window is None:
                return None
            return attention_masks(
                queries,
                queries,
                prefix=prompt,
                attention_mask=attention_mask,
                segment_ids=inputs.segment_ids,
                causal=self.causal,
                window=window,
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
            queries,
            slots,
            offset=slot,
            prefix=prompt,
            attention_mask=attention_mask,
            window=window,
        )


def last_token(
    tokens: jax.Array, attention_mask: jax.Array | None, pad_id: int | None
) -> jax.Array:
    """Index of each row's last token that is not padding: int [B]; 0 where there is none.

    Padding is where the mask is 0; without a mask, where a token is `pad_id`, if there is one.
    """
    if attention_mask is None:
        real = jnp.ones(tokens.shape, bool) if pad_id is None else tokens != pad_id
    else:
        real = attention_mask != 0
    return jnp.max(jnp.where(real, jnp.arange(tokens.shape[1])[None, :], 0), axis=1)


def _is_zero(index: int | jax.Array) -> bool:
    """Whether a cache index is known, while tracing, to be 0."""
    try:
        return operator.index(index) == 0
    except TypeError:  # a traced value has no concrete one
        return False


def _check_positions(length: int, limit: int | None) -> None:
    """UserError where a sequence, with a method's prefix, is longer than the learned positions."""
    if limit is not None and length > limit:
        raise UserError(
            f"a sequence of {length} positions (with a prefix, if there is one) is longer than the "
            f"{limit} this model has embeddings for; cut the texts (data.length, "
            "evaluation.max_new_tokens) or use another model."
        )
