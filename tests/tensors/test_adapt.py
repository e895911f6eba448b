"""`adapt` on models it has never seen, unmodified: merged weights must give the same outputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import lora_jax as lj
from lora_jax import partition


def randomized(trainable, scale=0.3):
    """Both factors away from zero, so that the update matters."""
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    new = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, new)


def check(apply, params, method, *args, atol=2e-5, wrap=lambda p: {"params": p}):
    """Outputs and factor gradients of the adapted function against the dense sum."""
    trainable = randomized(method.init(jax.random.key(0), params))
    adapted = lj.adapt(apply)

    def ours(t):
        return adapted(wrap(method.combine(params, t)["params"]), *args)

    def dense(t):
        return apply(wrap(method.merge(params, t)), *args)

    y = dense(trainable)
    np.testing.assert_allclose(ours(trainable), y, atol=atol, rtol=2e-5)
    base = apply(wrap(params), *args)
    assert np.abs(base - y).max() > 100 * atol, "the update does not matter in this test"
    seed = jax.random.normal(jax.random.key(1), y.shape)
    got, want = (
        jax.jit(jax.grad(lambda t, f=f: jnp.sum(f(t).astype(jnp.float32) * seed)))(trainable)
        for f in (ours, dense)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=20 * atol, rtol=1e-3)
    return trainable


def test_linen_dense_general_attention():
    model = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12, out_features=5)
    x = jax.random.normal(jax.random.key(2), (2, 4, 6))
    params = model.init(jax.random.key(0), x, x)["params"]
    layouts = ((r"(query|key|value)/kernel", "ioo"), (r"out/kernel", "iio"))
    method = lj.LoRA(rank=2, targets=(r"query$", r"value$", r"out$"), layouts=layouts)
    trainable = check(lambda v, x: model.apply(v, x, x), params, method, x)
    assert trainable["query/kernel"]["b"].shape == (2, 3, 4)
    # Rank r means rank r over the flattened axes: out is (N·H, D).
    assert method.count(params).per_target["out/kernel"] == 2 * (12 + 5)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.remat(nn.Dense, prevent_cse=False)

        def body(module, carry, _):
            return carry + jnp.tanh(block(6, name="dense")(carry)), None

        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(self, x, None)[0]


def test_linen_scan_remat():
    model = Scanned()
    x = jax.random.normal(jax.random.key(2), (4, 6))
    params = model.init(jax.random.key(0), x)["params"]
    method = lj.LoRA(rank=2, targets="dense$", layouts=((".*", "bio"),))
    trainable = check(model.apply, params, method, x)
    assert trainable["dense/kernel"]["a"].shape == (3, 6, 2)


def test_factors_shared_by_scanned_layers():
    w = jax.random.normal(jax.random.key(0), (3, 5, 5))
    a, b = (
        jax.random.normal(jax.random.key(1), (5, 2)),
        jax.random.normal(jax.random.key(2), (2, 5)),
    )
    x = jax.random.normal(jax.random.key(3), (4, 5))

    def f(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    scales = jnp.array([0.5, 1.0, 0.0])
    leaf = lj.LowRank(w, a, b, jnp.asarray(0.5), path="w")
    np.testing.assert_allclose(lj.adapt(f)(leaf, x), f(w + 0.5 * (a @ b)[None], x), atol=1e-5)
    stacked = lj.LowRank(w, jnp.stack([a] * 3), jnp.stack([b] * 3), scales, path="w")
    dense = w + scales[:, None, None] * (a @ b)[None]
    np.testing.assert_allclose(lj.adapt(f)(stacked, x), f(dense, x), atol=1e-5)


def test_bfloat16_dense_keeps_factors_float32():
    model = nn.Dense(5, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(2), (4, 6))
    params = model.init(jax.random.key(0), x)["params"]
    method = lj.LoRA(rank=2, targets="kernel$")
    trainable = randomized(method.init(jax.random.key(0), params))
    y = lj.adapt(model.apply)(method.combine(params, trainable), x)
    want = model.apply({"params": method.merge(params, trainable)}, x)
    assert y.dtype == jnp.bfloat16 and trainable["kernel"]["a"].dtype == jnp.float32
    np.testing.assert_allclose(y.astype("f4"), want.astype("f4"), atol=0.1, rtol=0.05)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(7, (3, 3), strides=2)(x))
        return nn.Dense(4)(nn.relu(nn.Conv(5, (2, 3), padding="VALID")(x)).mean((1, 2)))


def test_convolutional_net():
    model = ConvNet()
    x = jax.random.normal(jax.random.key(2), (2, 8, 9, 3))
    params = model.init(jax.random.key(0), x)["params"]
    check(model.apply, params, lj.LoRA(rank=2, targets=r"(Conv|Dense)_\d$"), x)


def test_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 6, rngs=rngs)
            self.linear = nnx.Linear(6, 5, rngs=rngs)

        def __call__(self, tokens):
            return self.linear(jnp.tanh(self.embed(tokens)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    apply = lambda state, tokens: nnx.merge(graph, state)(tokens)  # noqa: E731
    tokens = jnp.array([[1, 2, 10]])
    method = lj.LoRA(rank=2, targets=(r"linear$", r"embed$"))
    check(apply, state, method, tokens, wrap=lambda p: p)


@jax.custom_vjp
def doubled_gradient(x):
    return x


doubled_gradient.defvjp(lambda x: (x, None), lambda _, g: (2.0 * g,))


def test_custom_vjp_keeps_its_gradient():
    params = {"w": jax.random.normal(jax.random.key(0), (6, 5))}
    x = jax.random.normal(jax.random.key(1), (3, 6))
    method = lj.LoRA(rank=2, targets="w$")
    check(lambda p, x: doubled_gradient(x @ p["w"]), params, method, x, wrap=lambda p: p)


def test_shard_map_inside_the_model():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("x")
    inner = jax.shard_map(jnp.sin, mesh=mesh, in_specs=spec, out_specs=spec)
    params = {"w": jax.random.normal(jax.random.key(0), (6, 5))}
    x = jax.random.normal(jax.random.key(1), (4, 6))
    method = lj.LoRA(rank=2, targets="w$")
    check(lambda p, x: inner(x @ p["w"]), params, method, x, wrap=lambda p: p)


def test_batched_transposed_reshaped_and_indexed_kernels():
    params = {"experts": jax.random.normal(jax.random.key(0), (3, 4, 6))}
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))

    def f(p, x):
        w = p["experts"]
        y = jnp.einsum("bei,eio->beo", x, w)  # batched
        every = jnp.einsum("bi,eio->beo", x[:, 0], w)  # experts free
        back = jnp.einsum("beo,eio->bei", y, w)  # transposed use
        split = jnp.einsum("bei,einh->benh", x, w.reshape(3, 4, 2, 3)).reshape(2, 3, 6)
        turned = x[:, 1] @ w.transpose(0, 2, 1)[1].T
        return jnp.concatenate([y + every + split + turned[:, None], back], -1)

    method = lj.LoRA(rank=2, targets="experts", layouts=((".*", "bio"),))
    check(f, params, method, x, wrap=lambda p: p)


def test_cond_and_while_carry_a_weight():
    params = {"w": jax.random.normal(jax.random.key(0), (5, 5)) * 0.3}
    x = jax.random.normal(jax.random.key(1), (3, 5))

    def f(p, x):
        x = jax.lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: -(x @ w), p["w"])
        return jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), c[2]), (0, x, p["w"])
        )[1]

    method = lj.LoRA(rank=2, targets="w$")
    trainable = randomized(method.init(jax.random.key(0), params))
    ours = lj.adapt(f)(method.combine(params, trainable)["params"], x)
    np.testing.assert_allclose(ours, f(method.merge(params, trainable), x), atol=1e-5)


def test_vmap_over_members_shares_the_base():
    params = {"w": jax.random.normal(jax.random.key(0), (6, 5))}
    x = jax.random.normal(jax.random.key(1), (3, 6))
    method = lj.LoRA(rank=2, targets="w$")
    members = [randomized(method.init(jax.random.key(i), params), 0.1 * i) for i in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
    f = lj.adapt(lambda p, x: jnp.tanh(x @ p["w"]))
    packed = jax.vmap(lambda t: f(method.combine(params, t)["params"], x))(stacked)
    for i, member in enumerate(members):
        alone = f(method.combine(params, member)["params"], x)
        np.testing.assert_allclose(packed[i], alone, atol=1e-6)


def test_error_names_operation_path_and_line():
    leaf = lj.LowRank(
        jnp.ones((4, 5)), jnp.ones((4, 2)), jnp.ones((2, 5)), jnp.ones(()), path="a/w"
    )
    with pytest.raises(lj.UserError, match=r"sin\(\(4, 5\)\) on 'a/w'.*test_adapt\.py:\d+"):
        lj.adapt(lambda w: jnp.sin(w))(leaf)
    with pytest.raises(lj.UserError, match="add"):
        lj.adapt(lambda w, x: w + x)(leaf, jnp.ones((4, 5)))


def test_dropout_scales_and_needs_its_key():
    params = {"w": jnp.zeros((1000, 1))}
    method = lj.LoRA(rank=1, alpha=1.0, targets="w$", dropout=0.25)
    trainable = {"w": {"a": jnp.ones((1000, 1)), "b": jnp.ones((1, 1))}}
    f = lj.adapt(lambda p, x: x @ p["w"])
    x = jnp.ones((64, 1000))
    plain = f(method.combine(params, trainable)["params"], x)
    np.testing.assert_allclose(plain, 1000.0)
    one, two = (
        f(method.combine(params, trainable, key=jax.random.key(k))["params"], x) for k in (0, 1)
    )
    assert not np.allclose(one, two)
    np.testing.assert_allclose(one.mean(), 1000.0, rtol=0.01)
    np.testing.assert_allclose(one.std(), np.sqrt(1000 * 0.25 / 0.75), rtol=0.3)


def test_frozen_weights_take_no_part_in_the_backward_pass():
    w = jnp.ones((64, 48))
    params, x = {"w": w}, jnp.ones((32, 64))
    method = lj.LoRA(rank=2, targets="w$")
    f = lj.adapt(lambda p, x: x @ p["w"])
    grad = jax.grad(lambda t: f(method.combine(params, t)["params"], x).sum())
    jaxpr = str(jax.make_jaxpr(grad)(method.init(jax.random.key(0), params)))
    assert "64,48" not in jaxpr.split("dot_general", 2)[-1].split("dot_general", 1)[-1]
    assert set(partition.flatten(params)) == {"w"}
