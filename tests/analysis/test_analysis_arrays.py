"""The array functions against NumPy's dense decompositions, sampling, and published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import analysis
from lora_jax.errors import UserError

RNG = np.random.default_rng(0)


def orthonormal(n, r, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, r)))[0]


@pytest.mark.parametrize(("n_in", "n_out", "r"), [(20, 12, 5), (6, 9, 8), (4, 4, 1)])
def test_factored_spectrum_is_that_of_the_dense_product(n_in, n_out, r):
    a, b = RNG.standard_normal((n_in, r)), RNG.standard_normal((r, n_out))
    dense = np.linalg.svd(a @ b, compute_uv=False)
    found = analysis.factored_svd(a, b)
    k = min(n_in, n_out, r)
    np.testing.assert_allclose(found.s, dense[:k], rtol=1e-12)
    np.testing.assert_allclose(analysis.singular_values(a, b), dense[:k], rtol=1e-12)
    np.testing.assert_allclose((found.u * found.s) @ found.vt, a @ b, atol=1e-12)
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(found.vt @ found.vt.T, np.eye(k), atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (5, 5)])
def test_leading_directions_are_those_of_the_whole_decomposition(shape):
    m = RNG.standard_normal(shape)
    whole = analysis.svd(m)
    on_device = analysis.leading(jnp.asarray(m, jnp.float32)[None], 3)
    best = (whole.u[:, :3] * whole.s[:3]) @ whole.vt[:3]
    for found, tolerance in (
        (analysis.leading(m, 3), 1e-9),
        ([np.asarray(x)[0] for x in on_device], 1e-4),
    ):
        u, s, vt = found
        np.testing.assert_allclose(s, whole.s[:3], rtol=tolerance)
        np.testing.assert_allclose(np.abs(np.sum(u * whole.u[:, :3], 0)), 1, rtol=tolerance)
        np.testing.assert_allclose((u * s) @ vt, best, atol=10 * tolerance)
    assert analysis.leading(m, 99).s.shape == (min(shape),)
    flat = analysis.leading(np.outer(np.ones(4), np.ones(6)), 2)  # rank 1
    assert flat.s[0] == pytest.approx(24**0.5) and flat.s[1] < 1e-6 and np.isfinite(flat.vt).all()


def test_jax_batches_and_jit_agree_with_numpy():
    a = RNG.standard_normal((3, 10, 4)).astype(np.float32)
    b = RNG.standard_normal((3, 4, 7)).astype(np.float32)

    @jax.jit
    def of(a, b):
        u, s, vt = analysis.factored_svd(a, b)
        w = jnp.ones((10, 7))[None]
        projected = analysis.projected_norm(w, u, vt)
        return (
            s, analysis.norm(s), analysis.stable_rank(s), analysis.effective_rank(s),
            analysis.entropy_rank(s), analysis.rank_of_energy(s, 0.9), analysis.energy(s),
            analysis.numerical_rank(s), projected,
            analysis.amplification(analysis.norm(s), projected),
            analysis.similarities(u, u[..., :2]),
        )  # fmt: skip

    on_device = of(a, b)
    for i in range(3):
        u, s, vt = analysis.factored_svd(a[i].astype(float), b[i].astype(float))
        product = a[i].astype(float) @ b[i]
        assert s.dtype == np.float64  # NumPy in, NumPy out
        projected = analysis.projected_norm(np.ones((10, 7)), u, vt)
        expected = (
            np.linalg.svd(product, compute_uv=False)[:4], np.linalg.norm(product),
            analysis.stable_rank(s), analysis.effective_rank(s), analysis.entropy_rank(s),
            analysis.rank_of_energy(s, 0.9), analysis.energy(s), 4, projected,
            np.linalg.norm(product) / projected, analysis.similarities(u, u[:, :2]),
        )  # fmt: skip
        for x, y in zip(on_device, expected, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=2e-5, atol=1e-5)


def test_ranks_of_known_spectra():
    flat, one = np.full(5, 3.0), np.array([2.0, 0, 0, 0, 0])
    for measure in (analysis.stable_rank, analysis.effective_rank, analysis.entropy_rank):
        np.testing.assert_allclose(measure(flat), 5.0, rtol=1e-12)
        np.testing.assert_allclose(measure(one), 1.0, rtol=1e-12)
        assert measure(np.zeros(4)) == 0
    s = np.array([4.0, 2.0, 2.0])  # shares 1/2, 1/4, 1/4 of the sum; 2/3, 1/6, 1/6 of the squares
    np.testing.assert_allclose(analysis.stable_rank(s), 24 / 16)
    np.testing.assert_allclose(analysis.effective_rank(s), 2**1.5)  # 1.5 bits
    entropy = -(2 / 3 * np.log(2 / 3) + 2 / 6 * np.log(1 / 6))
    np.testing.assert_allclose(analysis.entropy_rank(s), np.exp(entropy))
    np.testing.assert_allclose(analysis.energy(s), [2 / 3, 5 / 6, 1])
    assert [int(analysis.rank_of_energy(s, x)) for x in (0.6, 0.7, 0.9, 1.0)] == [1, 2, 3, 3]
    assert analysis.rank_of_energy(np.zeros(3)) == 0
    assert analysis.numerical_rank(np.array([1.0, 1e-5, 1e-7])) == 2


def test_energy_is_that_of_the_best_approximation():
    m = RNG.standard_normal((9, 6))
    u, s, vt = analysis.svd(m)
    for k in (1, 3, 6):
        left = m - (u[:, :k] * s[:k]) @ vt[:k]
        share = 1 - np.linalg.norm(left) ** 2 / np.linalg.norm(m) ** 2
        np.testing.assert_allclose(analysis.energy(s)[k - 1], share, atol=1e-12)
        core = u[:, :k].T @ m @ vt[:k].T  # its own directions capture just that
        captured = analysis.captured_energy(core, np.linalg.norm(m))
        np.testing.assert_allclose(captured, share, atol=1e-12)


def test_similarity_of_equal_nested_and_orthogonal_subspaces():
    u = orthonormal(16, 8)
    turned = u[:, :4] @ orthonormal(4, 4, seed=5)  # the same span, other vectors
    assert analysis.similarity(u[:, :4], turned, 4, 4) == pytest.approx(1.0)
    assert analysis.similarity(u, u, 3, 8) == pytest.approx(1.0)  # nested, either way round
    assert analysis.similarity(u, u, 8, 3) == pytest.approx(1.0)
    assert analysis.similarity(u[:, :4], u[:, 4:], 4, 4) == pytest.approx(0.0)
    for i, j in ((5, 4), (4, 5), (0, 4)):
        with pytest.raises(UserError, match="there are 4"):
            analysis.similarity(u[:, :4], u[:, :4], i, j)
    half = np.concatenate([u[:, :2], u[:, 6:]], 1)  # two directions of four in common
    assert analysis.similarity(u[:, :4], half, 4, 4) == pytest.approx(0.5)


def test_all_similarities_at_once_are_equation_4():
    u, v = orthonormal(12, 5, seed=2), orthonormal(12, 7, seed=3)
    grid = analysis.similarities(u, v)
    assert grid.shape == (5, 7)
    for i in range(1, 6):
        for j in range(1, 8):
            by_hand = np.linalg.norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j)
            np.testing.assert_allclose(grid[i - 1, j - 1], by_hand, rtol=1e-12)
            np.testing.assert_allclose(analysis.similarity(u, v, i, j), by_hand, rtol=1e-12)


@pytest.mark.parametrize(("i", "j"), [(1, 1), (2, 8), (8, 8), (16, 4)])
def test_random_baseline_grows_with_the_rank(i, j):
    n, draws = 32, 300
    drawn = []
    for seed in range(draws):
        u = analysis.gaussian_directions(2 * seed, n, i)
        v = analysis.gaussian_directions(2 * seed + 1, n, j)
        drawn.append(analysis.similarity(u, v, i, j))
    error = np.std(drawn) / draws**0.5
    assert abs(np.mean(drawn) - analysis.random_similarity(n, i, j)) < 4 * error
    assert analysis.random_similarity(n, i, j) == max(i, j) / n


def test_amplification_of_a_planted_update():
    w = RNG.standard_normal((10, 7))
    u, s, vt = analysis.svd(w)
    # ΔW lies along W's third and fourth directions and is five times as large there.
    projected = analysis.projected_norm(w, u[:, 2:4], vt[2:4])
    np.testing.assert_allclose(projected, np.linalg.norm(s[2:4]))
    delta = 5.0 * (u[:, 2:4] * s[2:4]) @ vt[2:4]
    np.testing.assert_allclose(analysis.amplification(np.linalg.norm(delta), projected), 5.0)
    assert analysis.amplification(np.float64(1.0), np.float64(0.0)) == np.inf


def test_random_projections_of_table_7():
    # Published for GPT-3 (12288 x 12288, ‖W‖ 61.95): 0.02 at r = 4 and 0.33 at r = 64.
    assert round(analysis.random_projected_norm(61.95, 12288, 12288, 4), 2) == 0.02
    assert analysis.random_projected_norm(61.95, 12288, 12288, 64) == pytest.approx(0.33, abs=0.01)
    assert analysis.amplification(6.91, 0.32) == pytest.approx(21.6, abs=0.05)
    w = RNG.standard_normal((24, 12)) * np.linspace(3, 0.1, 12)
    squares = [
        analysis.projected_norm(w, orthonormal(24, 3, 2 * i), orthonormal(12, 3, 2 * i + 1).T) ** 2
        for i in range(400)
    ]
    expected = analysis.random_projected_norm(np.linalg.norm(w), 24, 12, 3) ** 2
    assert abs(np.mean(squares) - expected) < 4 * np.std(squares) / 400**0.5


def test_planted_intruders_are_found():
    n = 32
    u, vt = orthonormal(n, n, 7), orthonormal(n, n, 8).T
    w = (u * np.linspace(2, 1, n)) @ vt
    base = analysis.svd(w).vt.T
    # A direction at |cosine| 1/4 from sixteen of W's: new to it, and made the strongest.
    new = vt[:16].sum(0) / 4
    strong = w + 500.0 * np.outer(u[:, 5], new)
    tuned = analysis.svd(strong).vt.T
    np.testing.assert_allclose(analysis.likeness(base, tuned)[0], 0.25, atol=0.01)
    assert analysis.count_intruders(base, tuned, k=1) == 1
    assert analysis.count_intruders(base, tuned, k=1, epsilon=0.2) == 0
    assert analysis.count_intruders(base, tuned[:, ::-1], k=1) == 0  # it is not among the first
    # More of what W has already, however much, is no intruder; nor is a sign.
    kept = analysis.svd(w - 50.0 * np.outer(u[:, 9], vt[9])).vt.T
    assert analysis.count_intruders(base, kept) == 0
    assert analysis.count_intruders(base, -base) == 0
