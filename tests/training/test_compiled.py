"""What the compiler makes of a step: as little work as LoRA written by hand in plain JAX.

Shapes are small but the widths all differ, so that a product is known by its shape.
"""

import dataclasses
import functools
import importlib.util
import math
import pathlib
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import partition
from lora_jax.methods import METHODS, FullFineTuning, LoRA
from lora_jax.models.llama import Llama, LlamaConfig
from lora_jax.plan import count_flops
from lora_jax.training import (
    OptimizerConfig,
    chunked_loss,
    init_state,
    make_optimizer,
    make_step,
)

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
ROWS, LENGTH = 2, 12
CONFIG = LlamaConfig(
    vocab_size=3001,
    hidden_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=56,
    unroll=1,  # a loop, as in the step by hand and in models of more layers
)
METHOD = LoRA(rank=5, alpha=10.0)


def hand_written():
    """experiments/hand_written.py: the same model and update with no lora_jax in it."""
    spec = importlib.util.spec_from_file_location("hand", EXPERIMENTS / "hand_written.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def setup(config=CONFIG):
    model = Llama(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 3.0 * x if x.ndim > 1 else x, params)
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(0, config.vocab_size, (ROWS, LENGTH)), jnp.int32)
    return model, params, tokens


def ours(method=METHOD, config=CONFIG, clip=None, chunk=1024):
    """(compiled step, its arguments)"""
    model, params, tokens = setup(config)
    options = OptimizerConfig(learning_rate=1e-2, schedule="constant", clip_norm=clip)
    tx = make_optimizer(options, 10)
    step = make_step(functools.partial(chunked_loss, model, chunk=chunk), method, tx)
    batch = {"tokens": tokens, "loss_mask": jnp.ones((ROWS, LENGTH))}
    args = method.frozen(params), init_state(method, params, tx), batch
    return step.lower(*args).compile(), args


@functools.cache
def by_hand():
    _, params, tokens = setup()
    hand = hand_written()
    factors = hand.factors_of(CONFIG, METHOD.init(jax.random.key(0), params))
    tx = optax.adamw(1e-2, weight_decay=0.0)
    step = hand.make_step(CONFIG, 2.0, tx)
    args = params, (factors, tx.init(factors)), tokens
    return step.lower(*args).compile(), args


def dots(compiled):
    """Shapes (output, contracted size) of the matrix products in the optimized HLO, with counts."""
    text = compiled.as_text()
    shapes = {
        name: tuple(int(n) for n in sizes.split(",") if n)
        for name, sizes in re.findall(r"(%[\w.\-]+) = \w+\[([\d,]*)\]", text)
    }
    pattern = r"(%[\w.\-]+) = \S+ dot\((?:\S+ )?(%[\w.\-]+), .*lhs_contracting_dims=\{([\d,]*)\}"
    found = Counter()
    for name, first, axes in re.findall(pattern, text):
        contracted = math.prod(shapes[first][int(i)] for i in axes.split(","))
        found[(tuple(sorted(n for n in shapes[name] if n > 1)), contracted)] += 1
    assert found.total() == len(re.findall(r" dot\(", text)) > 10
    assert "custom-call" not in text or "matmul" not in text  # no product under another name
    return found


def flops(found):
    return sum(2 * math.prod(shape) * inner * n for (shape, inner), n in found.items())


def test_the_step_has_the_products_of_one_written_by_hand():
    (mine, (frozen, state, batch)), (hand, args) = ours(), by_hand()
    assert dots(mine) == dots(hand)
    assert flops(dots(mine)) == flops(dots(hand)) > 0
    work = [c.cost_analysis()["bytes accessed"] for c in (mine, hand)]
    assert work[0] <= 1.01 * work[1]
    # The same numbers, or the comparison would mean nothing.
    state, metrics = mine(frozen, jax.tree.map(jnp.copy, state), batch)
    _, loss = hand(args[0], jax.tree.map(jnp.copy, args[1]), args[2])
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def kernel_shapes(frozen):
    """Shapes of one layer's frozen matrices, as products would give them, in either order."""
    return {
        tuple(sorted(leaf.shape[1:] if partition.stack_of(path) else leaf.shape))
        for path, leaf in partition.flatten(frozen).items()
        if len(leaf.shape) - bool(partition.stack_of(path)) > 1
    }


def test_no_product_makes_the_gradient_of_a_frozen_kernel():
    _, params, _ = setup()
    wanted = kernel_shapes(params)
    assert len(wanted) >= 4

    def gradients(method):
        return {shape for shape, _ in dots(ours(method)[0])} & wanted

    assert gradients(METHOD) == set()
    assert gradients(FullFineTuning()) >= {(40, 56), (40, 3001)}  # so this test can fail
    assert gradients(FullFineTuning(train=(r"mlp/up",))) == {(40, 56)}


