"""NF4 and int8 weights: bitsandbytes' numbers, each use against the dense weight."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import lora_jax as lj
from lora_jax import partition
from lora_jax.tensors import int8 as int8s
from lora_jax.tensors import nf4 as nf4s
from lora_jax.tensors.base import is_weight
from lora_jax.tensors.bitsandbytes import from_bitsandbytes
from lora_jax.tensors.nf4 import DYNAMIC_LEVELS, LEVELS, NF4

# Compiled: one program in place of many small ones.
nf4 = jax.jit(nf4s.nf4, static_argnames=("batch", "order", "double", "path"))
int8 = jax.jit(int8s.int8, static_argnames=("batch", "path"))


def random(*shape, seed=0):
    rng = np.random.default_rng(seed + 17 * len(shape) + sum(shape))
    return rng.normal(size=shape).astype(np.float32)


def published_weight():
    return np.random.default_rng(0).normal(0, 0.05, (256, 128)).astype(np.float32)


# What bitsandbytes 0.50.2 makes of `published_weight()`, as PyTorch's (out, in), on a CPU:
# quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True), dequantize_4bit.
GOLDEN = {
    "codes": "0a062dc91ec66418f17d21b3cc1b4f74430f3d8848823cb1cddbc2b38ef21023",
    "absmax": [56, 52, 60, 208, 242, 41, 201, 248, 36, 61, 75, 59],
    "nested": [0.07052382826805115, 0.09407174587249756],
    "offset": 0.1306340992450714,
    "values": [0.009242746978998184, -0.010574884712696075, 0.02858438342809677],
    "rms error": 0.0045808195,
}


def test_numbers_are_those_of_bitsandbytes():
    w = published_weight()
    q = nf4(w.T)  # ours are (in, out)
    assert hashlib.sha256(np.asarray(q.codes).tobytes()).hexdigest() == GOLDEN["codes"]
    np.testing.assert_array_equal(q.absmax[:12], GOLDEN["absmax"])
    np.testing.assert_allclose(q.nested, GOLDEN["nested"], rtol=1e-6)
    np.testing.assert_allclose(q.offset, GOLDEN["offset"], rtol=1e-6)
    np.testing.assert_allclose(q.dense().T[0, :3], GOLDEN["values"], rtol=1e-5)
    error = np.sqrt(np.mean((np.asarray(q.dense()).T - w) ** 2))
    np.testing.assert_allclose(error, GOLDEN["rms error"], rtol=1e-4)


def test_levels_are_those_of_the_papers():
    """Half the levels at quantiles of N(0, 1) on either side of 0, scaled to [-1, 1]."""
    edge = 1 - (1 / 32 + 1 / 30) / 2
    above = scipy.stats.norm.ppf(np.linspace(edge, 0.5, 9)[:-1])
    below = -scipy.stats.norm.ppf(np.linspace(edge, 0.5, 8)[:-1])
    wanted = np.sort([*above, 0.0, *below]) / above.max()
    np.testing.assert_allclose(LEVELS, wanted, atol=1e-6)
    positive = DYNAMIC_LEVELS[DYNAMIC_LEVELS > 0]
    assert len(DYNAMIC_LEVELS) == 256 and len(positive) == 128 and positive[-1] == 1.0
    # Seven decades of 1, 2, 4, … evenly spaced numbers: the last of 64, 0.9 / 64 apart.
    np.testing.assert_allclose(np.diff(positive[-65:-1]), 0.9 / 64, rtol=1e-4)
    np.testing.assert_allclose(positive[0], 0.55e-6, rtol=1e-5)


def test_bitsandbytes_itself():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    w = np.random.default_rng(1).normal(0, 0.05, (768, 192)).astype(np.float32)
    codes, state = functional.quantize_4bit(
        torch.from_numpy(w), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    saved = {f"w.{k}": x.numpy() for k, x in state.as_dict(packed=True).items()}
    read = from_bitsandbytes({"w": codes.numpy(), **saved}, "w")
    theirs = functional.dequantize_4bit(codes, state).numpy()
    np.testing.assert_allclose(np.asarray(read.dense()).T, theirs, rtol=1e-5, atol=1e-7)
    ours = nf4(w.T)
    np.testing.assert_array_equal(ours.codes, read.codes)
    assert np.mean(np.asarray(ours.absmax) != np.asarray(read.absmax)) < 0.01  # ties


def test_reading_a_file_of_bitsandbytes():
    w = published_weight()
    q = nf4(w.T)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [256, 128],
             "nested_blocksize": 256, "nested_dtype": "float32",
             "nested_offset": float(q.offset)}  # fmt: skip
    packed = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors = {
        "x.weight": np.asarray(q.codes)[:, None], "x.weight.absmax": np.asarray(q.absmax),
        "x.weight.nested_absmax": np.asarray(q.nested),
        "x.weight.quant_state.bitsandbytes__nf4": packed,
    }  # fmt: skip
    np.testing.assert_array_equal(from_bitsandbytes(tensors, "x.weight").dense(), q.dense())
    other = np.frombuffer(json.dumps({**state, "blocksize": 128}).encode(), np.uint8)
    tensors["x.weight.quant_state.bitsandbytes__nf4"] = other
    with pytest.raises(lj.UserError, match="not \\('nf4', 64, 256\\)"):
        from_bitsandbytes(tensors, "x.weight")


@pytest.mark.parametrize(
    ("shape", "options"),
    [((64, 6), {}), ((7, 9), {}), ((5, 3), {"order": (0, 1)}), ((3, 10, 8), {"batch": 1}),
     ((2, 3, 4, 16), {"batch": 2, "double": False}), ((3, 3, 2, 4), {"order": (2, 3, 1, 0)})],
)  # fmt: skip
def test_every_number_has_the_nearest_level_of_its_block(shape, options):
    w = np.array(random(*shape))
    w.reshape(-1)[:2] = 0.0
    q = nf4(w, **options)
    dense = np.asarray(q.dense())
    assert dense.shape == q.shape == shape and q.dtype == jnp.float32
    batch, order = options.get("batch", 0), options.get("order", (1, 0))
    layers = w.reshape(-1, *shape[batch:])
    found = dense.reshape(-1, *shape[batch:])
    absmax = np.asarray(q.magnitudes()).reshape(len(layers), -1)
    for layer, got, magnitudes in zip(layers, found, absmax, strict=True):
        flat = layer.transpose(np.argsort(order)).reshape(-1)
        blocks = [flat[i : i + 64] for i in range(0, len(flat), 64)]
        largest = [np.abs(b).max() for b in blocks]
        np.testing.assert_allclose(magnitudes, largest, rtol=0.05)  # exact but for 8 bits
        wanted = [
            m * LEVELS[np.abs(b[:, None] / a - LEVELS[None]).argmin(1)]
            for b, a, m in zip(blocks, largest, magnitudes, strict=True)
        ]
        got = got.transpose(np.argsort(order)).reshape(-1)
        np.testing.assert_allclose(got, np.concatenate(wanted), rtol=1e-6)
    zero = nf4(jnp.zeros((64, 2)), double=False)
    np.testing.assert_array_equal(zero.dense(), 0.0)


def test_int8_rounds_to_a_127th_of_each_outputs_largest():
    w = np.array(random(3, 10, 4)) * np.array([1.0, 10.0, 0.1, 0.0], np.float32)
    q = int8(w, batch=1)
    scale = np.abs(w).max(1, keepdims=True) / 127
    np.testing.assert_allclose(q.gain, scale, rtol=1e-6)
    np.testing.assert_allclose(
        q.dense(), np.round(w / np.where(scale, scale, 1)) * scale, rtol=1e-5
    )
    assert q.w.codes.dtype == jnp.int8 and np.abs(q.w.codes).max() == 127


WEIGHTS = {
    "nf4": lambda w, n: nf4(w, batch=n, path="w"),
    "nf4, single": lambda w, n: nf4(w, batch=n, double=False, order=(0, 1), path="w"),
    "int8": lambda w, n: int8(w, batch=n, path="w"),
}
MATRIX = {
    "product": lambda w, x: x @ w,
    "left": lambda w, x: w.T @ x[0].T,
    "transposed": lambda w, x: (x @ w) @ w.T,
    "dense layer": lambda w, x: jnp.einsum("io,bti->tbo", w, x),
    "scaled": lambda w, x: x @ -(2.0 * w / 3.0),
    "stopped": lambda w, x: x @ jax.lax.stop_gradient(w),
    "embedding": lambda w, x: jnp.take(w, jnp.array([[0, 3]]), axis=0),
    "unit": lambda w, x: x @ jnp.squeeze(w[None], 0),
}
STACK = {
    "scanned": lambda w, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w @ w.T), c @ w), x, w),
    "one": lambda w, x: x @ w[1],
    "traced": lambda w, x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i] @ w[i].T), x),
    "some": lambda w, x: jax.lax.scan(lambda c, w: (c, c @ w), x, w[1:])[1],
    "parts": lambda w, x: x @ jnp.split(w, 3)[2][0],
    "each": lambda w, x: x @ jnp.unstack(w)[1],
}


def same(uses, weight, *args):
    """Each use of the weight against the same use of its array; all in one program."""

    def both(weight, *args):
        ours = [lj.densify(lj.adapt(f)(weight, *args)) for f in uses]
        return ours, [f(lj.densify(weight), *args) for f in uses]

    ours, dense = jax.jit(both)(weight, *args)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)


def adapted(w):
    front = w.shape[:-2]
    scale = jnp.arange(1.0, 4.0) if front else jnp.asarray(0.7)
    return lj.LowRank(w, random(*front, 4, 2), random(*front, 2, 6), scale, path="w")


@pytest.mark.parametrize("kind", WEIGHTS)
def test_uses_are_those_of_the_dense_weight(kind):
    matrix, stack = WEIGHTS[kind](random(4, 6), 0), WEIGHTS[kind](random(3, 4, 6), 1)
    x = random(2, 5, 4)
    for w in (matrix, adapted(matrix)):
        same(MATRIX.values(), w, x)
    for w in (stack, adapted(stack)):
        same(STACK.values(), w, x)
    half = lj.adapt(lambda w, x: x @ w.astype(jnp.bfloat16))(matrix, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, x @ matrix.dense(), atol=0.1)

    def gradient(w, x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(lj.adapt(STACK["scanned"])(w, x)[1])))(x)

    same([gradient], stack, x)


def test_a_convolution_and_experts():
    def f(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    w = random(3, 3, 2, 4)
    for weight in (nf4(w, order=(2, 3, 1, 0)), int8(w)):
        same([f], weight, random(1, 6, 6, 2))
    experts = nf4(random(3, 4, 6), batch=1)
    same([lambda w, x: jnp.einsum("bei,eio->beo", x, w)], experts, random(2, 3, 4))


def test_runs_of_whole_blocks_can_be_cut():
    """Along the outputs of (16, 24), of which four are a block; exactly, whatever the layers."""
    stack = nf4(random(2, 16, 24), batch=1, path="w")
    wide = nf4(random(64, 9), path="w")  # an output is a block

    def uses(w, x):
        one, groups = w[0], w.reshape(2, 1, 16, 24)
        return x @ one[:, 4:12], x @ one[:, 20:], x @ one.T[8:].T, x @ groups[1, 0], [
            x @ part[1] for part in jnp.split(w, [8, 20], axis=2)
        ]  # fmt: skip

    same([uses], stack, random(3, 16))
    same([lambda w, x: x @ w.reshape(1, 64, 9)[0][:, 2:5],
          lambda w, x: x @ jax.lax.dynamic_slice_in_dim(w, jnp.int32(7), 3, 1)],
         wide, random(3, 64))  # fmt: skip
    cut = lj.adapt(lambda w: w[:, :, 4:12])(stack)
    assert isinstance(cut, NF4)
    np.testing.assert_array_equal(cut.dense(), stack.dense()[:, :, 4:12])


CUTS = {
    "inputs": lambda w: w[:8],
    "not at a block": lambda w: w[:, 2:8],
    "steps": lambda w: w[:, ::2],
    "parts": lambda w: jnp.split(w, 4, axis=1),
    "anywhere": lambda w: jax.lax.dynamic_slice_in_dim(w, jnp.int32(4), 4, 1),
    "heads": lambda w: w.reshape(16, 4, 6),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_cuts_through_blocks_say_what_to_do(cut):
    w = nf4(random(16, 24), path="w")
    over = lj.LowRank(w, jnp.ones((16, 2)), jnp.ones((2, 24)), jnp.ones(()), path="w")
    for weight in (w, over):
        with pytest.raises(lj.UserError, match=r"\('w', None\) before the other rules"):
            lj.adapt(cut)(weight)


def test_stacks_of_quantised_layers_are_cut():
    for kind in ("nf4", "int8"):
        params = lj.quantize({"layers[0:3]": {"mlp": {"up": {"kernel": random(3, 16, 24)}}}}, kind)
        parts = partition.flatten(partition.split_stacks(params, {"layers": [1]}))
        whole = partition.flatten(params)["layers[0:3]/mlp/up/kernel"].dense()
        for span, layers in {"0:1": slice(0, 1), "1:3": slice(1, 3)}.items():
            part = parts[f"layers[{span}]/mlp/up/kernel"]
            np.testing.assert_array_equal(part.dense(), whole[layers])


def test_what_cannot_be_done_says_so():
    with pytest.raises(lj.UserError, match="scan runs along an input or output axis of 'w'"):
        lj.adapt(lambda w: jax.lax.scan(lambda c, w: (c, w), 0, w))(nf4(random(4, 6), path="w"))


# Trees.


def tree():
    """The parameters of two layers, named as the families' are."""
    attention = {n: {"kernel": random(2, 16, 16)} for n in ("query", "key", "value", "out")}
    attention["query"]["bias"] = random(2, 16)
    mlp = {"up": {"kernel": random(2, 16, 24)}, "down": {"kernel": random(2, 24, 16)}}
    layers = {"attention": attention, "mlp": mlp, "mlp_norm": {"scale": random(2, 16)}}
    head = {"kernel": random(16, 5)}
    return {"embed": {"embedding": random(32, 16)}, "layers[0:2]": layers, "head": head}


