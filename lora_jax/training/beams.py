"""Beam search over a function that gives the next token's logits.

Axes: B rows, K beams, C = 2K candidates, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NextLogits = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""(tokens int[rows], new tokens before them, cache) -> (logits float32[rows, V], cache)."""
Restrict = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(scores [rows, V], new tokens [rows, N], how many) -> scores, -inf where a token is banned."""


def is_end(token: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    """Whether each token is one of `ends`."""
    found = jnp.zeros(token.shape, bool)
    for end in ends:
        found = found | (token == end)
    return found


def any_left(unfinished: jax.Array, axis_name: str | None) -> jax.Array:
    """Whether any row, of any member along the vmapped axis, still grows.

    Asking all members keeps a loop's condition and count single numbers under vmap; each member's
    own would make every cache write a scatter, and copy the cache at each step.
    """
    left = jnp.any(unfinished)
    return left if axis_name is None else jax.lax.psum(left.astype(jnp.int32), axis_name) > 0


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


class Search(NamedTuple):
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
    axis_name: str | None

    def run(
        self,
        next_logits: NextLogits,
        restrict: Restrict,
        last_B: jax.Array,
        cache: Any,
        reorder: Callable[[Any, jax.Array], Any],
    ) -> jax.Array:
        """The best beam of each row, int32[B, N].

        Args:
            last_B: the last token of each prompt; `cache` holds those before it, K times each.
            reorder: (cache, rows [B * K]) -> cache with its rows taken anew.
        """
        start = self._start(last_B, cache)

        def unfinished(b: _Beams) -> jax.Array:
            return (b.count < self.length) & any_left(~b.over_B, self.axis_name)

        def body(b: _Beams) -> _Beams:
            logits, cache = next_logits(b.token_BK.reshape(-1), b.count, b.cache)
            new = b.live_BKN.reshape(-1, self.length)
            # Banned after the softmax, as in transformers: what is left is not renormalised.
            scores = restrict(jax.nn.log_softmax(logits), new, b.count)
            beams, parent_BK = self._extend(b, scores.reshape(*b.token_BK.shape, -1))
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
        ends_BC = is_end(token_BC, self.ends)

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
