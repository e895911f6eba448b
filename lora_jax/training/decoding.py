"""Greedy and beam decoding with a key/value cache, one compiled program a shape.

Axes: B rows, K beams, P prompt positions, N new tokens, S = P + N cache slots, V vocabulary.
Prompts are padded on the left, so that every row writes the same cache slot at the same time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError
from lora_jax.models import prompt_length
from lora_jax.tensors import adapt

PROMPT_BUCKET = 16
"""Prompt lengths are rounded up to a multiple of this: fewer shapes, fewer compilations."""

NextLogits = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""(tokens int[rows], new tokens before them, cache) -> (logits float32[rows, V], cache)."""


def generate(
    model: Any,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None,
    pad_id: int,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = True,
    batch_size: int | None = None,
) -> list[list[int]]:
    """The continuation of each prompt, without the prompt and up to but without `eos_id`.

    Args:
        model: has `init_cache(batch, slots, dtype)`, and `apply` with a cache.
        variables: may hold low-rank leaves: the model is run through `adapt`.
        eos_id: ends a continuation, maybe one of several; None: all have max_new_tokens.
        num_beams: 1 is greedy.
        length_penalty: a finished beam scores sum of log probabilities / length ** penalty, with
            length counted in new tokens, end included (as in transformers).
        early_stopping: a row ends once it has num_beams finished beams; False: only when no live
            beam scores better than the worst of them at its present length.
        batch_size: prompts decoded together; None: all. Similar lengths go together.

    Raises UserError for an empty prompt or a count below 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise UserError(f"prompt {empty[0]} is empty; start it with the tokenizer's bos_id.")
    if eos_id is None:
        ends: tuple[int, ...] = ()
    else:
        ends = tuple(int(e) for e in np.atleast_1d(eos_id))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = batch_size or max(1, len(prompts))
    results: list[list[int]] = [[] for _ in prompts]
    for at in range(0, len(order), size):
        chosen = order[at : at + size]
        # The last batch is filled up with its last prompt: one shape, one compilation.
        rows = [prompts[i] for i in chosen + [chosen[-1]] * (size - len(chosen))]
        tokens_BP, padding_B = left_pad(rows, pad_id)
        new_BN = _decode(
            model,
            variables,
            tokens_BP,
            padding_B,
            max_new_tokens=max_new_tokens,
            ends=ends,
            pad_id=pad_id,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            beam_search=num_beams > 1,
        )
        for i, row in zip(chosen, np.asarray(new_BN).tolist(), strict=False):
            at_end = next((n for n, token in enumerate(row) if token in ends), len(row))
            results[i] = row[:at_end]
    return results


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32[B, P], padding int32[B]): P is a multiple of PROMPT_BUCKET."""
    longest = max(len(prompt) for prompt in prompts)
    length = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    return tokens, np.array([length - len(prompt) for prompt in prompts], np.int32)


