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
from lora_jax.plan import plan_config
from lora_jax.tensors.base import is_weight
from lora_jax.tensors.nf4 import NF4
from lora_jax.tensors.quantized import differences

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 7)).astype(np.int32)


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + 17 * len(shape) + sum(shape)), shape)


@pytest.fixture(scope="module")
def llama(tiny_base):
    """(adapted apply, quantised parameters, dense ones, LoRA on all kernels, a moved start)."""
    model, params = lj.load_pretrained(tiny_base / "base")
    method = lj.LoRA(rank=2, alpha=8, targets="all-linear")
    trainable = descendants.moved(method.init(jax.random.key(0), params), size=0.1)
    apply = jax.jit(lj.adapt(model.apply))
    return apply, lj.quantize(params), params, method, trainable


def test_qlora_is_lora_over_what_the_codes_stand_for(llama):
    """Logits and gradients, through a scanned Llama, of the same adapter on the dense tree."""
    apply, quantised, _, method, trainable = llama

    def loss(trainable, params):
        logits = apply(method.combine(params, trainable), TOKENS)
        return jnp.mean(jnp.square(logits)), logits

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, ours), grads = run(trainable, quantised)
    (_, theirs), wanted = run(trainable, lj.densify(quantised))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    assert all(np.any(x != 0) for x in jax.tree.leaves(grads))


def test_merging_into_the_dense_base_differs_by_the_error_of_quantisation(llama):
    apply, quantised, params, method, trainable = llama

    def outputs(variables):
        return apply(variables, TOKENS)

    error = lj.merge_error(method, quantised, params, trainable, outputs)
    alone = differences(params, quantised)
    assert set(error.weights) == set(alone) and len(alone) == 7
    for path, d in error.weights.items():
        np.testing.assert_allclose(d.largest, alone[path].largest, rtol=1e-3)
        np.testing.assert_allclose(d.rms, alone[path].rms, rtol=1e-3)
        assert 0.05 < alone[path].relative < 0.12  # 4 bits
        # By hand, and between levels at most half a gap (0.152) of the block's magnitude apart.
        w, q = partition.flatten(params)[path], partition.flatten(quantised)[path].dense()
        np.testing.assert_allclose(alone[path].rms, np.sqrt(np.mean((w - q) ** 2)), rtol=1e-5)
        assert alone[path].largest < 0.17 * np.abs(w).max()
    assert error.outputs.largest > error.outputs.rms > 0 and "outputs" in str(error)
    own = lj.merge_error(method, quantised, quantised, trainable, outputs)
    assert not own.weights and own.outputs.relative < 1e-5  # merged into what it was trained on


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["dora", "ia3", "lora_ga", "pissa", "relora", "vera"])
def test_descendants_of_lora_stand_over_quantised_weights(name, kind):
    params = lj.quantize(descendants.toy_params(), kind)
    method = descendants.METHODS[name].prepare(
        lj.adapt(descendants.toy), params, [descendants.batch()]
    )
    trainable = descendants.moved(method.init(jax.random.key(0), params))
    merged = method.merge(params, trainable)
    assert not any(map(is_weight, partition.flatten(merged).values()))
    beside = descendants.logits(method.combine(params, trainable))
    np.testing.assert_allclose(
        beside, descendants.toy({"params": merged}, descendants.TOKENS), atol=2e-3
    )


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
    config = tiny_config(model={"quantize": "nf4"}, optimizer={"learning_rate": 2e-2})
    experiment = from_dict(config)
    result = runs.run(experiment, tmp_path / "run", progress=False)
    bench, method, trainable = runs.load_run(tmp_path / "run")
    kernel = partition.flatten(bench.params)["layers[0:2]/mlp/up/kernel"]
    assert isinstance(kernel, NF4)
    again, _ = bench.evaluate(method.combine(method.dropped(bench.params), trainable))
    assert again == {n: result["metrics"][n] for n in again}
    source = config["model"]["source"]
    assert result["base_sha256"] == pretrained.base_sha256(source)
    dense = pretrained.load_pretrained(source)[1]
    assert result["total_params"] == sum(math.prod(x.shape) for x in jax.tree.leaves(dense))
    kept = partition.flatten(method.merge(bench.params, trainable))
    assert set(kept) == set(partition.flatten(dense))
    # The plan is of the same shapes and counts the same, with fewer bytes of weights.
    plan, plain = plan_config(experiment), plan_config(from_dict(tiny_config()))
    assert plan.parameters == plain.parameters == result["total_params"]
    assert plan.parts["weights"] < plain.parts["weights"]
    capsys.readouterr()
    with pytest.raises(lj.UserError, match="quantize must be"):
        from_dict(tiny_config(model={"quantize": "fp4"}))
