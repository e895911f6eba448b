"""First gradients: against NumPy's own decompositions, and signal told from noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import analysis, partition
from lora_jax import config as configs
from lora_jax.errors import UserError
from lora_jax.experiment import from_dict
from lora_jax.sweeps import report, smallest
from lora_jax.tables import render
from lora_jax.workbench import Workbench

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "beyond_gradients.py"

SIGNAL = 2  # its rank


def drawn(noise: float, count: int = 8, signal: float = 1.0) -> np.ndarray:
    """[K, 2 layers, 20, 30]: a shared matrix of rank 2 with singular values 60 and 40, and
    independent noise of a batch."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(2, n, SIGNAL)))[0] for n in (20, 30))
    shared = signal * (u * [60.0, 40.0]) @ v.swapaxes(-1, -2)
    return shared + noise * rng.normal(size=(count, 2, 20, 30))


def found_of(g: np.ndarray) -> analysis.FirstGradients:
    return analysis.first_gradients(lambda x: {"w": x}, iter(g), len(g))["w"]


@pytest.mark.parametrize("turn", [False, True])
def test_the_three_spectra_are_numpys(turn: bool) -> None:
    """Of a stack of layers, wide and tall."""
    g = drawn(3.0)
    g = g.swapaxes(-1, -2) if turn else g
    found = found_of(g)

    def values(x: np.ndarray) -> np.ndarray:
        return np.linalg.svd(x, compute_uv=False)

    np.testing.assert_allclose(found.mean, values(g.mean(0)))
    signs = np.array([1, -1] * 4).reshape(8, 1, 1, 1)
    np.testing.assert_allclose(found.noise, values((signs * g).mean(0)))
    axis = -2 if turn else -1  # beside each other along the longer side
    beside = np.concatenate(list(g), axis) / np.sqrt(8)
    np.testing.assert_allclose(found.stacked, values(beside)[..., :20])
    by_hand = ((g - g.mean(0)) ** 2).sum((0, 2, 3)) / 7
    np.testing.assert_allclose(found.scatter, by_hand)
    assert found.batches == 8 and found.mean.shape == found.stacked.shape == (2, 20)


def test_signal_is_told_from_noise() -> None:
    """A tenth of the noise's directions would pass for signal by the mean's spectrum alone."""
    found = found_of(drawn(3.0))
    assert (analysis.numerical_rank(found.mean, 0.01) == 20).all()
    assert (analysis.rank_above_noise(found) == SIGNAL).all()
    # 600 entries of variance 9, over 8 batches: 675 beside the signal's 60² + 40².
    np.testing.assert_allclose(analysis.noise_share(found), 675 / (5200 + 675), rtol=0.1)
    np.testing.assert_allclose(found.scatter, 600 * 9, rtol=0.05)


def test_noise_alone_and_signal_alone() -> None:
    noise = found_of(drawn(1.0, signal=0.0))
    assert (analysis.rank_above_noise(noise) <= 3).all()
    np.testing.assert_allclose(analysis.noise_share(noise), 1.0, rtol=0.1)
    clean = found_of(drawn(0.0))
    assert (analysis.rank_above_noise(clean) >= SIGNAL).all() and (clean.noise < 1e-12).all()
    np.testing.assert_allclose(analysis.noise_share(clean), 0.0, atol=1e-12)
    np.testing.assert_allclose(analysis.entropy_rank(clean.mean), np.exp(0.6172), rtol=1e-3)


def test_gradients_of_a_model_stream_through_jax() -> None:
    """y = x·W with labels of a map of rank 1: so is every gradient, at W = 0."""
    keys = jax.random.split(jax.random.key(0), 4)
    u, v = jax.random.normal(keys[0], (6, 1)), jax.random.normal(keys[1], (1, 5))
    batches = [jax.random.normal(k, (400, 6)) for k in jax.random.split(keys[2], 4)]

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean((x @ w - x @ u @ v) ** 2)

    taken: list[int] = []

    def gradient(x: jax.Array) -> dict[str, jax.Array]:
        taken.append(1)
        return {"w": jax.grad(loss)(jnp.zeros((6, 5)), x)}

    found = analysis.first_gradients(gradient, iter(batches), 2)["w"]
    assert len(taken) == 2 and isinstance(found.mean, jax.Array)
    assert float(analysis.effective_rank(found.mean)) == pytest.approx(1.0, abs=1e-3)
    assert float(analysis.energy(found.mean)[0]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("count", "there", "said"), [(3, 4, "not even"), (4, 2, "there are 2")])
def test_refusals(count: int, there: int, said: str) -> None:
    g: Any = iter(drawn(1.0)[:there])
    with pytest.raises(UserError, match=said):
        analysis.first_gradients(lambda x: {"w": x}, g, count)


# The experiment.


def test_targets_of_a_stack_are_those_of_its_layers(tiny_config: Any, tmp_path: Path) -> None:
    """The experiment's gradients of a two-layer Llama, against jax.grad by hand."""
    module = configs.load_module(str(EXPERIMENT))
    made = tiny_config(method={"kind": "lora", "rank": 1})
    config = tmp_path / "config.py"
    config.write_text(f"def get_config():\n    return {made!r}\n")
    found = module.first(str(config), json.dumps({"method.targets": ["mlp/up$", "mlp/down$"]}), 2)
    assert [x.mean.shape for x in found.values()] == [(2, 16), (2, 16)]
    bench = Workbench(from_dict(made))
    stream = bench.batches(0)

    def loss(params: Any, batch: Any) -> Any:
        total, weight = bench.loss({"params": params}, batch)
        return total / weight

    both = [jax.jit(jax.grad(loss))(bench.params, next(stream)) for _ in range(2)]
    mean = partition.flatten(jax.tree.map(lambda a, b: (a + b) / 2, *both))
    wanted = [x for path, x in mean.items() if path.endswith(("up/kernel", "down/kernel"))]
    for one, g in zip(found.values(), wanted, strict=True):
        s = np.linalg.svd(np.asarray(g), compute_uv=False)
        np.testing.assert_allclose(one.mean, s, rtol=1e-3, atol=1e-6)


def test_the_experiment_at_smoke_scale(
    smoke_on_mnist: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every case has its ranks; a threshold beyond the ladder is one too; figures are drawn."""
    monkeypatch.setattr(report, "write", lambda *_: None)  # pages have tests of their own
    filled = smoke_on_mnist("beyond_gradients")
    found = filled.frame().set_index(["row", "metric"])["measured"]
    cases = [x for x in found.index.get_level_values(0).unique() if x.startswith("MNIST")]
    assert len(cases) == 4
    for case in cases:
        own = found[case]
        width = int(case.split("-")[1])
        assert 1 <= own["stable rank"] <= own["entropy rank"] <= own["effective rank"] <= width
        assert own["noise's share of energy"] > 0
    lines = {(x.row.row, x.row.metric): x for x in filled.lines}
    searches = [smallest.load(Path(lines[case, "r90"].measured.place)) for case in cases]
    assert all({r.size for r in one.runs} == {1, 4} and one.target.head_only for one in searches)
    files = [x for x in render.write(filled, tmp_path / "out", "g") if x.suffix == ".png"]
    assert len(files) == 2 and all(x.stat().st_size > 5000 for x in files)