@functools.partial(
    jax.jit,
    static_argnames=(
        "model", "max_new_tokens", "ends", "pad_id", "num_beams", "length_penalty",
        "early_stopping", "beam_search",
    ),
)  # fmt: skip
def _decode(
    model: Any,
    variables: Any,
    tokens_BP: jax.Array,
    padding_B: jax.Array,
    *,
    max_new_tokens: int,
    ends: tuple[int, ...],
    pad_id: int,
    num_beams: int,
    length_penalty: float,
    early_stopping: bool,
    beam_search: bool,
) -> jax.Array:
    """New tokens int32[B, N], padded with `pad_id` after the end."""
    apply = adapt(model.apply)
    rows, length = tokens_BP.shape
    slots = length + max_new_tokens
    dtype = jax.eval_shape(
        lambda v, t: apply(v, t, method="hidden"), variables, tokens_BP[:, :1]
    ).dtype
    cache = model.init_cache(rows, slots + prompt_length(variables), dtype)
    places_S = jnp.arange(slots, dtype=jnp.int32)[None]
    mask_BS = places_S >= padding_B[:, None]
    positions_BS = jnp.maximum(places_S - padding_B[:, None], 0)
    # All but the last prompt token. Their logits are unused, so the compiler never makes them.
    _, cache = apply(
        variables,
        tokens_BP[:, :-1],
        positions=positions_BS[:, : length - 1],
        attention_mask=mask_BS,
        cache=cache,
        cache_index=0,
    )
    if beam_search:
        axes = _batch_axes(model, slots, dtype)
        cache = jax.tree.map(lambda x, axis: jnp.repeat(x, num_beams, axis), cache, axes)
        mask_BS = jnp.repeat(mask_BS, num_beams, 0)
        positions_BS = jnp.repeat(positions_BS, num_beams, 0)

    def next_logits(tokens: jax.Array, count: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        slot = count + length - 1
        logits, cache = apply(
            variables,
            tokens[:, None],
            positions=jax.lax.dynamic_slice_in_dim(positions_BS, slot, 1, axis=1),
            attention_mask=mask_BS,
            cache=cache,
            cache_index=slot,
        )
        return logits[:, 0].astype(jnp.float32), cache

    last_B = tokens_BP[:, -1]
    if not beam_search:
        return _greedy(next_logits, last_B, cache, max_new_tokens, ends, pad_id)

    def reorder(cache: Any, rows: jax.Array) -> Any:
        return jax.tree.map(lambda x, axis: jnp.take(x, rows, axis=axis), cache, axes)

    search = _Search(max_new_tokens, ends, pad_id, num_beams, length_penalty, early_stopping)
    return search.run(next_logits, last_B, cache, reorder)


def _batch_axes(model: Any, slots: int, dtype: Any) -> Any:
    """Which axis of each cache array is the batch: the one that grows with it."""
    one, two = (jax.eval_shape(lambda n=n: model.init_cache(n, slots, dtype)) for n in (1, 2))
    return jax.tree.map(
        lambda a, b: next(i for i, (m, n) in enumerate(zip(a.shape, b.shape)) if m != n),  # noqa: B905
        one,
        two,
    )


def _is_end(token: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    found = jnp.zeros(token.shape, bool)
    for end in ends:
        found = found | (token == end)
    return found


def _greedy(
    next_logits: NextLogits,
    last_B: jax.Array,
    cache: Any,
    length: int,
    ends: tuple[int, ...],
    pad_id: int,
) -> jax.Array:
    def unfinished(carry: Any) -> jax.Array:
        count, _, done_B, _, _ = carry
        return (count < length) & ~jnp.all(done_B)

    def body(carry: Any) -> Any:
        count, token_B, done_B, out_BN, cache = carry
        logits_BV, cache = next_logits(token_B, count, cache)
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        token_B = jnp.where(done_B, pad_id, token_B)
        out_BN = out_BN.at[:, count].set(token_B)
        return count + 1, token_B, done_B | _is_end(token_B, ends), out_BN, cache

    rows = last_B.shape[0]
    start = (
        jnp.int32(0),
        last_B.astype(jnp.int32),
        jnp.zeros(rows, bool),
        jnp.full((rows, length), pad_id, jnp.int32),
        cache,
    )
    return jax.lax.while_loop(unfinished, body, start)[3]


class _Beams(NamedTuple):
    """The carry of a beam search. Scores of live beams are sums of log probabilities, those of
    finished ones are divided by length ** penalty; -inf marks an empty place."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, which nobody needs
    token_BK: jax.Array
    live_BKN: jax.Array
    live_score_BK: jax.Array
    done_BKN: jax.Array
    done_score_BK: jax.Array
    over_B: jax.Array
    cache: Any


class _Search(NamedTuple):
    """Beam search: each step looks at the best 2K extensions of a row's K live beams.

    Extensions by the end token among the best K join the finished beams; the best K of the
    others live on.
    """

    length: int
    ends: tuple[int, ...]
    pad_id: int
    beams: int
    penalty: float
    early: bool

    def run(
        self, next_logits: NextLogits, last_B: jax.Array, cache: Any, reorder: Callable[..., Any]
    ) -> jax.Array:
        """The best beam of each row, int32[B, N]."""
        start = self._start(last_B, cache)

        def unfinished(b: _Beams) -> jax.Array:
            return (b.count < self.length) & ~jnp.all(b.over_B)

        def body(b: _Beams) -> _Beams:
            logits, cache = next_logits(b.token_BK.reshape(-1), b.count, b.cache)
            log_probs_BKV = jax.nn.log_softmax(logits).reshape(*b.token_BK.shape, -1)
            beams, parent_BK = self._extend(b, log_probs_BKV)
            offset_B1 = jnp.arange(parent_BK.shape[0])[:, None] * self.beams
            return beams._replace(cache=reorder(cache, (parent_BK + offset_B1).reshape(-1)))

        b = jax.lax.while_loop(unfinished, body, start)
        # Rows that ran out of length may still choose among their live beams.
        live_BK = jnp.where(b.over_B[:, None], -jnp.inf, b.live_score_BK / self._norm(b.count))
        _, best = _best(
            jnp.concatenate([b.done_score_BK, live_BK], 1),
            jnp.concatenate([b.done_BKN, b.live_BKN], 1),
            1,
        )
        return best[:, 0]

    def _norm(self, length: jax.Array) -> jax.Array:
        return length.astype(jnp.float32) ** self.penalty

    def _start(self, last_B: jax.Array, cache: Any) -> _Beams:
        rows, k = last_B.shape[0], self.beams
        empty_BK = jnp.full((rows, k), -jnp.inf)
        blank = jnp.full((rows, k, self.length), self.pad_id, jnp.int32)
        # All beams start alike: only the first may live, or each would be found K times.
        return _Beams(
            count=jnp.int32(0),
            token_BK=jnp.repeat(last_B.astype(jnp.int32)[:, None], k, axis=1),
            live_BKN=blank,
            live_score_BK=empty_BK.at[:, 0].set(0.0),
            done_BKN=blank,
            done_score_BK=empty_BK,
            over_B=jnp.zeros(rows, bool),
            cache=cache,
        )

    def _extend(self, b: _Beams, log_probs_BKV: jax.Array) -> tuple[_Beams, jax.Array]:
        """One token more for each row, and the old beam each new live one comes from."""
        rows, k, vocabulary = log_probs_BKV.shape
        total = (b.live_score_BK[:, :, None] + log_probs_BKV).reshape(rows, -1)
        score_BC, index_BC = jax.lax.top_k(total, min(2 * k, k * vocabulary))
        parent_BC, token_BC = index_BC // vocabulary, (index_BC % vocabulary).astype(jnp.int32)
        sequence_BCN = jnp.take_along_axis(b.live_BKN, parent_BC[:, :, None], axis=1)
        sequence_BCN = sequence_BCN.at[:, :, b.count].set(token_BC)
        ends_BC = _is_end(token_BC, self.ends)

        rank_1C = jnp.arange(score_BC.shape[1])[None]
        closes_BC = ends_BC & (rank_1C < k) & ~b.over_B[:, None]
        closed_BC = jnp.where(closes_BC, score_BC / self._norm(b.count + 1), -jnp.inf)
        done_score_BK, done_BKN = _best(
            jnp.concatenate([b.done_score_BK, closed_BC], 1),
            jnp.concatenate([b.done_BKN, sequence_BCN], 1),
            k,
        )

        live_score_BK, at_BK = jax.lax.top_k(jnp.where(ends_BC, -jnp.inf, score_BC), k)
        full_B = jnp.all(done_score_BK > -jnp.inf, axis=1)
        if not self.early:
            hope_B = live_score_BK[:, 0] / self._norm(b.count + 1)
            full_B = full_B & (hope_B <= jnp.min(done_score_BK, axis=1))
        beams = _Beams(
            count=b.count + 1,
            token_BK=jnp.take_along_axis(token_BC, at_BK, axis=1),
            live_BKN=jnp.take_along_axis(sequence_BCN, at_BK[:, :, None], axis=1),
            live_score_BK=live_score_BK,
            done_BKN=done_BKN,
            done_score_BK=done_score_BK,
            over_B=b.over_B | full_B,
            cache=b.cache,
        )
        return beams, jnp.take_along_axis(parent_BC, at_BK, axis=1)


def _best(score: jax.Array, sequence: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best of score [B, C] and their sequences [B, C, N]."""
    score, at = jax.lax.top_k(score, k)
    return score, jnp.take_along_axis(sequence, at[:, :, None], axis=1)
