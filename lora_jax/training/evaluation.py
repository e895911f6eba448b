"""Predictions and losses over whole data sets, one compiled program a batch shape."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.errors import UserError
from lora_jax.training import loss
from lora_jax.training import mesh as meshes

Batch = Mapping[str, Any]
ROWS = "rows"
"""Name of the array int[B] that says which record each row of a batch is; -1 where it fills up."""


def logits(model: Any, variables: Any, batch: Batch) -> jax.Array:
    """Outputs float32 [B, C] of a model with a head; pure, `variables` may hold weights."""
    return loss.outputs(model, variables, batch)


def predict(
    model: Any, variables: Any, batches: Iterable[Batch], *, mesh: Mesh | None = None
) -> np.ndarray:
    """float32 [N, C]: logits of a classifier, values [N, 1] of a regression; fillers left out.

    Args:
        model: with a classification or regression head.
        variables: may hold low-rank and other weights; on `mesh` if one is given.
        batches: of encoders, see `loss.outputs`. Results are in the order of `batch["rows"]`
            where batches have it, else in that of the batches.
        mesh: rows of every batch are spread over its data and fsdp axes. Batches must then hold
            all rows on each process.

    Raises UserError if there are no batches.
    """
    kept, found = [], []
    for batch in batches:
        found.append(_logits(model, variables, _place(batch, mesh), _everywhere(mesh)))
        kept.append({k: np.asarray(v) for k, v in batch.items() if k in (ROWS, "weights")})
    # Only now to the host: the device was never kept waiting.
    return real_rows(kept, [np.asarray(x) for x in found])


def real_rows(batches: Sequence[Batch], outputs: Sequence[np.ndarray]) -> np.ndarray:
    """[N, …]: rows of `outputs` that are records, in the records' order; see `predict`."""
    if not outputs:
        raise UserError("there are no batches to evaluate on; is the validation split empty?")
    rows, places = [], []
    for batch, output in zip(batches, outputs, strict=True):
        real = np.ones(len(output), bool)
        if "weights" in batch:
            real &= np.asarray(batch["weights"]) != 0
        if ROWS in batch:
            real &= np.asarray(batch[ROWS]) >= 0
            places.append(np.asarray(batch[ROWS])[real])
        rows.append(np.asarray(output)[real])
    found = np.concatenate(rows)
    return found[np.argsort(np.concatenate(places), kind="stable")] if places else found


def mean_loss(
    loss_fn: Any, variables: Any, batches: Iterable[Batch], *, mesh: Mesh | None = None
) -> float:
    """Sum of weighted losses over all batches, divided by the sum of all weights.

    Args:
        loss_fn: (variables, batch) -> (sum of weighted losses, sum of weights), as for
            `make_step`. Compiled once per function *object* and shape: pass the same one again.
        variables, mesh: as for `predict`.

    Raises UserError if nothing has weight.
    """
    parts = [
        _losses(loss_fn, variables, _place(batch, mesh), _everywhere(mesh)) for batch in batches
    ]
    total = sum(float(value) for value, _ in parts)
    weight = sum(float(weight) for _, weight in parts)
    if weight == 0:
        raise UserError("no position of the batches carries loss; is the validation split empty?")
    return total / weight


def _place(batch: Batch, mesh: Mesh | None) -> dict[str, Any]:
    inputs = {name: value for name, value in batch.items() if name != ROWS}
    if mesh is None:
        return inputs
    placed = meshes.batch_sharding(mesh)
    meshes.check_rows(inputs, mesh, 1)
    return {name: jax.device_put(np.asarray(value), placed) for name, value in inputs.items()}


def _everywhere(mesh: Mesh | None) -> NamedSharding | None:
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def _replicated(x: Any, sharding: NamedSharding | None) -> Any:
    # So that every process can read the whole result.
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


@functools.partial(jax.jit, static_argnames=("model", "sharding"))
def _logits(model: Any, variables: Any, batch: Batch, sharding: Any) -> jax.Array:
    return _replicated(logits(model, variables, batch), sharding)


@functools.partial(jax.jit, static_argnames=("loss_fn", "sharding"))
def _losses(loss_fn: Any, variables: Any, batch: Batch, sharding: Any) -> Any:
    return _replicated(loss_fn(variables, batch), sharding)
