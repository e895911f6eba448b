"""The chunked loss against the plain one, and what counts as a target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lora_jax.errors import UserError
from lora_jax.tensors import adapt
from lora_jax.training import chunked_loss, count_targets, token_losses


def plain(variables, batch):
    """Whole logits and a loop over positions: nothing shared with the code under test."""
    logits = tiny.MODEL.apply(
        variables, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    logs = jax.nn.log_softmax(logits)
    total, weight = 0.0, 0.0
    tokens, mask, segments = (batch[k] for k in ("tokens", "loss_mask", "segment_ids"))
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1] - 1):
            if segments[b, t] == segments[b, t + 1] != 0:
                total -= mask[b, t + 1] * logs[b, t, tokens[b, t + 1]]
                weight += mask[b, t + 1]
    return total, weight


@pytest.fixture(scope="module")
def packed():
    batch = tiny.batch(3, rows=2)
    batch["segment_ids"] = np.where(np.arange(tiny.LENGTH)[None] < 5, 1, 2) * (
        batch["segment_ids"] != 0
    ).astype(np.int32)
    return batch


@pytest.mark.parametrize(
    "options", [{"chunk": 7}, {"chunk": 1024}, {"chunk": 5, "max_targets": 19}]
)
def test_chunked_equals_plain(packed, options):
    variables = {"params": tiny.params()}
    expected, weight = plain(variables, packed)
    total, count = chunked_loss(tiny.MODEL, variables, packed, **options)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert float(count) == weight == count_targets(packed)


def test_gradient_through_low_rank_leaves_equals_plain(packed):
    params = tiny.params()
    trainable = jax.tree.map(lambda x: x + 0.1, tiny.METHOD.init(jax.random.key(0), params))

    def gradient(loss):
        def run(t):
            # The batch is closed over: the plain loss branches on its values.
            return adapt(lambda v: loss(v, packed))(tiny.METHOD.combine(params, t))[0]

        return jax.grad(run)(trainable)

    expected = gradient(plain)
    tiny.close(gradient(lambda v, b: chunked_loss(tiny.MODEL, v, b, chunk=6)), expected)
    tiny.close(
        gradient(lambda v, b: chunked_loss(tiny.MODEL, v, b, chunk=6, max_targets=24)), expected
    )


def test_too_many_targets_is_nan_and_not_a_part(packed):
    few = count_targets(packed) - 1
    total, _ = chunked_loss(tiny.MODEL, {"params": tiny.params()}, packed, max_targets=few)
    assert np.isnan(total)


def test_whole_logits_never_exist(packed):
    batch = tiny.batch(0, rows=4)

    def run(p):
        return chunked_loss(tiny.MODEL, {"params": p}, batch, chunk=8)[0]

    text = str(jax.make_jaxpr(jax.grad(run))(tiny.params()))
    assert f"f32[4,2,{tiny.VOCABULARY}]" in text
    assert f"f32[4,{tiny.LENGTH},{tiny.VOCABULARY}]" not in text


def test_token_losses_are_per_position(packed):
    losses, weights = token_losses(tiny.MODEL, {"params": tiny.params()}, packed, chunk=4)
    assert losses.shape == weights.shape == packed["tokens"].shape
    assert float(jnp.sum(weights[:, -1])) == 0


def test_chunk_below_one():
    with pytest.raises(UserError, match="at least 1"):
        chunked_loss(tiny.MODEL, {"params": {}}, tiny.batch(0), chunk=0)
