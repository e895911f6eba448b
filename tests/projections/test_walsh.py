"""The Walsh–Hadamard transform against the matrix, and against the time of `x + 1`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.errors import UserError
from lora_jax.projections.walsh import hadamard, walsh


def matrix(n: int) -> np.ndarray:
    """Entry (i, j) is -1 to the number of ones that the digits of i and j share."""
    i = np.arange(n)
    ones = np.bitwise_count(i[:, None] & i[None])
    return (-1.0) ** ones / np.sqrt(n)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5, 8, 9, 11])
def test_it_is_the_matrix(k: int) -> None:
    rng = np.random.default_rng(k)
    h = matrix(2**k)
    np.testing.assert_allclose(hadamard(k), h, atol=1e-14)
    with jax.enable_x64(True):
        x = rng.normal(size=(2, 3, 2**k))
        found = walsh(jnp.asarray(x))
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, x @ h, atol=1e-12)
    x = rng.normal(size=2**k).astype(np.float32)
    assert walsh(jnp.asarray(x)).dtype == np.float32
    np.testing.assert_allclose(walsh(jnp.asarray(x)), x @ h, atol=1e-5)


def test_long_rows_one_by_one_and_mapped() -> None:
    """Rows above the bound of the loop, against rows alone; also under two vmaps."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 2**15))
    alone = jnp.stack([jnp.stack([walsh(r) for r in rows]) for rows in x])
    np.testing.assert_allclose(walsh(x), alone, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(jax.vmap(walsh))(x), alone, atol=1e-5)
    last = jax.vmap(walsh, in_axes=1, out_axes=1)(x[0].T)
    np.testing.assert_allclose(last, alone[0].T, atol=1e-5)
    np.testing.assert_allclose(walsh(alone), x, atol=1e-5)  # its own inverse
    np.testing.assert_allclose(jnp.linalg.norm(alone, axis=-1), jnp.linalg.norm(x, axis=-1), 1e-5)


def test_derivatives_in_both_modes_and_mapped() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, y = jnp.asarray(rng.normal(size=(2, 3, 64)))
        np.testing.assert_allclose(jnp.vdot(walsh(x), y), jnp.vdot(x, walsh(y)), rtol=1e-12)
        np.testing.assert_allclose(jax.vjp(walsh, x)[1](y)[0], walsh(y), atol=1e-12)
        np.testing.assert_allclose(jax.jvp(walsh, (x,), (y,))[1], walsh(y), atol=1e-12)
        each = jax.vmap(jax.grad(lambda x, y: jnp.vdot(walsh(x) ** 2, y)))(x, y)
        np.testing.assert_allclose(each, walsh(2 * walsh(x) * y), atol=1e-12)


def test_only_powers_of_two() -> None:
    with pytest.raises(UserError, match="power of two, not 12"):
        walsh(jnp.zeros((2, 12)))


def fastest(f: Callable[[Any], jax.Array], x: jax.Array, times: int) -> float:
    f(x).block_until_ready()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        f(x).block_until_ready()
        found.append(time.perf_counter() - began)
    return min(found)


def test_at_most_forty_times_x_plus_one() -> None:
    """At 2^20 float32, both measured at their fastest, since other processes share the cores."""
    x = jax.random.normal(jax.random.key(0), (2**20,))
    transform, plus_one = jax.jit(walsh), jax.jit(lambda x: x + 1)
    ratios: list[float] = []
    while len(ratios) < 10 and (not ratios or min(ratios) > 40):
        ratios.append(fastest(transform, x, 10) / fastest(plus_one, x, 10))
    assert min(ratios) <= 40, ratios
