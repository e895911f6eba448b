"""Predictions and mean losses over batches, with weights as leaves and on a mesh."""

import functools

import jax
import numpy as np
import pytest
import tiny

from lora_jax.errors import UserError
from lora_jax.tensors import LowRank, adapt
from lora_jax.training import MeshConfig, chunked_loss, evaluation, make_mesh, mean_loss, predict


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


@pytest.mark.parametrize("devices", [None, MeshConfig(data=2, fsdp=2)], ids=str)
def test_predictions_are_those_of_the_records_in_order(devices):
    variables, dense = low_rank_variables()
    mesh = None if devices is None else make_mesh(devices)
    found = predict(tiny.Head, variables, iter(batches()), mesh=mesh)
    # Only the first token of a row is attended to, and it is the record's number.
    np.testing.assert_allclose(found, dense[:10], rtol=1e-5)
    assert found.dtype == np.float32
    without = [{k: v for k, v in b.items() if k != "rows"} for b in batches()]
    order = [3, 1, 9, 0, 2, 8, 4, 7, 5, 6]
    np.testing.assert_allclose(predict(tiny.Head, variables, without), dense[np.array(order)])


def test_one_program_a_shape():
    traced = []

    class Counting(tiny.Head):
        @staticmethod
        def apply(variables, tokens, **options):
            traced.append(tokens.shape)
            return tiny.Head.apply(variables, tokens, **options)

    variables, _ = low_rank_variables()
    evaluation.predict(Counting, variables, batches())
    evaluation.predict(Counting, variables, batches())
    assert sorted(set(traced)) == [(4, 3), (4, 5)] and len(traced) <= 4


@pytest.mark.parametrize("devices", [None, MeshConfig(data=4)], ids=str)
def test_mean_loss_weighs_tokens_not_batches(devices):
    params = tiny.params()
    trainable = jax.tree.map(lambda x: x + 0.1, tiny.METHOD.init(jax.random.key(0), params))
    variables = tiny.METHOD.combine(params, trainable)
    loss = functools.partial(chunked_loss, tiny.MODEL)
    parts = [tiny.batch(0), tiny.batch(1)]
    parts[1]["loss_mask"] = parts[1]["loss_mask"] * (np.arange(8) < 2)[:, None].astype(np.float32)
    sums = [adapt(loss)(variables, part) for part in parts]
    expected = (sums[0][0] + sums[1][0]) / (sums[0][1] + sums[1][1])
    mesh = None if devices is None else make_mesh(devices)
    found = mean_loss(loss, variables, parts, mesh=mesh)
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert abs(found - np.mean([a / b for a, b in sums])) > 1e-4


def test_nothing_to_evaluate():
    with pytest.raises(UserError, match="no batches"):
        predict(tiny.Head, {}, [])
    with pytest.raises(UserError, match="carries loss"):
        mean_loss(lambda v, b: (0.0, 0.0), {}, [{}])
    with pytest.raises(UserError, match="multiple of 3"):
        mesh = make_mesh(MeshConfig(data=3), jax.devices()[:3])
        predict(tiny.Head, low_rank_variables()[0], batches(), mesh=mesh)
