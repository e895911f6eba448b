"""Forward passes of one model with several methods, in turns in one process.

What Table 1 of the LoRA paper and the article's claim on latency share.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from benchmarking import interleaved, token_batch

import lora_jax as lj

BASE = "FT"
"""The arm without a method: ordinary weights, as full fine-tuning leaves them."""


def variables(method: Any, params: Any, *, merged: bool) -> dict[str, Any]:
    """What the model is applied to: an ordinary tree if merged, else with the method beside it."""
    trainable = method.init(jax.random.key(0), params)
    if merged:
        return {"params": method.merge(params, trainable)}
    return dict(method.combine(params, trainable))


def cells(
    model: Any,
    params: Any,
    methods: Mapping[str, tuple[Any, bool]],
    rows: int,
    length: int,
    *,
    rounds: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Cells of a table, by metric: `{name} (ms)`, and `{name} overhead (%)` over the base.

    Each is a median over rounds; an overhead is taken within a round, so that a slow minute meets
    both. The logits of all positions are computed.

    Args:
      methods: (method, merged or not) by name; the base itself is timed as `BASE`.
      seed: of the tokens.
    """
    tokens = jnp.asarray(token_batch(rows, length, model.config.vocab_size, seed))
    run = jax.jit(lj.adapt(model.apply))
    trees = {BASE: {"params": params}}
    trees |= {name: variables(m, params, merged=merged) for name, (m, merged) in methods.items()}

    def arm(tree: Any) -> Any:
        return lambda: jax.block_until_ready(run(tree, tokens))

    seconds = interleaved({name: arm(tree) for name, tree in trees.items()}, rounds)
    found: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        found[f"{name} (ms)"] = {"value": 1e3 * statistics.median(values)}
        if name != BASE:
            ratios = [a / b for a, b in zip(values, seconds[BASE], strict=True)]
            counted = methods[name][0].count(params).total
            found[f"{name} overhead (%)"] = {"value": 100 * (statistics.median(ratios) - 1)}
            for cell in (f"{name} (ms)", f"{name} overhead (%)"):
                found[cell]["trainable_params"] = counted
    return found
