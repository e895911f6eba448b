"""The chunked loss against the plain one, and what counts as a target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lora_jax.errors import UserError
from lora_jax.methods import LoRA
from lora_jax.tensors import adapt
from lora_jax.training import chunked_loss, classification_loss, regression_loss


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


@pytest.mark.parametrize("options", [{"chunk": 7}, {"chunk": 1}, {"chunk": 1024}])
def test_chunked_equals_plain(packed, options):
    variables = {"params": tiny.params()}
    expected, weight = plain(variables, packed)
    total, count = chunked_loss(tiny.MODEL, variables, packed, **options)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert float(count) == weight


@pytest.mark.parametrize("chunk", [6, 1024])
def test_gradient_through_low_rank_leaves_equals_plain(packed, chunk):
    """The head itself is adapted (tied: gathered and transposed), and a norm trains whole."""
    params = tiny.params()
    method = LoRA(rank=2, alpha=4, targets=("query", "^embed"), train=("final_norm",))
    trainable = jax.tree.map(lambda x: x + 0.1, method.init(jax.random.key(0), params))

    def gradient(loss):
        # The batch is closed over: the plain loss branches on its values.
        return jax.grad(lambda t: loss(method.combine(params, t))[0])(trainable)

    expected = gradient(adapt(lambda v: plain(v, packed)))
    found = gradient(lambda v: chunked_loss(tiny.MODEL, v, packed, chunk=chunk))
    tiny.close(found, expected)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(found))


def test_a_frozen_head_has_no_gradient_and_is_multiplied_twice(packed):
    """Once forwards, once backwards by the hidden states: two products with the vocabulary."""
    params = tiny.params()
    trainable = tiny.METHOD.init(jax.random.key(0), params)

    def loss(t, p):
        return chunked_loss(tiny.MODEL, tiny.METHOD.combine(p, t), packed, chunk=6)[0]

    def products(argument):
        return vocabulary_products(jax.make_jaxpr(jax.grad(loss, argument))(trainable, params))

    assert products(0) == 2
    assert products(1) == 3  # trained: the head's own gradient is the third


def vocabulary_products(jaxpr):
    """How many dots of a jaxpr, and of those inside it, have an axis as long as the vocabulary."""
    found = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
        found += eqn.primitive.name == "dot_general" and tiny.VOCABULARY in sum(shapes, ())
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                found += vocabulary_products(inner) if hasattr(inner, "jaxpr") else 0
    return found


def test_chunks_without_loss_are_skipped_also_under_vmap(packed):
    """The branch stays a branch: under a batched predicate JAX would compute both."""
    batch = {**packed, "loss_mask": np.zeros_like(packed["loss_mask"])}
    batch["loss_mask"][:, 3] = 1.0
    params = tiny.params()
    expected, _ = plain({"params": params}, batch)
    text = str(
        jax.make_jaxpr(lambda p: chunked_loss(tiny.MODEL, {"params": p}, batch, chunk=2))(params)
    )
    assert "cond" in text

    def member(scale):
        variables = {"params": jax.tree.map(lambda x: x * scale, params)}
        return chunked_loss(tiny.MODEL, variables, batch, chunk=2, axis_name="members")[0]

    mapped = jax.vmap(member, axis_name="members")
    np.testing.assert_allclose(mapped(jnp.ones(2)), [expected, expected], rtol=1e-5)
    assert "cond" in str(jax.make_jaxpr(mapped)(jnp.ones(2)))


def test_whole_logits_never_exist(packed):
    batch = tiny.batch(0, rows=4)

    def run(p):
        return chunked_loss(tiny.MODEL, {"params": p}, batch, chunk=8)[0]

    text = str(jax.make_jaxpr(jax.grad(run))(tiny.params()))
    assert f"f32[4,2,{tiny.VOCABULARY}]" in text
    assert f"f32[4,{tiny.LENGTH},{tiny.VOCABULARY}]" not in text


def test_chunk_below_one():
    with pytest.raises(UserError, match="at least 1"):
        chunked_loss(tiny.MODEL, {"params": {}}, tiny.batch(0), chunk=0)


@pytest.mark.parametrize("options", [{"chunk": 7}, {"chunk": 1024}])
def test_label_smoothing_is_the_mean_over_the_vocabulary(packed, options):
    """(1 - e) * nll + e * mean(-log p), summed by a loop over positions."""
    variables, e = {"params": tiny.params()}, 0.1
    logits = tiny.MODEL.apply(
        variables, packed["tokens"], positions=packed["positions"],
        segment_ids=packed["segment_ids"],
    )  # fmt: skip
    logs = np.asarray(jax.nn.log_softmax(logits))
    segments, expected = packed["segment_ids"], 0.0
    for b, t in np.ndindex(logs.shape[0], logs.shape[1] - 1):
        if segments[b, t] == segments[b, t + 1] != 0:
            smooth = -(1 - e) * logs[b, t, packed["tokens"][b, t + 1]] - e * logs[b, t].mean()
            expected += packed["loss_mask"][b, t + 1] * smooth
    total, _ = chunked_loss(tiny.MODEL, variables, packed, label_smoothing=e, **options)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    with pytest.raises(UserError, match="label_smoothing=1"):
        chunked_loss(tiny.MODEL, variables, packed, label_smoothing=1)


def encoder_batch(labels):
    return {
        "tokens": np.arange(12).reshape(4, 3), "attention_mask": np.ones((4, 3), np.int32),
        "token_type_ids": np.zeros((4, 3), np.int32), "labels": np.array(labels),
        "weights": np.array([1, 1, 1, 0], np.float32),
    }  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classification_loss_equals_torch(smoothing):
    torch = pytest.importorskip("torch")
    batch = encoder_batch([0, 2, 1, 1])
    variables = {"table": jax.random.normal(jax.random.key(0), (12, 5))}
    total, weight = classification_loss(tiny.Head, variables, batch, label_smoothing=smoothing)
    logits = tiny.Head.apply(variables, batch["tokens"], batch["attention_mask"])
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(np.asarray(logits))[:3], torch.tensor(batch["labels"][:3]),
        label_smoothing=smoothing, reduction="sum",
    )  # fmt: skip
    np.testing.assert_allclose(total, float(expected), rtol=1e-5)
    assert float(weight) == 3


def test_regression_loss():
    batch = encoder_batch([0.5, 1.5, -2.0, 100.0])
    variables = {"table": jax.random.normal(jax.random.key(0), (12, 1))}
    total, weight = regression_loss(tiny.Head, variables, batch)
    values = np.asarray(tiny.Head.apply(variables, batch["tokens"], batch["attention_mask"]))
    np.testing.assert_allclose(
        total, sum((values[i, 0] - batch["labels"][i]) ** 2 for i in range(3)), rtol=1e-5
    )
    assert float(weight) == 3
    with pytest.raises(UserError, match="1 output, not 5"):
        regression_loss(tiny.Head, {"table": jnp.zeros((12, 5))}, batch)
