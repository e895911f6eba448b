"""Prompts in batches for `decoding.decode`, and its results back in the prompts' order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lora_jax.data.bucketing import rows_a_batch
from lora_jax.errors import UserError

PROMPT_BUCKET = 16
"""Prompt lengths are rounded up to a multiple of this: fewer shapes, fewer compilations."""


def prompt_batches(
    prompts: Sequence[Sequence[int]], pad_id: int, *, batch_size: int | None = None
) -> list[dict[str, np.ndarray]]:
    """Batches for `decode`, prompts of similar length together; see `rows_a_batch`.

    Each has tokens int32[B, P] and padding int32[B] (see `left_pad`), and rows int32[B]: which
    prompt a row is, -1 where it only fills up the last batch.

    Raises UserError for an empty prompt, or a batch size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise UserError(f"prompt {empty[0]} is empty; start it with the tokenizer's bos_id.")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = rows_a_batch(len(prompts), batch_size or max(1, len(prompts)))
    batches = []
    for at in range(0, len(order), size):
        chosen = order[at : at + size]
        # The last batch is filled up with its last prompt: one shape, one compilation.
        filler = size - len(chosen)
        tokens, padding = left_pad([prompts[i] for i in chosen + chosen[-1:] * filler], pad_id)
        rows = np.array(chosen + [-1] * filler, np.int32)
        batches.append({"tokens": tokens, "padding": padding, "rows": rows})
    return batches


def collect(
    batches: Sequence[Mapping[str, np.ndarray]],
    outputs: Sequence[np.ndarray],
    ends: tuple[int, ...],
) -> list[list[int]]:
    """The new tokens of each prompt up to its end, in the prompts' order.

    Args:
        batches: from `prompt_batches`.
        outputs: of `decode` for each batch, int32[B, N].
    """
    found: dict[int, list[int]] = {}
    for batch, new_BN in zip(batches, outputs, strict=True):
        for row, tokens in zip(batch["rows"].tolist(), np.asarray(new_BN).tolist(), strict=True):
            if row >= 0:
                at_end = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
                found[row] = tokens[:at_end]
    return [found[row] for row in range(len(found))]


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32[B, P], padding int32[B]): P is a multiple of PROMPT_BUCKET."""
    longest = max(len(prompt) for prompt in prompts)
    length = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    return tokens, np.array([length - len(prompt) for prompt in prompts], np.int32)
