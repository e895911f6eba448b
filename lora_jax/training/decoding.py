"""Decoding with a key/value cache: greedy, sampled or by beams, one compiled program a shape.

Axes: B rows, R rows times beams, F prefix, P prompt positions, N new tokens, S = F + P + N cache
slots, V vocabulary. Prompts are padded on the left, so that every row writes the same cache slot
at the same time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError
from lora_jax.models import prompt_length
from lora_jax.tensors import adapt
from lora_jax.tensors.members import rows_of, take_rows
from lora_jax.training.beams import NextLogits, Restrict, Search, any_left, is_end
from lora_jax.training.prompts import collect, prompt_batches
from lora_jax.training.sampling import Sampling, ban_repeats


def generate(
    model: Any,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None,
    pad_id: int,
    prefix: Sequence[int] = (),
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = True,
    no_repeat_ngram_size: int = 0,
    sampling: Sampling | None = None,
    batch_size: int | None = None,
) -> list[list[int]]:
    """The continuation of each prompt, without the prompt and up to but without `eos_id`.

    Args:
        eos_id: ends a continuation, maybe one of several; None: all have max_new_tokens.
        prefix: tokens before every prompt, run through the model only once a batch.
        batch_size: prompts decoded together; None: all. Similar lengths go together.
        variables: as of `decode`; of adapters chosen by row, a row is a prompt.
        model and the others: see `decode`.

    Raises UserError for an empty prompt, for adapters chosen for another number of prompts, and for
    options that `decode` refuses.
    """
    if eos_id is None:
        ends: tuple[int, ...] = ()
    else:
        ends = tuple(int(e) for e in np.atleast_1d(eos_id))
    rows = rows_of(variables)
    if rows is not None and rows != len(prompts):
        raise UserError(f"adapters are chosen for {rows} rows, but {len(prompts)} prompts given")
    if prefix and (no_repeat_ngram_size or rows is not None):
        # The n-grams of prefix and prompt are those of one text, without padding between them;
        # and where adapters are chosen by row, no two rows read the prefix alike.
        prompts, prefix = [[*prefix, *prompt] for prompt in prompts], ()
    batches = prompt_batches(prompts, pad_id, batch_size=batch_size)
    options: dict[str, Any] = {"ends": ends, "pad_id": pad_id}
    options |= {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    options |= {"length_penalty": length_penalty, "early_stopping": early_stopping}
    options |= {"no_repeat_ngram_size": no_repeat_ngram_size}
    if prefix:
        options["prefix_F"] = np.asarray(prefix, np.int32)
    outputs = []
    for batch in batches:
        if sampling is not None:
            # The seed is in the keys: another one is no other program.
            options["sampling"] = dataclasses.replace(sampling, seed=0)
            options["keys_B"] = sampling.keys(jnp.asarray(batch["rows"]))
        own = take_rows(variables, batch["rows"])
        outputs.append(_decode(model, own, batch["tokens"], batch["padding"], **options))
    return collect(batches, [np.asarray(x) for x in outputs], ends)


def decode(
    model: Any,
    variables: Any,
    tokens_BP: jax.Array,
    padding_B: jax.Array,
    *,
    max_new_tokens: int,
    ends: tuple[int, ...] = (),
    pad_id: int = 0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = True,
    no_repeat_ngram_size: int = 0,
    sampling: Sampling | None = None,
    keys_B: jax.Array | None = None,
    prefix_F: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """New tokens int32[B, N], padded with `pad_id` after the end. Pure: jit or vmap it.

    A pack of models decodes by `jax.vmap(lambda trainable: decode(model, method.combine(frozen,
    trainable), …, axis_name="members"), axis_name="members")`; `axis_name` is not needed for the
    result, but for a loop that stays as cheap as a single model's.

    Args:
        model: has `init_cache(batch, slots, dtype)`, and `apply` with a cache.
        variables: may hold low-rank leaves: the model is run through `adapt`.
        tokens_BP, padding_B: prompts and how many positions on their left are padding.
        max_new_tokens: N.
        ends: tokens that end a row.
        num_beams: 1 is greedy.
        length_penalty: a finished beam scores sum of log probabilities / length ** penalty, with
            length counted in new tokens, end included (as in transformers).
        early_stopping: a row ends once it has num_beams finished beams; False: only when no live
            beam scores better than the worst of them at its present length.
        no_repeat_ngram_size: n-grams of prompt and continuation that may not occur twice (see
            `sampling.ban_repeats`); 0: any may.
        sampling: draw tokens; with it `keys_B`, one typed key a row (`Sampling.keys`).
        prefix_F: tokens int[F] before every prompt; attended to, but not to ban n-grams.

    Raises UserError for counts out of range, and for options that exclude each other.
    """
    _check_options(max_new_tokens, num_beams, no_repeat_ngram_size, sampling, keys_B)
    tokens_BP = jnp.asarray(tokens_BP, jnp.int32)
    padding_B = jnp.asarray(padding_B, jnp.int32)
    if tokens_BP.shape[1] == 1:  # all but the last token go ahead: there must be some
        tokens_BP, padding_B = jnp.pad(tokens_BP, ((0, 0), (1, 0))), padding_B + 1
    next_logits, cache, axes = _prefill(
        model, variables, tokens_BP, padding_B, prefix_F, max_new_tokens, num_beams
    )
    tokens_RP = jnp.repeat(tokens_BP, num_beams, 0)
    padding_R = jnp.repeat(padding_B, num_beams, 0)

    def restrict(scores_RV: jax.Array, new_RN: jax.Array, count: jax.Array) -> jax.Array:
        if not no_repeat_ngram_size:
            return scores_RV
        history_RS = jnp.concatenate([tokens_RP, new_RN], axis=1)
        length = tokens_RP.shape[1] + count
        return ban_repeats(scores_RV, history_RS, length, padding_R, no_repeat_ngram_size)

    last_B = tokens_BP[:, -1]
    if num_beams > 1:
        search = Search(
            max_new_tokens, ends, pad_id, num_beams, length_penalty, early_stopping, axis_name
        )
        return search.run(
            next_logits, restrict, last_B, cache, lambda c, rows: _take(c, axes, rows)
        )

    def choose(logits_BV: jax.Array, new_BN: jax.Array, count: jax.Array) -> jax.Array:
        allowed_BV = restrict(logits_BV, new_BN, count)
        if sampling is None or keys_B is None:
            return jnp.argmax(allowed_BV, axis=-1)
        return sampling.draw(keys_B, allowed_BV, count)

    return follow(next_logits, choose, last_B, cache, max_new_tokens, ends, pad_id, axis_name)


_decode = functools.partial(
    jax.jit,
    static_argnames=(
        "model", "max_new_tokens", "ends", "pad_id", "num_beams", "length_penalty",
        "early_stopping", "no_repeat_ngram_size", "sampling", "axis_name",
    ),
)(decode)  # fmt: skip


def _check_options(
    length: int, beams: int, ngram: int, sampling: Sampling | None, keys: Any
) -> None:
    for name, value in (("max_new_tokens", length), ("num_beams", beams)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    if ngram < 0:
        raise UserError(f"no_repeat_ngram_size={ngram} must not be negative; 0 turns it off.")
    if sampling is not None and beams > 1:
        raise UserError("sampling and num_beams > 1 exclude each other.")
    if (sampling is None) != (keys is None):
        raise UserError("sampling needs keys_B, one a row: sampling.keys(jnp.arange(rows)).")


def _prefill(
    model: Any,
    variables: Any,
    tokens_BP: jax.Array,
    padding_B: jax.Array,
    prefix_F: jax.Array | None,
    new: int,
    beams: int,
) -> tuple[NextLogits, Any, Any]:
    """(the function of the next logits, cache of all but the last token, its batch axes)."""
    apply = adapt(model.apply)
    rows, length = tokens_BP.shape
    ahead = 0 if prefix_F is None else prefix_F.shape[0]
    slots = ahead + length + new
    dtype = jax.eval_shape(
        lambda v, t: apply(v, t, method="hidden"), variables, tokens_BP[:, :1]
    ).dtype
    axes = _batch_axes(model, slots, dtype)
    cache = model.init_cache(rows if not ahead else 1, slots + prompt_length(variables), dtype)
    places_S = jnp.arange(slots, dtype=jnp.int32)[None]
    inside_BS = (places_S < ahead) | (places_S >= ahead + padding_B[:, None])
    positions_BS = jnp.where(
        places_S < ahead, places_S, jnp.maximum(places_S - padding_B[:, None], ahead)
    )

    def read(tokens: jax.Array, cache: Any, first: int) -> Any:
        # The logits are unused, so the compiler never makes them.
        stop, n = first + tokens.shape[1], tokens.shape[0]
        return apply(
            variables,
            tokens,
            positions=positions_BS[:n, first:stop],
            attention_mask=inside_BS[:n],
            cache=cache,
            cache_index=first,
        )[1]

    if prefix_F is not None:
        cache = read(jnp.asarray(prefix_F, jnp.int32)[None], cache, 0)
        cache = _take(cache, axes, jnp.zeros(rows, jnp.int32))
    cache = read(tokens_BP[:, :-1], cache, ahead)
    if beams > 1:
        cache = _take(cache, axes, jnp.repeat(jnp.arange(rows), beams))
    variables_R = take_rows(variables, jnp.repeat(jnp.arange(rows), beams))
    inside_RS = jnp.repeat(inside_BS, beams, 0)
    positions_RS = jnp.repeat(positions_BS, beams, 0)

    def next_logits(tokens_R: jax.Array, count: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        slot = ahead + length - 1 + count
        logits, cache = apply(
            variables_R,
            tokens_R[:, None],
            positions=jax.lax.dynamic_slice_in_dim(positions_RS, slot, 1, axis=1),
            attention_mask=inside_RS,
            cache=cache,
            cache_index=slot,
        )
        return logits[:, 0].astype(jnp.float32), cache

    return next_logits, cache, axes


def _batch_axes(model: Any, slots: int, dtype: Any) -> Any:
    """Which axis of each cache array is the batch: the one that grows with it."""
    one, two = (jax.eval_shape(lambda n=n: model.init_cache(n, slots, dtype)) for n in (1, 2))
    return jax.tree.map(
        lambda a, b: next(i for i, (m, n) in enumerate(zip(a.shape, b.shape)) if m != n),  # noqa: B905
        one,
        two,
    )


def _take(cache: Any, axes: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda x, axis: jnp.take(x, rows, axis=axis), cache, axes)


def follow(
    next_logits: NextLogits,
    choose: Restrict,
    last_B: jax.Array,
    cache: Any,
    length: int,
    ends: tuple[int, ...],
    pad_id: int,
    axis_name: str | None = None,
) -> jax.Array:
    """int32[B, length]: one continuation a row, by `choose`(logits, new tokens, how many)."""

    def unfinished(carry: Any) -> jax.Array:
        count, _, done_B, _, _ = carry
        return (count < length) & any_left(~done_B, axis_name)

    def body(carry: Any) -> Any:
        count, token_B, done_B, out_BN, cache = carry
        logits_BV, cache = next_logits(token_B, count, cache)
        token_B = choose(logits_BV, out_BN, count).astype(jnp.int32)
        token_B = jnp.where(done_B, pad_id, token_B)
        out_BN = out_BN.at[:, count].set(token_B)
        return count + 1, token_B, done_B | is_end(token_B, ends), out_BN, cache

    rows = last_B.shape[0]
    start = (
        jnp.int32(0),
        last_B.astype(jnp.int32),
        jnp.zeros(rows, bool),
        jnp.full((rows, length), pad_id, jnp.int32),
        cache,
    )
    return jax.lax.while_loop(unfinished, body, start)[3]
