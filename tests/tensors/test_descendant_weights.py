"""Weight types of LoRA's descendants: each use against the same use of the dense weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.tensors.dora import column_norms, column_squares, dora
from lora_jax.tensors.hadamard import Hadamard
from lora_jax.tensors.kronecker import Kronecker
from lora_jax.tensors.probe import Probe
from lora_jax.tensors.rescaled import Rescaled
from lora_jax.tensors.summed import Summed
from lora_jax.tensors.vera import VeraWeight


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + 17 * len(shape) + sum(shape)), shape)


def low_rank(*shape, batch=0):
    front = shape[:batch]
    a, b = random(*front, shape[-2], 2, seed=2), random(*front, 2, shape[-1], seed=3)
    return lj.LowRank(random(*shape, seed=1), a, b, jnp.asarray(0.7), path="w")


def weights(shape=(4, 6)):
    """One of each type, of [4, 6] or of a stack [3, 4, 6]."""
    front, n = shape[:-2], len(shape) - 2
    w, scale = random(*shape, seed=1), jnp.arange(1.0, 4.0) if n else jnp.asarray(0.7)
    v = low_rank(*shape, batch=n)
    vera = {"a": random(5, 3), "b": random(3, 7), "d": random(*front, 3), "g": random(*front, 6)}
    hada = {
        **{k: random(*front, 4, 2, seed=i) for i, k in enumerate(("a1", "a2"))},
        **{k: random(*front, 2, 6, seed=i) for i, k in enumerate(("b1", "b2"))},
    }
    magnitude = random(*front, 6) ** 2 + 0.5
    return {
        "gain out": Rescaled(w, random(*front, 1, 6), "w"),
        "gain in": Rescaled(w, random(*front, 4, 1), "w"),
        "gain shared": Rescaled(v, random(1, 6), "w"),
        "gain of a layer": Rescaled(w, random(*front, 1, 1), "w"),
        "dora": dora(v, magnitude, column_squares(w, (-2,))),
        "vera": VeraWeight(w, vera, scale, path="w"),
        "hadamard": Hadamard(v, hada, scale, path="w"),
        "kronecker": Kronecker(w, random(*front, 2, 3), random(*front, 2, 2), scale, path="w"),
        "summed": Summed(w, random(*shape), "w"),
        "summed, low rank": Summed(v, random(*shape), "w"),
    }


NAMES = list(weights())


def same(f, weight, *args):
    ours, dense = lj.densify(lj.adapt(f)(weight, *args)), f(weight.dense(), *args)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-5, rtol=5e-5)


MATRIX = {
    "product": lambda w, x: x @ w,
    "left": lambda w, x: w.T @ x[0].T,
    "transposed": lambda w, x: (x @ w) @ w.T,
    "dense layer": lambda w, x: jnp.einsum("io,bti->tbo", w, x),
    "cast": lambda w, x: x @ w.astype(jnp.float32),
}
VIEWS = {
    "rows": lambda w, x: x[..., 1:3] @ w[1:3],
    "columns": lambda w, x: x @ w[:, 1:5:2],
    "split": lambda w, x: [x @ part for part in jnp.split(w, 2, axis=1)],
    "dynamic": lambda w, x: x @ jax.lax.dynamic_slice(w, (0, x.size // 30), (4, 2)),
    "heads": lambda w, x: jnp.einsum("bti,inh->btnh", x, w.reshape(4, 2, 3)),
    "unit": lambda w, x: x @ jnp.squeeze(w[None], 0),
    "negative": lambda w, x: x @ -w,
    "stopped": lambda w, x: x @ jax.lax.stop_gradient(w),
    "embedding": lambda w, x: jnp.take(w, jnp.array([[0, 3]]), axis=0),
}
STACK = {
    "scanned": lambda w, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w @ w.T), c @ w), x, w),
    "one": lambda w, x: x @ w[1],
    "traced": lambda w, x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i] @ w[i].T), x),
    "some": lambda w, x: jax.lax.scan(lambda c, w: (c, c @ w), x, w[1:])[1],
}


@pytest.mark.parametrize("name", NAMES)
def test_uses_of_a_matrix(name):
    weight, x = weights()[name], random(2, 5, 4)
    for f in MATRIX.values():
        same(f, weight, x)
    for use, f in VIEWS.items():
        if name == "kronecker" or (use == "embedding" and name == "gain in"):
            continue  # a product of tables has no rows of its own: an error says so
        same(f, weight, x)


@pytest.mark.parametrize("name", NAMES)
def test_uses_of_a_stack(name):
    weight, x = weights((3, 4, 6))[name], random(2, 5, 4)
    for f in STACK.values():
        same(f, weight, x)


def test_what_cannot_be_done_says_so():
    with pytest.raises(lj.UserError, match="a way the Kronecker rule cannot do"):
        lj.adapt(lambda w: w[1:3])(weights()["kronecker"])
    with pytest.raises(lj.UserError, match="a way the Rescaled rule cannot do"):
        lj.adapt(lambda w: w.reshape(3, 8))(weights()["gain out"])
    both = Rescaled(random(4, 6), random(4, 6), "w")
    with pytest.raises(lj.UserError, match="a way the Rescaled rule cannot do"):
        lj.adapt(lambda w, x: x @ w)(both, random(5, 4))


def test_a_convolution_rescaled():
    w, x = random(3, 3, 2, 4), random(1, 6, 6, 2)
    f = lambda w, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    same(f, Rescaled(w, random(1, 1, 1, 4), "w"), x)
    same(f, Rescaled(w, random(1, 1, 2, 1), "w"), x)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])
def test_column_norms_are_those_of_the_dense_sum(shape):
    v = low_rank(*shape, batch=len(shape) - 2)
    got = column_norms(v, column_squares(v.w, (-2,)))
    np.testing.assert_allclose(got, jnp.linalg.norm(v.dense(), axis=-2), rtol=1e-5)
    shared = lj.LowRank(v.w, random(4, 2), random(2, 6), jnp.asarray(0.3), path="w")
    got = column_norms(shared, column_squares(shared.w, (-2,)))
    np.testing.assert_allclose(got, jnp.linalg.norm(shared.dense(), axis=-2), rtol=1e-5)


def test_doras_norm_takes_no_gradient():
    """d/dB of g ∘ (x·V) with g constant (section 4.3 of the paper)."""
    v, x = low_rank(4, 6), random(5, 4)
    squares, m = column_squares(v.w, (-2,)), random(6) ** 2
    norms = jnp.linalg.norm(v.dense(), axis=0)

    def ours(b):
        leaf = lj.LowRank(v.w, v.a, b, v.scale, path="w")
        return jnp.sum(jnp.sin(lj.adapt(lambda w: x @ w)(dora(leaf, m, squares))))

    def theirs(b):
        return jnp.sum(jnp.sin((x @ (v.w + 0.7 * v.a @ b)) * (m / norms)[None]))

    np.testing.assert_allclose(jax.grad(ours)(v.b), jax.grad(theirs)(v.b), rtol=1e-4, atol=1e-4)


def test_doras_dropout_is_on_all_that_it_adds():
    key, x = jax.random.key(3), random(5, 4)
    plain = low_rank(4, 6)
    v = lj.LowRank(plain.w, plain.a, plain.b, plain.scale, key, jnp.float32(0.5), path="w")
    weight = dora(v, random(6) ** 2, column_squares(v.w, (-2,)))
    d = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x / 0.5, 0.0)
    gain = weight.gain
    want = x @ v.w + (gain - 1) * (d @ v.w) + gain * 0.7 * (d @ v.a @ v.b)
    np.testing.assert_allclose(lj.adapt(lambda w: x @ w)(weight), want, atol=1e-5)


def test_a_padded_column_is_left_alone():
    v = low_rank(4, 6)
    leaf = lj.LowRank(v.w, v.a * 0, v.b * 0, v.scale, path="w")
    weight = dora(leaf, jnp.zeros(6), jnp.zeros(6))
    np.testing.assert_array_equal(weight.dense(), v.w)


def test_a_probe_tells_the_moments_of_its_inputs():
    w, x = random(3, 4, 4), random(2, 5, 4)
    seen = jnp.ones((2, 5)).at[1, 3:].set(0)

    def f(moments):
        weight = Probe(w, moments, seen, "w")
        scan = lambda w: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), c), x, w)  # noqa: E731
        y, inputs = lj.adapt(scan)(weight)
        return jnp.sum(y), inputs

    got, inputs = jax.grad(f, has_aux=True)(jnp.zeros((3, 5, 5)))
    rows = jnp.concatenate([inputs, jnp.ones((3, 2, 5, 1))], -1) * seen[None, ..., None]
    np.testing.assert_allclose(got, jnp.einsum("lbti,lbtj->lij", rows, rows), rtol=1e-4, atol=1e-5)
