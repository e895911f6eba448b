"""Adapters chosen by row: each row, and each member's gradient, as of that adapter alone."""

from __future__ import annotations

import descendants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import site_models
from descendants import BOTH, KEY, V, moved, toy, toy_params

import lora_jax as lj
from lora_jax import methods, training
from lora_jax.sweeps.adapter_stack import stack_adapters

ROWS = np.array([2, 0, 1, 0, 2])
TOKENS = np.random.default_rng(3).integers(0, V, (5, 6)).astype(np.int32)


SITES = {
    **{name: {"size": 2} for name in ("adapter_h", "adapter_l", "adapter_p")},
    "adapter_d": {"size": 2, "drop": 1},
    "prefix_tuning": {"length": 2, "hidden": 2}, "p_tuning_v2": {"length": 2, "train": ()},
    "prompt_tuning": {"length": 2},
    **{name: {"prefix": 1, "infix": 1} for name in ("prefix_embedding", "prefix_layer",
                                                    "lora_prefix_embedding", "lora_prefix_layer")},
}  # fmt: skip
"""Methods that act on activations, small."""

WHOLE = {
    "full": {"train": ("query/",)}, "bitfit": {}, "head_only": {}, "ft_top": {"layers": 3},
    "subspace": {"dimension": 30},
}  # fmt: skip


def of(name, **options):
    """Three of a method, with other numbers where it takes them."""
    cls = methods.METHODS[name]
    if name in WHOLE:
        return [cls(**WHOLE[name])] * 3
    if name == "lora":
        return [
            cls(rank=2, alpha=3.0, targets=(BOTH,), **options),
            cls(rank=((r"layers/1/", 3), (".*", 1)), alpha=5.0, targets=(r"query$", "embed"),
                **options),
            cls(rank=1, alpha=2.0, targets=(r"mlp/",), scaling="rslora", **options),
        ]  # fmt: skip
    return [descendants.prepared(name)] * 3


def adapters(name, params, **options):
    return [(m, moved(m.init(KEY, params), seed=i)) for i, m in enumerate(of(name, **options))]


def apply(variables, tokens):
    return lj.adapt(toy)(variables, tokens)


run = jax.jit(apply)


def served(stack, params, tokens=TOKENS, **options):
    """Logits of the rows ROWS, in one program."""

    def call(trainable, rows):
        return apply(stack.combine(params, rows, trainable=trainable, **options), tokens)

    return jax.jit(call)


def check_rows(params, some):
    stack = stack_adapters(params, some)
    together = served(stack, params)(stack.trainable, ROWS)
    for member in range(3):
        method, trainable = stack.take(member)
        alone = run({"params": method.merge(params, trainable)}, TOKENS[member == ROWS])
        np.testing.assert_allclose(together[member == ROWS], alone, atol=2e-3, rtol=1e-3)
        jax.tree.map(np.testing.assert_array_equal, trainable, some[member][1])
    return together


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - set(SITES)))
def test_every_row_is_that_of_its_adapter_alone(name):
    """Of every method there is but those that the next test names."""
    params = toy_params()
    together = check_rows(params, adapters(name, params))
    base = run({"params": params}, TOKENS)
    assert all(np.abs(together - base).max(axis=(1, 2)) > 1e-2)


@pytest.mark.parametrize("name", SITES)
def test_what_acts_on_activations_is_refused(name):
    method = methods.METHODS[name](**SITES[name])
    params = method.arrange(site_models.params_of("gpt2"))
    stack = stack_adapters(params, [(method, method.init(KEY, params))] * 2)
    with pytest.raises(lj.UserError, match=f"{name}' acts on activations.* on their own"):
        stack.combine(params, np.array([0, 1]))


def test_leaves_trained_whole_and_quantised_bases():
    """A head of each adapter's own (kernel and bias), over an NF4 base."""
    params = lj.quantize(toy_params())
    check_rows(params, adapters("lora", params, train=("^head/", "embed/")))


