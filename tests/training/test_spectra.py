"""Size and spectrum of updates in training: against dense matrices, under vmap, in the files."""

import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import methods, runs
from lora_jax.experiment import from_dict
from lora_jax.sweeps import padding
from lora_jax.tensors.base import densify
from lora_jax.tensors.quantized import quantize
from lora_jax.training import spectra
from lora_jax.training.reports import Reporter, read_metrics
from lora_jax.training.spectra import rows, summary, update_spectra, weight_norms

L, D, H = 3, 6, 10
QUERY = f"layers[0:{L}]/attention/query/kernel"


def weights(seed=1):
    draw = np.random.default_rng(seed)

    def random(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    return {
        f"layers[0:{L}]": {
            "attention": {n: {"kernel": random(L, D, D)} for n in ("query", "value")},
            "mlp": {"up": {"kernel": random(L, D, H)}, "down": {"kernel": random(L, H, D)}},
        },
        "head": {"kernel": random(D, 4), "bias": random(4)},
    }  # fmt: skip


def moved(method, params, seed=2):
    """The start of the method with noise where it is not padding, as training leaves it."""
    draw = np.random.default_rng(seed)

    def move(ab):
        live = jnp.any(ab["a"] != 0, axis=-2)
        a = (ab["a"] + draw.normal(size=ab["a"].shape)) * live[..., None, :]
        return {"a": a, "b": (ab["b"] + draw.normal(size=ab["b"].shape)) * live[..., :, None]}

    return {p: move(ab) for p, ab in method.init(jax.random.key(0), params).items()}


def measured(method, params, trainable, k=16):
    found = jax.jit(functools.partial(update_spectra, method, k=k))
    args = params, trainable, method.numbers(params)
    return rows(jax.device_get(found(*args, weight_norms(method, *args))))


def test_as_of_the_dense_update():
    """Every number, of layers of unequal ranks; a layer of rank 0 has no row."""
    params = weights()
    ranks = ((r"layers/1/", 3), (r"layers/2/attention", 0), (".*", 2))
    method = methods.LoRA(rank=ranks, alpha=5.0, scaling="rslora", targets=("attention/", "mlp/up"))
    trainable = moved(method, params)
    found = {row["path"]: row for row in measured(method, params, trainable, k=2)}
    assert len(found) == 7 and "layers/2/attention/query" not in found
    merged = method.merge(params, trainable)[f"layers[0:{L}]"]["mlp"]["up"]["kernel"]
    kernel = params[f"layers[0:{L}]"]["mlp"]["up"]["kernel"]
    for layer, rank in enumerate((2, 3, 2)):
        row, delta = found[f"layers/{layer}/mlp/up"], np.asarray(merged - kernel)[layer]
        s = np.linalg.svd(delta, compute_uv=False)
        p = s[:rank] / s[:rank].sum()
        assert row["rank"] == rank and row["scale"] == pytest.approx(5.0 / math.sqrt(rank))
        assert row["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-4)
        norm_w = np.linalg.norm(kernel[layer])
        assert row["relative_norm"] == pytest.approx(np.linalg.norm(delta) / norm_w, rel=1e-4)
        assert row["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-4)
        assert row["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
        np.testing.assert_allclose(row["singular_values"], s[:2], rtol=1e-4)
    total = summary(list(found.values()))
    assert total["update/norm"] == pytest.approx(
        math.sqrt(sum(row["norm"] ** 2 for row in found.values()))
    )


def test_members_in_one_program_as_alone():
    """Ranks, alphas and targets of their own, padded to a hull: no trace of the padding."""
    params = weights()
    members = [
        methods.LoRA(rank=1, alpha=1.0, targets="attention/query"),
        methods.LoRA(rank=4, alpha=8.0, targets="all-linear"),
        methods.LoRA(rank=2, alpha=3.0, targets="mlp/"),
    ]
    trees = [moved(m, params, seed) for seed, m in enumerate(members)]
    numbers = [m.numbers(params) for m in members]
    like = padding.hull(trees), padding.hull(numbers)
    packed = [
        padding.stack([padding.pad(x, hull) for x in xs])
        for xs, hull in zip((trees, numbers), like, strict=True)
    ]
    one = functools.partial(update_spectra, members[0], k=16)
    norms = weight_norms(members[0], params, *like)
    program = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, None)))
    found = jax.device_get(program(params, *packed, norms))
    for at, (member, tree) in enumerate(zip(members, trees, strict=True)):
        alone, together = measured(member, params, tree), rows(padding.take(found, at))
        assert [row["path"] for row in together] == [row["path"] for row in alone]
        for mine, theirs in zip(together, alone, strict=True):
            assert mine["rank"] == theirs["rank"] == member.rank == len(mine["singular_values"])
            for name in set(mine) - {"path"}:
                np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4)
    # A decomposition waits for threads of its pool: two at a time can wait for each other.
    text = program.lower(params, *packed, norms).compile().as_text()
    assert max(part.count("lapack") for part in text.split("\n\n")) == 1


