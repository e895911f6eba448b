"""Random projections: exact adjoints, unit and nearly orthogonal columns, isotropy, one P a key."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import projections
from lora_jax.errors import UserError
from lora_jax.projections.base import columns, random_signs
from lora_jax.projections.shuffle import places, rounds, shuffle

KINDS = ("dense", "sparse", "fastfood")
KEY = jax.random.key(3, impl="threefry2x32")


@functools.partial(jax.jit, static_argnames=("p", "d", "dtype"))
def _columns(p: projections.Projection, d: int, key: jax.Array, dtype: Any) -> jax.Array:
    numbers = p.numbers(key, d)
    return jax.vmap(lambda x: p.apply(key, numbers, x))(jnp.eye(d, dtype=dtype))


def matrix(
    p: projections.Projection, d: int, key: jax.Array = KEY, dtype: Any = np.float32
) -> np.ndarray:
    """P as a matrix [D, d], column by column."""
    return np.asarray(_columns(p, d, key, dtype)).T


# Optimised, as users' programs are: at level 0 (conftest.py) what is drawn forwards and again
# backwards differs in its last bit.
@functools.partial(
    jax.jit, static_argnames="p", compiler_options={"xla_backend_optimization_level": 2}
)
def all_ways(p: projections.Projection, numbers: Any, x: jax.Array, y: jax.Array) -> Any:
    """P·x, the tangent of P·x along 2x, the gradient of <P·x, y>, and P*·y."""

    def through(x: jax.Array) -> jax.Array:
        return p.apply(KEY, numbers, x)

    forward, tangent = jax.jvp(through, (x,), (2.0 * x,))
    gradient = jax.grad(lambda x: jnp.vdot(through(x), y))(x)
    (back,) = jax.linear_transpose(through, x)(y)
    return forward, tangent, gradient, back


def numbers_of(p: projections.Projection, d: int) -> Any:
    return jax.jit(p.numbers, static_argnums=1)(KEY, d)


# Also a tensor smaller than the subspace, one number, and one that is not taken in one piece.
@pytest.mark.parametrize(
    ("size", "d", "cached"),
    [(700, 30, True), (700, 30, False), (6, 20, False), (1, 1, True), (projections.LONG, 9, True)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_adjoint_is_exact(kind: str, size: int, d: int, cached: bool) -> None:
    """<P x, y> = <x, P* y> in float64, and both are what differentiation gives."""
    p = projections.make(kind, size, cached)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=d), rng.normal(size=size)
        forward, tangent, gradient, back = map(np.asarray, all_ways(p, numbers_of(p, d), x, y))
        assert forward.dtype == back.dtype == np.float64
        np.testing.assert_allclose(forward @ y, x @ back, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(gradient, back, atol=1e-13)
        np.testing.assert_allclose(tangent, 2.0 * forward, atol=1e-13)


# An adapter is a seed and coordinates: were P drawn otherwise, it would be another model. To be
# made anew (by printing `sums`) only together with a new name for the kind.
PINNED = {
    "dense": (-1.692636, 0.611287, 0.463112),
    "sparse": (-1.621896, 2.934192, -1.523864),
    "fastfood": (0.745417, -1.353508, 1.419606),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_p_a_key_for_ever(kind: str) -> None:
    """Held or drawn, in both precisions, and in later versions."""
    held = matrix(projections.make(kind, 700, True), 3)
    np.testing.assert_allclose(held, matrix(projections.make(kind, 700, False), 3), atol=1e-6)
    with jax.enable_x64(True):
        wide = matrix(projections.make(kind, 700, True), 3, dtype=np.float64)
    np.testing.assert_allclose(held, wide, atol=1e-6)
    other = matrix(projections.make(kind, 700, True), 3, jax.random.key(4, impl="threefry2x32"))
    assert np.abs(held - other).max() > 0.05
    sums = np.linspace(1.0, 3.0, 700) @ held
    np.testing.assert_allclose(sums, PINNED[kind], atol=1e-3)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_coordinates_are_the_smaller_subspace(kind: str, cached: bool) -> None:
    """Also where a pack has padded the numbers and the vector of a smaller member."""
    p = projections.make(kind, 100, cached)
    small, large = numbers_of(p, 5), numbers_of(p, 12)
    padded = {
        n: np.pad(x, [(0, b - a) for a, b in zip(x.shape, large[n].shape, strict=True)])
        for n, x in small.items()
    }
    x, y = np.arange(1.0, 13.0, dtype=np.float32), np.linspace(-1.0, 1.0, 100, dtype=np.float32)
    alone = all_ways(p, small, x[:5], y)
    packed = all_ways(p, padded, x, y)
    zeros = all_ways(p, large, np.where(np.arange(12) < 5, x, 0.0).astype(np.float32), y)
    np.testing.assert_allclose(packed[0], alone[0], atol=1e-5)
    np.testing.assert_allclose(zeros[0], alone[0], atol=1e-5)
    np.testing.assert_array_equal(packed[3][5:], 0.0)
    np.testing.assert_allclose(packed[3][:5], alone[3], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_have_unit_norm_and_are_nearly_orthogonal(kind: str) -> None:
    size, d = 3000, 60
    gram = matrix(projections.make(kind, size), d)
    gram = gram.T @ gram
    norms, between = np.sqrt(np.diag(gram)), gram[~np.eye(d, dtype=bool)]
    if kind == "fastfood":
        length = 4096
        spread = math.sqrt((length - size) / (2 * length * size))
        assert abs(norms.mean() - 1) < 4 * spread / math.sqrt(d)
        assert 0.5 * spread < norms.std() < 2 * spread
    else:
        np.testing.assert_allclose(norms, 1.0, rtol=1e-6)
    assert abs(between.mean()) < 0.1 / math.sqrt(size)
    # Two independent directions: 1/sqrt(D). Rows of H share G, whose squares vary: sqrt(2/L), and
    # what of it the missing rows add.
    assert 0.8 / math.sqrt(size) < between.std() < 1.6 / math.sqrt(size)


def test_fastfood_is_the_published_product() -> None:
    """H·G·Π·H·B with H of ±1, over sqrt(L·|G|²)·sqrt(D/L), by plain matrices."""
    size, d, length = 100, 7, 128
    p = projections.make("fastfood", size)
    gauss = np.asarray(numbers_of(p, d)["gauss"], np.float64)
    signs = np.asarray(jax.vmap(random_signs)(columns(jax.random.fold_in(KEY, 0), d)))
    order = np.asarray(places(numbers_of(p, d)["rounds"], length))
    i = np.arange(length)
    h = (-1.0) ** np.bitwise_count(i[:, None] & i[None])
    b = np.zeros((length, d))
    b[range(d), range(d)] = signs
    wanted = (h @ (gauss[:, None] * (h @ b)[order]))[:size]
    wanted /= np.sqrt(length * np.sum(gauss**2)) * np.sqrt(size / length)
    np.testing.assert_allclose(matrix(p, d), wanted, atol=2e-6)


def test_sparse_entries_are_independent_signs() -> None:
    size, d = 10_000, 400
    p = matrix(projections.make("sparse", size), d)
    hits = p != 0
    n, density = size * d, 0.01
    assert abs(hits.sum() - n * density) < 4 * math.sqrt(n * density)
    counts = hits.sum(0)
    np.testing.assert_allclose(np.abs(p).max(0), 1 / np.sqrt(counts), rtol=1e-6)
    assert abs((p > 0).sum() - (p < 0).sum()) < 4 * math.sqrt(n * density)
    # Binomial over columns, and over rows near both ends: no place is rarer than another.
    assert 0.8 < counts.var() / (size * density) < 1.25
    for rows in (hits[:1000], hits[-1000:]):
        assert abs(rows.sum() - n * density / 10) < 4 * math.sqrt(n * density / 10)
    # Independent: a nonzero follows another as often as not.
    follows = (hits[1:] & hits[:-1]).sum()
    assert abs(follows - n * density**2) < 4 * math.sqrt(n * density**2)


@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_isotropic(kind: str) -> None:
    """Over many keys, P·x has no preferred direction: E[(P x)(P x)^T] = |x|² I / D."""
    size, count = 6, 6000
    p = projections.make(kind, size, False)
    x = jnp.array([1.0, -2.0, 0.5])

    def one(key: jax.Array) -> jax.Array:
        return p.apply(key, p.numbers(key, 3), x)

    y = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), count)))
    found = y.T @ y / count * size / float(x @ x)
    # Of six rows, a column of the sparse kind may be empty.
    unit = 1 - (1 - 6**-0.5) ** 6 if kind == "sparse" else 1.0
    np.testing.assert_allclose(found, unit * np.eye(size), atol=0.12)
    np.testing.assert_allclose(y.mean(0), 0.0, atol=0.06)


@pytest.mark.parametrize("kind", ["dense", "fastfood"])
def test_what_is_not_held_is_never_whole_in_memory(kind: str) -> None:
    """Neither forwards nor backwards: the compiler's own figure, for D·d of 256 MiB."""
    size, d = 2**16, 1024
    p = projections.make(kind, size, False)
    numbers = jax.eval_shape(lambda: p.numbers(KEY, d))

    def loss(x: jax.Array, numbers: Any) -> jax.Array:
        return (p.apply(KEY, numbers, x) ** 2).sum()

    x = jax.ShapeDtypeStruct((d,), np.float32)
    memory = jax.jit(jax.grad(loss)).lower(x, numbers).compile().memory_analysis()
    assert memory.temp_size_in_bytes < size * d * 4 / 16


