"""Placeholders behind every prompt, for methods that train tokens of their own there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_jax.data.examples import Example
from lora_jax.errors import UserError


def behind_prompts(examples: Sequence[Example], ids: Sequence[int]) -> list[Example]:
    """Examples with `ids` put before the first target; themselves no targets.

    Args:
      examples: of a language model: their loss_mask says where the prompt ends.
      ids: token ids, such as `method.placeholders(params)`.

    Raises:
      UserError: examples with labels: they have no prompt and completion.
    """
    found: list[Example] = []
    for example in examples:
        if "loss_mask" not in example:
            raise UserError(
                "placeholders between prompt and completion (infix) need a language model's task"
            )
        mask = np.asarray(example["loss_mask"])
        targets = np.flatnonzero(mask)
        at = int(targets[0]) if len(targets) else len(mask)
        found.append(
            {
                "tokens": np.insert(example["tokens"], at, list(ids)).astype(np.int32),
                "loss_mask": np.insert(mask, at, [0.0] * len(ids)).astype(np.float32),
            }
        )
    return found