@pytest.mark.parametrize(
    "method",
    [methods.FullFineTuning(), methods.METHODS["dora"](rank=2), methods.METHODS["ia3"]()],
    ids=lambda m: m.name,
)
def test_other_methods_yield_nothing(method):
    params = weights()
    if method.name == "ia3":
        method = dataclasses.replace(method, targets=("value$",), feedforward=())
    found = measured(method, params, method.init(jax.random.key(0), params))
    assert found == [] and summary(found) == {}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_norms_of_a_quantised_base_are_had_layer_by_layer(kind):
    draw = np.random.default_rng(0)
    w = {"query": {"kernel": jnp.asarray(draw.normal(size=(8, 64, 128)), jnp.float32)}}
    once = {"out": {"kernel": jnp.asarray(draw.normal(size=(64, 32)), jnp.float32)}}
    params = quantize({"layers[0:8]": {"attention": w}, "attention": once}, kind)
    method = methods.LoRA(rank=1, targets="attention/")
    args = params, method.init(jax.random.key(0), params), method.numbers(params)
    norms, dense = weight_norms(method, *args), weight_norms(method, densify(params), *args[1:])
    assert {p: x.shape for p, x in norms.items()} == {
        "layers[0:8]/attention/query/kernel": (8,), "attention/out/kernel": (1,),
    }  # fmt: skip
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), norms, dense)
    query = params["layers[0:8]"]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(
        norms["layers[0:8]/attention/query/kernel"],
        np.linalg.norm(query.dense().reshape(8, -1), axis=1), rtol=1e-5,
    )  # fmt: skip
    program = spectra._weight_norm.lower(query, axes=(-2, -1)).compile()
    layer = 64 * 128 * 4
    assert program.memory_analysis().temp_size_in_bytes < 2.5 * layer  # of eight


def test_the_norms_of_a_base_are_computed_once(monkeypatch):
    params, method, calls = weights(), methods.LoRA(rank=2, targets="query"), []

    def counted(*args):
        calls.append(args)
        return weight_norms(*args)

    monkeypatch.setattr(runs, "weight_norms", counted)
    inspect = runs.inspector(method, 1)
    for seed in (2, 3):
        state = SimpleNamespace(
            trainable=moved(method, params, seed), numbers=method.numbers(params)
        )
        (row, *_), wanted = inspect(params, state), measured(method, params, state.trainable, k=1)
        assert row == wanted[0]
    assert len(calls) == 1


def test_an_update_that_is_nothing_has_no_size():
    """Before the first step: B is 0, and the columns of A are no padding."""
    params, method = weights(), methods.LoRA(rank=2, targets="query")
    for row in measured(method, params, method.init(jax.random.key(0), params)):
        assert row["rank"] == 2 and row["norm"] == row["stable_rank"] == 0.0


def test_a_start_that_is_taken_off_is_no_update():
    """PiSSA: A·B − A0·B0, two products over one leaf."""
    params, method = weights(), methods.METHODS["pissa"](rank=2, targets="query")
    trainable = method.init(jax.random.key(0), params)
    before = measured(method, params, trainable)[0]
    assert before["relative_norm"] < 1e-5 and before["rank"] == 4
    trainable[QUERY] = jax.tree.map(lambda x: 1.1 * x, trainable[QUERY])
    after = measured(method, params, trainable)[0]
    delta = method.merge(params, trainable)[f"layers[0:{L}]"]["attention"]["query"]["kernel"][0]
    delta = delta - params[f"layers[0:{L}]"]["attention"]["query"]["kernel"][0]
    assert after["norm"] == pytest.approx(float(jnp.linalg.norm(delta)), rel=1e-3)


def test_lines_beyond_the_checkpoint_are_removed_once(tmp_path):
    found = [{"norm": 1.0, "scale": 2.0, "relative_norm": 0.1, "stable_rank": 1.0,
              "effective_rank": 1.0}]  # fmt: skip
    for start in (0, 2):
        with Reporter(tmp_path, start=start, steps=4, progress=False) as reporter:
            for step in range(start + 1, 5):
                reporter.log_spectra(step, found)
            reporter.log_spectra(9, [])
        with (tmp_path / "spectra.jsonl").open("a") as file:
            file.write('{"step": 5, "matri')  # killed as it wrote
    assert [row["step"] for row in read_metrics(tmp_path / "spectra.jsonl")] == [1, 2, 3, 4]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in lines] == [1, 2, 3, 4] and lines[0]["update/scale"] == 2.0


def test_a_run_writes_them_at_each_evaluation(tiny_config, tmp_path):
    training = {"steps": 4, "log_every": 4, "eval_every": 2}
    config = tiny_config(training=training, evaluation={"spectra": 1, "max_new_tokens": 1})
    runs.run(from_dict(config), tmp_path / "run", progress=False)
    lines = read_metrics(tmp_path / "run" / "spectra.jsonl")
    assert [row["step"] for row in lines] == [2, 4]
    assert len(lines[1]["matrices"]) == 14  # seven kernels in each of two layers
    assert all(len(row["singular_values"]) == 1 for row in lines[1]["matrices"])
    assert lines[1]["matrices"][0]["norm"] > lines[0]["matrices"][0]["norm"] > 0
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.count("update/norm") == 2 and json.loads(text.splitlines()[0])
    assert runs.inspector(methods.LoRA(), 0) is None