def test_the_permutation() -> None:
    drawn = rounds(KEY)
    for n in (1, 8):
        forth = np.asarray(places(drawn, n))
        back = np.asarray(places(drawn, n, inverse=True))
        np.testing.assert_array_equal(np.sort(forth), np.arange(n))
        np.testing.assert_array_equal(forth[back], np.arange(n))
    x = jnp.arange(8.0)
    np.testing.assert_array_equal(shuffle(drawn, x), np.asarray(places(drawn, 8)))
    back = jax.linear_transpose(lambda x: shuffle(drawn, x), x)(shuffle(drawn, x))[0]
    np.testing.assert_array_equal(back, x)


def test_the_permutation_looks_random() -> None:
    """Chi-square, 16 cells, over keys: where a place goes, and how far its neighbour."""
    n, count = 2**10, 4000
    keys = jax.random.split(jax.random.key(1), count)
    forth = np.asarray(jax.jit(jax.vmap(lambda k: places(rounds(k), n)))(keys)).astype(np.int64)
    for value in (forth[:, 0], forth[:, 777], (forth[:, 1] - forth[:, 0]) % n,
                  (forth[:, 512] - forth[:, 0]) % n, (forth[:, 301] ^ forth[:, 300])):  # fmt: skip
        cells = np.bincount(value // (n // 16), minlength=16)
        assert ((cells - count / 16) ** 2).sum() / (count / 16) < 45  # 15 degrees: p = 1e-4
        low = np.bincount(value % 16, minlength=16)
        assert ((low - count / 16) ** 2).sum() / (count / 16) < 60
    assert abs((forth == np.arange(n)).sum(1).mean() - 1) < 0.15  # fixed points


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match="did you mean sparse"):
        projections.make("sparce", 10)
