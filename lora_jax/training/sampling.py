"""What the next token may be: repeated n-grams banned, and sampling.

Axes: R rows (or rows times beams), S positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Tokens drawn from the model's distribution, in transformers' order of the filters.

    Attributes:
        temperature: divides the logits.
        top_k: only the k most likely tokens; 0: all.
        top_p: of those, the fewest that together have at least this probability (Holtzman et al.
            2020, arXiv:1904.09751); 1: all.
        seed: each prompt has its own stream of random numbers, whatever it is batched with.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(
                f"temperature={self.temperature} must be above 0; greedy is no sampling"
            )
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must not be negative; 0 keeps all tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be in (0, 1]; 1 keeps all tokens.")

    def keys(self, rows: jax.Array) -> jax.Array:
        """One typed key for each prompt number."""
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.seed), rows)

    def filtered(self, logits_RV: jax.Array) -> jax.Array:
        """Logits over temperature, -inf for tokens that may not be drawn."""
        logits_RV = logits_RV / self.temperature
        if 0 < self.top_k < logits_RV.shape[-1]:
            least_R1 = jax.lax.top_k(logits_RV, self.top_k)[0][:, -1:]
            logits_RV = jnp.where(logits_RV < least_R1, -jnp.inf, logits_RV)
        if self.top_p < 1:
            sorted_RV = jnp.flip(jnp.sort(logits_RV, axis=-1), axis=-1)
            chances_RV = jax.nn.softmax(sorted_RV, axis=-1)
            # A token stays while those before it have not reached top_p: the first always does.
            before_RV = jnp.cumsum(chances_RV, axis=-1) - chances_RV
            kept_RV = jnp.where(before_RV < self.top_p, sorted_RV, jnp.inf)
            least_R1 = jnp.min(kept_RV, axis=-1, keepdims=True)
            logits_RV = jnp.where(logits_RV < least_R1, -jnp.inf, logits_RV)
        return logits_RV

    def draw(self, keys_R: jax.Array, logits_RV: jax.Array, count: jax.Array) -> jax.Array:
        """int[R]: token number `count` of each row."""
        keys_R = jax.vmap(jax.random.fold_in, (0, None))(keys_R, count)
        return jax.vmap(jax.random.categorical)(keys_R, self.filtered(logits_RV))


def ban_repeats(
    scores_RV: jax.Array,
    history_RS: jax.Array,
    length: jax.Array,
    start_R: jax.Array,
    size: int,
) -> jax.Array:
    """-inf for each token that would repeat an n-gram of the row's history, prompt included.

    Equals transformers' NoRepeatNGramLogitsProcessor on a prompt without padding.

    Args:
        history_RS: tokens; those from `start_R` to `length` - 1 count.
        size: n.
    """
    windows = history_RS.shape[1] - size + 1
    if windows < 1:
        return scores_RV
    first_W = jnp.arange(windows)[None]
    match_RW = (first_W >= start_R[:, None]) & (first_W + size <= length)
    for n in range(size - 1):
        # The n-gram that the next token would end begins at length - size + 1.
        ours_R1 = jax.lax.dynamic_slice_in_dim(history_RS, length - size + 1 + n, 1, axis=1)
        match_RW &= history_RS[:, n : n + windows] == ours_R1
    rows_R1 = jnp.arange(scores_RV.shape[0])[:, None]
    banned_RV = jnp.zeros(scores_RV.shape, bool)
    banned_RV = banned_RV.at[rows_R1, history_RS[:, size - 1 :]].max(match_RW)
    return jnp.where(banned_RV, -jnp.inf, scores_RV)
