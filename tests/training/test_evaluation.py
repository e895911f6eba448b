"""Batches of an evaluation: onto a mesh, and the rows of what comes back in the records' order."""

import functools

import jax
import numpy as np
import pytest
import tiny

from lora_jax.errors import UserError
from lora_jax.tensors import LowRank, adapt
from lora_jax.training import MeshConfig, evaluation, loss, make_mesh


@functools.cache
def batches():
    """10 records in 3 batches of 4, two lengths, two filler rows, out of order."""
    draw, order, made = np.random.default_rng(0), [3, 1, 9, 0, 2, 8, 4, 7, 5, 6, -1, -1], []
    for n, length in enumerate((3, 5, 5)):
        rows = np.array(order[4 * n : 4 * n + 4], np.int32)
        tokens = draw.integers(0, 12, (4, length))
        tokens[:, 0] = np.maximum(rows, 0)
        made.append(
            {
                "tokens": tokens, "rows": rows, "labels": np.zeros(4, np.int32),
                "attention_mask": (np.arange(length)[None] == 0).astype(np.int32).repeat(4, 0),
                "token_type_ids": np.zeros((4, length), np.int32),
                "weights": (rows >= 0).astype(np.float32),
            }
        )  # fmt: skip
    return made


def low_rank_variables():
    table = jax.random.normal(jax.random.key(0), (12, 2))
    a, b = np.full((12, 1), 0.5, np.float32), np.array([[1.0, -1.0]], np.float32)
    return {
        "table": LowRank(table, a, b, jax.numpy.asarray(2.0), path="table")
    }, table + 2.0 * a @ b


@pytest.mark.parametrize("devices", [None, MeshConfig(data=2, fsdp=2), MeshConfig(data=3)], ids=str)
def test_predictions_are_those_of_the_records_in_order(devices):
    """Rows that do not divide over the devices are computed by all of them."""
    variables, dense = low_rank_variables()
    mesh = None
    if devices is not None:
        mesh = make_mesh(devices, jax.devices()[: devices.devices])
    run = evaluation.compiled(adapt(functools.partial(loss.outputs, tiny.Head)), mesh)
    outputs = [run(variables, evaluation.placed(b, mesh)) for b in batches()]
    if mesh is not None:
        assert all(x.sharding.is_fully_replicated for x in outputs)
    # Only the first token of a row is attended to, and it is the record's number.
    found = evaluation.real_rows(batches(), outputs)
    np.testing.assert_allclose(found, dense[:10], rtol=1e-5)
    assert found.dtype == np.float32
    without = [{k: v for k, v in b.items() if k != "rows"} for b in batches()]
    order = [3, 1, 9, 0, 2, 8, 4, 7, 5, 6]
    found = evaluation.real_rows(without, outputs)
    np.testing.assert_allclose(found, dense[np.array(order)], rtol=1e-5)


def test_one_program_a_shape():
    traced = []

    def counting(variables, batch):
        traced.append(batch["tokens"].shape)
        return loss.outputs(tiny.Head, variables, batch)

    run, (variables, _) = evaluation.compiled(adapt(counting), None), low_rank_variables()
    for _ in range(2):
        for batch in batches():
            run(variables, evaluation.placed(batch, None))
    assert sorted(set(traced)) == [(4, 3), (4, 5)] and len(traced) <= 4


def test_nothing_to_evaluate():
    with pytest.raises(UserError, match="no batches"):
        evaluation.real_rows([], [])