def test_frozen_leaves_have_no_state_and_do_not_count_in_the_clip_norm():
    model, params, _ = setup()
    compiled, (frozen, state, batch) = ours(clip=1e-3)
    trained = {"layers[0:3]/attention/query/kernel", "layers[0:3]/attention/value/kernel"}
    assert set(state.trainable) == trained
    sizes = [x.size for x in jax.tree.leaves(state.opt_state) if jnp.ndim(x)]
    assert sum(sizes) == 2 * sum(x.size for x in jax.tree.leaves(state.trainable))
    _, metrics = compiled(frozen, jax.tree.map(jnp.copy, state), batch)

    def dense_loss(merged):
        loss, weight = chunked_loss(model, {"params": merged}, batch)
        return loss / weight

    # By the chain rule from the gradient of the dense weights: B is zero, so A's gradient is too.
    full = partition.flatten(jax.grad(dense_loss)(METHOD.merge(params, state.trainable)))
    square = 0.0
    for path in trained:
        a = state.trainable[path]["a"]
        square += jnp.sum((2.0 * jnp.einsum("lir,lio->lro", a, full[path])) ** 2)
    np.testing.assert_allclose(metrics["grad_norm"], jnp.sqrt(square), rtol=1e-4)
    everything = jnp.sqrt(sum(jnp.sum(x**2) for x in full.values()))
    assert everything > 1.5 * metrics["grad_norm"]


WIDE = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    mlp_size=512,
    unroll=1,
)


def test_the_step_needs_less_memory_than_one_copy_of_the_base():
    base = sum(x.nbytes for x in jax.tree.leaves(setup(WIDE)[1]))
    used = ours(config=WIDE)[0].memory_analysis().temp_size_in_bytes
    assert used < base
    full = ours(FullFineTuning(), WIDE)[0].memory_analysis().temp_size_in_bytes
    assert full > base, "with a gradient of every weight it must be more"


def equations(jaxpr):
    """All of them, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_doras_step_costs_little_more_than_loras_and_makes_no_dense_copy():
    """FLOPs of 2 x 256 tokens, arrays as large as a stack of kernels, and temporaries."""
    config = dataclasses.replace(WIDE, unroll=1)
    model, params, _ = setup(config)
    lora, dora = (METHODS[n](rank=8, targets="all-linear") for n in ("lora", "dora"))
    kernels = [
        x for p, x in partition.flatten(params).items() if p.startswith("layers") and x.ndim == 3
    ]
    tx = make_optimizer(OptimizerConfig(), 10)
    batch = {
        name: jax.ShapeDtypeStruct((2, 256), dtype)
        for name, dtype in {"tokens": "int32", "loss_mask": "float32"}.items()
    }

    def traced(method):
        state = jax.eval_shape(lambda p: init_state(method, p, tx), params)
        step = make_step(functools.partial(chunked_loss, model), method, tx)
        return step.trace(params, state, batch).jaxpr

    one, other = traced(lora), traced(dora)
    assert 1.0 < count_flops(other).total / count_flops(one).total <= 1.15

    def stacks(closed):
        """Results with the shape of all layers' kernels of a target, in any order of axes."""
        shapes = {tuple(sorted(x.shape)) for x in kernels}
        made = [v.aval for eqn in equations(closed.jaxpr) for v in eqn.outvars]
        return [x for x in made if tuple(sorted(getattr(x, "shape", ()))) in shapes]

    assert len(list(equations(other.jaxpr))) > 200
    assert stacks(other) == stacks(one) == []
    used = [ours(m, config)[0].memory_analysis().temp_size_in_bytes for m in (lora, dora)]
    # What DoRA keeps for m's gradient is of the size of activations.
    assert used[1] - used[0] < 0.3 * sum(x.nbytes for x in kernels)


def test_chunks_of_the_loss_bound_its_memory():
    wide = LlamaConfig(
        vocab_size=50_000, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=8, mlp_size=8,
    )  # fmt: skip
    logits = ROWS * LENGTH * wide.vocab_size * 4
    used = [
        ours(config=wide, chunk=chunk)[0].memory_analysis().temp_size_in_bytes
        for chunk in (ROWS * LENGTH, ROWS)
    ]
    assert used[0] > logits > 3 * used[1]


@pytest.mark.parametrize("chunk", [4, 24])
def test_the_loss_is_the_same_in_any_chunks(chunk):
    compiled, (frozen, state, batch) = ours(chunk=chunk)
    whole, _ = ours()
    copies = [jax.tree.map(jnp.copy, state) for _ in range(2)]
    (one, first), (other, second) = (
        c(frozen, s, batch) for c, s in zip((compiled, whole), copies, strict=True)
    )
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one.trainable), jax.tree.leaves(other.trainable), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
