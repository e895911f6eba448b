"""Lanczos on Hessian products: against dense Hessians and known spectra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import lora_jax as lj
from lora_jax import analysis
from lora_jax.errors import UserError
from lora_jax.sweeps import report
from lora_jax.tables import render

Product = Callable[[jax.Array], jax.Array]


def diagonal(eigenvalues: Any) -> Product:
    values = jnp.asarray(eigenvalues)
    return lambda v: values * v


def start(n: int, seed: int = 0) -> jax.Array:
    return analysis.random_direction(jax.random.key(seed), jnp.zeros(n))


@pytest.fixture
def tiny() -> Any:
    """(loss, LoRA's start, G by target) of two layers, float64: a nearly linear loss far from its
    minimum, so that no block is small by chance."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 6)
        x, y = jax.random.normal(keys[0], (12, 5)), jax.random.normal(keys[1], (12, 3))
        params = {"one": {"kernel": jax.random.normal(keys[2], (5, 4))},
                  "two": {"kernel": jax.random.normal(keys[3], (4, 3))}}  # fmt: skip
        method = lj.LoRA(rank=2, alpha=6.0, targets=r"(one|two)$")

        def apply(variables: Any, x: jax.Array) -> jax.Array:
            p = variables["params"]
            return jnp.tanh(x @ p["one"]["kernel"]) @ p["two"]["kernel"]

        adapted = lj.adapt(apply)

        def loss(trainable: Any, *_: Any) -> jax.Array:
            return jnp.mean((adapted(method.combine(params, trainable), x) - y) ** 2)

        trainable = jax.tree.map(
            lambda a: a.astype(jnp.float64), method.init(jax.random.key(1), params)
        )
        g = jax.grad(lambda p: jnp.mean((apply({"params": p}, x) - y) ** 2))(params)
        yield loss, trainable, {"one": g["one"]["kernel"], "two": g["two"]["kernel"]}


def dense(loss: Any, at: Any) -> np.ndarray:
    flat, unravel = ravel_pytree(at)
    return np.asarray(jax.jit(jax.hessian(lambda v: loss(unravel(v))))(flat))


def test_the_hessian_of_adapters_at_the_start_and_later(tiny: Any) -> None:
    loss, at, _ = tiny
    gradient = jax.jit(jax.grad(loss))
    for _ in range(2):
        eigenvalues = np.linalg.eigvalsh(dense(loss, at))
        product = jax.jit(analysis.hessian_product(loss))
        direction = analysis.random_direction(jax.random.key(2), at)
        found = analysis.top_eigenvalue(
            lambda v, at=at, f=product: f(at, v), direction, tolerance=1e-9
        )
        assert found.converged and found.value == pytest.approx(eigenvalues[-1], rel=1e-10)
        assert found.residual < 1e-7 and found.least >= eigenvalues[0] * (1 + 1e-9)
        turned = product(at, found.vector)
        for name, leaf in ravel(found.vector).items():
            np.testing.assert_allclose(ravel(turned)[name], found.value * leaf, atol=1e-7)
        # Away from B = 0: by steps of gradient descent, which is stable at this rate.
        for _ in range(20):
            slope = gradient(at)
            at = jax.tree.map(lambda x, d, s=found.value: x - d / s, at, slope)


def ravel(tree: Any) -> dict[str, jax.Array]:
    return lj.partition.flatten(tree)


def test_blocks_where_b_is_zero(tiny: Any) -> None:
    """None along A, s times the first gradient between A and B, and something along B."""
    loss, at, gradients = tiny
    flat = ravel(at)
    sizes = np.cumsum([0, *(x.size for x in flat.values())])
    place = {name: slice(*sizes[i : i + 2]) for i, name in enumerate(flat)}
    h = dense(loss, at)
    scale = 6.0 / 2
    for target, g in gradients.items():
        a, b = (place[f"{target}/kernel/{side}"] for side in "ab")
        np.testing.assert_allclose(h[a, a], 0.0, atol=1e-14)
        assert np.abs(h[b, b]).max() > 0.1
        s = np.linalg.svd(h[a, b], compute_uv=False)
        expected = scale * np.repeat(np.linalg.svd(g, compute_uv=False), 2)
        np.testing.assert_allclose(s[: len(expected)], expected, rtol=1e-9, atol=1e-12)
        assert np.linalg.eigvalsh(h)[-1] >= expected[0]
    one, two = place["one/kernel/a"], place["two/kernel/b"]
    np.testing.assert_allclose(h[one, two], 0.0, atol=1e-14)
    assert np.linalg.eigvalsh(h)[0] < 0


def test_a_known_quadratic_in_float32() -> None:
    spectrum = np.concatenate([np.linspace(0.0, 1.0, 498), [50.0, 100.0]]).astype(np.float32)
    found = analysis.top_eigenvalue(diagonal(spectrum), start(500), tolerance=1e-6)
    assert found.value == pytest.approx(100.0, rel=1e-6) and found.converged and found.steps < 20
    assert abs(float(found.vector[-1])) == pytest.approx(1.0, abs=1e-5)


def test_what_has_converged_does_not_come_back() -> None:
    """Far below, eigenvalues that converge at once; their copies would take the steps that the
    greatest of many close ones needs: there are no more steps than dimensions."""
    with jax.enable_x64(True):
        spectrum = np.concatenate([np.linspace(0.0, 1.0, 40), -np.geomspace(10.0, 1e6, 20)])
        found = analysis.top_eigenvalue(diagonal(spectrum), start(60), steps=200, tolerance=1e-6)
    assert found.converged and found.value == pytest.approx(1.0, abs=1e-9)
    assert found.least == pytest.approx(-1e6) and found.steps <= 60


def test_residual_and_bound_hold() -> None:
    """After few steps on a spectrum without a gap: not converged, and both bounds are right."""
    with jax.enable_x64(True):
        spectrum = np.linspace(-1.0, 1.0, 1000)
        for seed in range(5):
            found = analysis.top_eigenvalue(
                diagonal(spectrum), start(1000, seed), steps=25, tolerance=1e-12
            )
            assert not found.converged and found.steps == 25
            assert np.abs(spectrum - found.value).min() <= found.residual
            assert found.value < 1.0 - 1e-6
            assert 1.0 <= found.upper < 2.0
            # The theorem's ε of a spread that is wider by as much at either end; the doubt is
            # shared by the ends and the steps.
            epsilon = (np.log(1.648 * np.sqrt(1000) / (0.01 / 2 / 25)) / 49) ** 2
            error = found.upper - found.value
            assert error == pytest.approx(epsilon * (found.value - found.least + 2 * error))
        # Too few to say anything.
        assert analysis.top_eigenvalue(diagonal(spectrum), start(1000), steps=3).upper == np.inf


def test_ends_early_where_there_is_nothing_more() -> None:
    """Two eigenvalues take two products; a loss without curvature takes one."""
    with jax.enable_x64(True):
        two = analysis.top_eigenvalue(diagonal([1.0, 3.0, 3.0, 1.0]), start(4), tolerance=0.0)
        assert two.steps == 2 and two.value == pytest.approx(3.0) == pytest.approx(two.upper)
        flat = analysis.top_eigenvalue(diagonal(np.zeros(4)), start(4))
    assert (flat.value, flat.residual, flat.upper, flat.steps) == (0.0, 0.0, 0.0, 1)
    assert flat.converged


def test_refusals() -> None:
    with pytest.raises(UserError, match="not zero"):
        analysis.top_eigenvalue(diagonal([1.0, 2.0]), jnp.zeros(2))
    with pytest.raises(UserError, match="not finite"):
        analysis.top_eigenvalue(diagonal([1.0, np.nan]), start(2))


# The experiment.


def test_the_experiment_at_smoke_scale(
    smoke_on_mnist: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each arm has both curvatures, with their errors, and a rate of the grid's range."""
    monkeypatch.setattr(report, "write", lambda *_: None)  # pages have tests of their own
    filled = smoke_on_mnist("beyond_curvature")
    found = filled.frame().set_index(["row", "metric"])["measured"]
    arms = [x for x in found.index.get_level_values(0).unique() if "r=" in x]
    assert len(arms) == 4
    for arm in arms:
        own = found[arm]
        assert own["1/λ at the start"] > 0 and own["1/λ after some steps"] > 0
        assert own["relative residual, the greater"] < 2e-3
        assert 0 < own["relative upper bound, the greater"] < 0.2
        assert 0.099 <= own["best rate, sgd"] <= 1.01
    # Rank 1's coordinates are among rank 4's, one layer's among all's: λ can only grow (Cauchy).
    rates = found.xs("1/λ at the start", level="metric")
    ordered = [rates[f"MNIST, fully connected, {some}, s=1"]
               for some in ("first layer, r=1", "first layer, r=4", "all layers, r=4")]  # fmt: skip
    assert ordered[1] <= ordered[0] * 1.002 and ordered[2] <= ordered[1] * 1.002
    sweeps = list(tmp_path.glob("runs/smoke/sweep_*/members/*/result.json"))
    assert len(sweeps) == 12
    figure = render.write(filled, tmp_path / "out", "c")[-1]
    assert figure.suffix == ".png" and figure.stat().st_size > 5000
