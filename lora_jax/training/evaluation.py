"""Batches of an evaluation: onto a mesh, through a model, and their rows back in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.errors import UserError
from lora_jax.training import mesh as meshes

Batch = Mapping[str, Any]
ROWS = "rows"
"""Name of the array int[B] that says which record each row of a batch is; -1 where it fills up."""


def real_rows(batches: Sequence[Batch], outputs: Sequence[np.ndarray]) -> np.ndarray:
    """[N, …]: rows of `outputs` that are records, in the records' order.

    Rows whose weight is 0 or whose record is -1 are left out. The order is that of `batch["rows"]`
    where batches have it, else that of the batches. Raises UserError if there are no batches.
    """
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


def placed(batch: Batch, mesh: Mesh | None) -> dict[str, Any]:
    """A batch's inputs, without ROWS; where their number divides, rows lie over a mesh's data and
    fsdp axes, else every device has them all."""
    inputs = {name: value for name, value in batch.items() if name != ROWS}
    if mesh is None:
        return inputs
    parts = math.prod(mesh.shape[name] for name in meshes.BATCH_AXES)
    divides = all(x.shape[0] % parts == 0 for x in inputs.values())
    where = meshes.batch_sharding(mesh) if divides else NamedSharding(mesh, PartitionSpec())
    return {name: jax.device_put(np.asarray(x), where) for name, x in inputs.items()}


def compiled(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """(variables, batch of `placed`) -> outputs, of which every device of a mesh has the whole."""
    if mesh is None:
        return jax.jit(function)
    return jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec()))