def test_gradients_are_those_of_each_adapter_on_its_rows():
    params = toy_params()
    some = adapters("lora", params, train=("^head/bias$",))
    stack = stack_adapters(params, some)

    serve = served(stack, params).__wrapped__

    @jax.jit
    def gradient(trainable, rows):
        return jax.grad(lambda t: jnp.sum(jnp.sin(serve(t, rows))))(trainable)

    grads = gradient(stack.trainable, ROWS)
    for member, (method, trainable) in enumerate(some):

        def alone(t, method=method, member=member):
            logits = apply(method.combine(params, t), TOKENS[member == ROWS])
            return jnp.sum(jnp.sin(logits))

        wanted = jax.jit(jax.grad(alone))(trainable)
        got = stack.take(member, grads)[1]
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, atol=3e-4 * np.abs(y).max(), rtol=1e-3)
    # Padding has no gradient, so that training keeps it zero: one for each array.
    again = stack_adapters(params, [stack.take(i, grads) for i in range(3)])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), again.trainable, grads)
    # Another mixture is the same program; rows no one chose give no gradient.
    zero = gradient(stack.trainable, np.zeros_like(ROWS))
    assert all(not np.any(x[1:]) for x in jax.tree.leaves(zero))
    assert gradient._cache_size() == 1


def test_dropout_is_of_each_row():
    params = toy_params()
    method = lj.LoRA(rank=2, alpha=3.0, targets=(BOTH,), dropout=0.5)
    one = (method, moved(method.init(KEY, params)))
    stack = stack_adapters(params, [one, one])
    tokens, pairs = np.repeat(TOKENS[:1], 4, axis=0), np.array([0, 0, 1, 1])
    rows = served(stack, params, tokens, key=jax.random.key(5))(stack.trainable, pairs)
    assert all(np.abs(rows[i] - rows[j]).max() > 1e-3 for i in range(4) for j in range(i))
    still = served(stack, params, tokens)(stack.trainable, pairs)
    np.testing.assert_allclose(still[0], still[3], atol=1e-5)


def test_a_real_model(tiny_base):
    """A Llama with scanned layers, tied head, norms trained whole."""
    model, params = lj.load_pretrained(tiny_base / "base")
    every = [
        lj.LoRA(rank=r, alpha=4.0, targets=t, train=(r"layers/.*_norm/scale$", "^final_norm/"))
        for r, t in ((1, r"(query|down)$"), (3, r"attention/query$"), (2, r"mlp/down$"))
    ]
    some = [(m, moved(m.init(KEY, params), seed=i, size=0.1)) for i, m in enumerate(every)]
    stack = stack_adapters(params, some)
    tokens = np.random.default_rng(0).integers(0, 250, (5, 7)).astype(np.int32)
    call = jax.jit(lj.adapt(model.apply))
    together = call(stack.combine(params, ROWS), tokens)
    for member, (method, trainable) in enumerate(some):
        merged = {"params": method.merge(params, trainable)}
        alone = call(merged, tokens)
        np.testing.assert_allclose(together[member == ROWS], alone[member == ROWS], atol=2e-3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "batch_size": 2, "prefix": [9]}])
def test_each_prompt_is_continued_by_its_own_adapter(options):
    """Also where prompts of similar length go together, and each row becomes several beams."""
    model, params = site_models.MODELS["llama"], site_models.params_of("llama")
    every = [lj.LoRA(rank=r, alpha=8.0, targets="all-linear") for r in (1, 2)]
    some = [(m, moved(m.init(KEY, params), seed=i)) for i, m in enumerate(every)]
    prompts, rows = [[5, 6, 7, 8], [5], [9, 4, 6], [5, 6, 7, 8]], np.array([0, 1, 0, 1])

    def continued(variables):
        return training.generate(
            model, variables, prompts, max_new_tokens=4, eos_id=None, pad_id=0, **options
        )

    stack = stack_adapters(params, some)
    together = continued(stack.combine(params, rows))
    alone = [continued({"params": m.merge(params, t)}) for m, t in some]
    assert together == [alone[row][i] for i, row in enumerate(rows)]
    assert all(one != other for one, other in zip(*alone, strict=True))
    with pytest.raises(lj.UserError, match="for 3 rows, but 4 prompts given"):
        continued(stack.combine(params, rows[:3]))


def test_what_cannot_share_a_program_is_refused():
    params = toy_params()
    lora, dora = adapters("lora", params)[0], adapters("dora", params)[0]
    with pytest.raises(lj.UserError, match="differ in kind"):
        stack_adapters(params, [lora, dora])
    with pytest.raises(lj.UserError, match="differ in train"):
        stack_adapters(params, [lora, adapters("lora", params, train=("^head/",))[0]])
    stack = stack_adapters(params, [lora, lora])
    with pytest.raises(lj.UserError, match="the 3 rows that choose among 2 members"):
        apply(stack.combine(params, np.zeros(3, int)), TOKENS)
    with pytest.raises(lj.UserError, match="another weight in each row"):
        lj.densify(stack.combine(params, np.zeros(3, int)))
