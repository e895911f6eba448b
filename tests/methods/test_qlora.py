"""QLoRA by composition: methods over quantised bases, what merging loses, bytes, a whole run."""

from __future__ import annotations

import math

import descendants
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import partition, pretrained, runs
from lora_jax.experiment import from_dict
from lora_jax.plan.devices import mesh_for
from lora_jax.plan.sketch import Sketch
from lora_jax.tensors.base import is_weight
from lora_jax.tensors.nf4 import NF4
from lora_jax.tensors.quantized import differences


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def toy():
    """(quantised parameters, dense ones, LoRA on all kernels of the layers, a moved start)."""
    params = descendants.toy_params()
    method = lj.LoRA(rank=2, alpha=8, targets="all-linear")
    trainable = descendants.moved(method.init(jax.random.key(0), params))
    return lj.quantize(params), params, method, trainable


def test_qlora_is_lora_over_what_the_codes_stand_for(toy):
    """Loss and gradients, through scanned layers, of the same adapter on the dense tree."""
    quantised, _, method, trainable = toy

    def loss(trainable, params):
        return descendants.toy_loss(method.combine(params, trainable), descendants.batch())[0]

    run = jax.jit(jax.value_and_grad(loss))
    ours, grads = run(trainable, quantised)
    theirs, wanted = run(trainable, lj.densify(quantised))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
        assert np.any(got != 0)


def test_merging_into_the_dense_base_differs_by_the_error_of_quantisation(toy):
    quantised, params, method, trainable = toy
    error = lj.merge_error(method, quantised, params, trainable, descendants.logits)
    alone = differences(params, quantised)
    assert set(error.weights) == set(alone) and len(alone) == 4
    for path, d in error.weights.items():
        np.testing.assert_allclose(d.largest, alone[path].largest, rtol=1e-3)
        np.testing.assert_allclose(d.rms, alone[path].rms, rtol=1e-3)
        # By hand; 4 bits, and at most half the widest gap of levels (0.152) from the number.
        w, q = partition.flatten(params)[path], partition.flatten(quantised)[path].dense()
        np.testing.assert_allclose(d.rms, np.sqrt(np.mean((w - q) ** 2)), rtol=1e-3)
        np.testing.assert_allclose(d.largest, np.abs(w - q).max(), rtol=1e-3)
        assert 0.04 < alone[path].relative < 0.12 and d.largest < 0.17 * np.abs(w).max()
    assert error.outputs.largest > error.outputs.rms > 0 and "outputs" in str(error)
    own = lj.merge_error(method, quantised, quantised, trainable, descendants.logits)
    assert not own.weights and own.outputs.relative < 1e-5  # merged into what it was trained on


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dora", "int8"), ("ia3", "nf4"), ("lora_ga", "nf4"), ("pissa", "nf4"),
     ("relora", "nf4"), ("vera", "int8")],
)  # fmt: skip
def test_descendants_of_lora_stand_over_quantised_weights(name, kind):
    params = lj.quantize(descendants.toy_params(), kind)
    method = descendants.METHODS[name].prepare(
        lj.adapt(descendants.toy), params, [descendants.batch()]
    )
    trainable = descendants.moved(method.init(jax.random.key(0), params))
    merged = method.merge(params, trainable)
    assert not any(map(is_weight, partition.flatten(merged).values()))
    beside = descendants.logits(method.combine(params, trainable))
    np.testing.assert_allclose(beside, descendants.logits({"params": merged}), atol=2e-3)


# Memory.


def test_bytes_of_the_compiled_program():
    """At most 0.56 byte a parameter, and no layer but one made dense, forwards or backwards."""
    L, D, H = 8, 256, 512
    params = {"layers[0:8]": {"mlp": {"up": {"kernel": random(L, D, H)},
                                      "down": {"kernel": random(L, H, D)}}}}  # fmt: skip
    numbers = 2 * L * D * H
    method = lj.LoRA(rank=4, targets="all-linear")

    def model(variables, x):
        def layer(c, w):
            return c + jnp.tanh(c @ w["mlp"]["up"]["kernel"]) @ w["mlp"]["down"]["kernel"], None

        return jax.lax.scan(layer, x, variables["params"]["layers[0:8]"])[0]

    def loss(trainable, params, x):
        return jnp.sum(lj.adapt(model)(method.combine(params, trainable), x))

    trainable, x = method.init(jax.random.key(0), params), jnp.ones((4, D))
    compiled = jax.jit(jax.grad(loss)).lower(trainable, lj.quantize(params), x).compile()
    memory = compiled.memory_analysis()
    others = sum(v.nbytes for v in jax.tree.leaves((trainable, x)))
    assert (memory.argument_size_in_bytes - others) / numbers <= 0.56
    assert memory.temp_size_in_bytes < 0.4 * numbers * 4  # all layers in float32 are 4 n bytes


# A run.


def test_a_run_on_a_quantised_base(tiny_config, tmp_path, capsys):
    data = {"task": {"kind": "text", "text": "a", "length": 8}, "length": 8}
    config = tiny_config(model={"quantize": "nf4"}, data=data)
    experiment = from_dict(config)
    result = runs.run(experiment, tmp_path / "run", progress=False)
    bench, method, trainable = runs.load_run(tmp_path / "run")
    kernels = [p for p, x in partition.flatten(bench.params).items() if isinstance(x, NF4)]
    assert len(kernels) == 7 and all(p.startswith("layers[0:2]/") for p in kernels)
    again, _ = bench.evaluate(method.combine(method.frozen(bench.params), trainable))
    assert again == result["metrics"]
    source = config["model"]["source"]
    assert result["base_sha256"] == pretrained.base_sha256(source)
    dense = pretrained.load_pretrained(source)[1]
    assert result["total_params"] == sum(math.prod(x.shape) for x in jax.tree.leaves(dense))
    # The plan's shapes, known without the weights.
    sketch = Sketch(experiment, mesh_for(experiment.mesh, None)).params
    like = jax.tree.map(lambda x: (x.shape, x.dtype), bench.params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), sketch) == like
    capsys.readouterr()
    with pytest.raises(lj.UserError, match="quantize must be"):
        from_dict(tiny_config(model={"quantize": "fp4"}))