def test_default_rules_leave_embeddings_norms_and_heads():
    params = tree()
    q = partition.flatten(lj.quantize(params))
    kinds = {p: isinstance(x, NF4) for p, x in q.items()}
    kernels = {p for p in kinds if p.startswith("layers") and p.endswith("/kernel")}
    assert {p for p, on in kinds.items() if on} == kernels and len(kernels) == 6
    path = "layers[0:2]/mlp/down/kernel"
    assert q[path].path == path and q[path].shape == (2, 24, 16)
    rules = ((r"layers/.*/query", None), (r"attention", "int8"), ("embed", "nf4"))
    mixed = partition.flatten(lj.quantize(params, rules))
    found = {p: type(x).__name__ for p, x in mixed.items() if is_weight(x)}
    assert found == {
        "embed/embedding": "NF4", **{f"layers[0:2]/attention/{n}/kernel": "Int8"
                                     for n in ("key", "value", "out")},
    }  # fmt: skip
    assert mixed["embed/embedding"].stored == params["embed"]["embedding"].shape


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("fp4", "did you mean nf4"),
        (((r"layers/0/mlp", "nf4"),), "differently"),
        (((r"mlps", "nf4"),), "matches nothing"),
        (((r"router", "nf4"),), "neither a matrix nor"),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    with pytest.raises(lj.UserError, match=message):
        lj.quantize({**tree(), "router": random(2, 3, 4)}, rules)


def test_leaves_that_are_quantised_are_neither_quantised_again_nor_trained():
    quantised = lj.quantize(tree())
    with pytest.raises(lj.UserError, match="is a NF4 already"):
        lj.quantize(quantised)
    with pytest.raises(lj.UserError, match="is a frozen NF4 and cannot be trained whole"):
        lj.FullFineTuning().init(jax.random.key(0), quantised)
