"""Rules one by one: each use of a low-rank leaf against the same use of the dense sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + 17 * len(shape) + sum(shape)), shape)


def leaf(letters="io", shape=(4, 6), *, shared=False, scale=None, **fields):
    """A leaf of `shape` with the axes `letters` (see `lora.Layout`), rank 2."""
    axes = {k: [i for i, x in enumerate(letters) if x == k] for k in "bio"}
    sizes = {k: [shape[i] for i in axes[k]] for k in "bio"}
    batch = [] if shared else sizes["b"]
    n = len(shape)
    return lj.LowRank(
        random(*shape, seed=1),
        random(*batch, *sizes["i"], 2, seed=2),
        random(*batch, 2, *sizes["o"], seed=3),
        jnp.asarray(0.7 if scale is None else scale, jnp.float32),
        in_axes=tuple(i - n for i in axes["i"]),
        out_axes=tuple(i - n for i in axes["o"]),
        path="layer/kernel",
        **fields,
    )


def same(f, weight, *args):
    ours, dense = lj.adapt(f)(weight, *args), f(weight.dense(), *args)
    ours = lj.densify(ours)  # a view of a weight is a weight
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    assert not np.allclose(
        jax.tree.leaves(dense)[0], jax.tree.leaves(f(lj.densify(weight.w), *args))[0]
    )


def test_dense_is_the_sum():
    weight = leaf()
    want = weight.w + 0.7 * weight.a @ weight.b
    np.testing.assert_allclose(weight.dense(), want, atol=1e-6)
    scales = np.array([0.5, 0.0, 2.0], np.float32)
    weight = leaf("bio", (3, 4, 6), scale=scales)
    want = weight.w + scales[:, None, None] * jnp.einsum("bir,bro->bio", weight.a, weight.b)
    np.testing.assert_allclose(weight.dense(), want, atol=1e-6)
    shared = leaf("bio", (3, 4, 6), shared=True, scale=scales)
    want = shared.w + scales[:, None, None] * (shared.a @ shared.b)[None]
    np.testing.assert_allclose(shared.dense(), want, atol=1e-6)


EINSUMS = [
    ("bti,io->bto", "io", (4, 6)),
    ("io,bti->bto", "io", (4, 6)),
    ("io,bti->otb", "io", (4, 6)),
    ("bto,io->bti", "io", (4, 6)),
    ("btd,dnh->btnh", "ioo", (4, 3, 2)),
    ("btd,dnh->bnth", "ioo", (4, 3, 2)),
    ("btnh,nhd->btd", "iio", (3, 2, 4)),
    ("btnh,dnh->btd", "ioo", (4, 3, 2)),  # Wᵀ
    ("ndh,btd->btnh", "oio", (3, 4, 2)),
    ("bi,eio->beo", "bio", (3, 4, 6)),
    ("bei,eio->beo", "bio", (3, 4, 6)),
    ("bei,eio->ebo", "bio", (3, 4, 6)),
    ("bei,eio->bo", "bio", (3, 4, 6)),  # experts summed
    ("beo,eio->bi", "bio", (3, 4, 6)),
    ("bei,leio->lbeo", "bbio", (2, 3, 4, 6)),
    ("blei,leio->blo", "bbio", (2, 3, 4, 6)),
]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("subscripts", "letters", "shape"), EINSUMS)
def test_einsums(subscripts, letters, shape, shared):
    inputs, _ = subscripts.split("->")
    first, second = inputs.split(",")
    at = 1 if "b" in first else 0
    w_names, x_names = (first, second) if at == 0 else (second, first)
    sizes = dict(zip(w_names, shape, strict=True))
    x = random(*(sizes.get(n, 5) for n in x_names))

    def f(w, x):
        return jnp.einsum(subscripts, *((w, x) if at == 0 else (x, w)))

    same(f, leaf(letters, shape, shared=shared), x)
    n = letters.count("b")
    if n and not shared:
        per_layer = np.arange(1.0, shape[0] + 1).reshape(-1, *[1] * (n - 1))
        same(f, leaf(letters, shape, scale=per_layer), x)
        full = np.arange(1.0, np.prod(shape[:n]) + 1).reshape(shape[:n])
        same(f, leaf(letters, shape, scale=full), x)


VIEWS = {
    "asarray": lambda w, x: jnp.asarray(w) @ x,
    "copy": lambda w, x: jnp.array(w, copy=True) @ x,
    "negative": lambda w, x: (-w) @ x,
    "times": lambda w, x: (w * 3.0) @ x,
    "times, left": lambda w, x: (x[0, 0] * w) @ x,
    "over": lambda w, x: (w / 2.0) @ x,
    "transposed": lambda w, x: x.T @ w.T,
    "columns": lambda w, x: x[:4].T @ w[:, 1:5:2],
    "rows": lambda w, x: w[1:3] @ x,
    "split": lambda w, x: sum(x[:4].T @ part for part in jnp.split(w, 3, axis=1)),
    "split inputs": lambda w, x: [part @ x for part in jnp.split(w, 2, axis=0)],
    "dynamic columns": lambda w, x: x[:4].T @ jax.lax.dynamic_slice(w, (0, x.size // 9), (4, 2)),
    "named jit": lambda w, x: jax.jit(lambda w: jax.jit(jnp.dot)(w, x))(w),
    "barrier": lambda w, x: (lambda both: both[0] @ both[1])(jax.lax.optimization_barrier((w, x))),
    "vmap": lambda w, x: jax.vmap(lambda column: w @ column, 1)(x),
    "stacked": lambda w, x: jnp.einsum("lio,oc->lic", jnp.broadcast_to(w, (3, 4, 6)), x),
    "unit axis": lambda w, x: jnp.squeeze(w[None], 0) @ x,
    "middle axis": lambda w, x: jnp.einsum("iuo,oc->iuc", w[:, None], x),
    "scanned": lambda w, x: jax.lax.scan(
        lambda c, w: (jnp.tanh(w.T @ (w @ c)), None), x, jnp.broadcast_to(w, (3, 4, 6))
    )[0],
    "heads": lambda w, x: jnp.einsum("inh,nhc->ic", w.reshape(4, 2, 3), x.reshape(2, 3, -1)),
    "one head": lambda w, x: jnp.einsum("inh,nhc->ic", w.reshape(4, 1, 6), x[None]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_a_matrix(name):
    same(VIEWS[name], leaf(), random(6, 5))


def test_casts_leave_the_factors_alone():
    weight = leaf()
    for f in (
        lambda w: w.astype(jnp.bfloat16),
        lambda w: jax.lax.reduce_precision(w, 8, 7),
    ):
        view = lj.adapt(f)(weight)
        np.testing.assert_array_equal(view.w, f(weight.w))
        np.testing.assert_array_equal(view.a, weight.a)


STACKED = {
    "layer": lambda w, x: x @ w[1],
    "last": lambda w, x: x @ w[-1],
    "some": lambda w, x: jnp.einsum("bi,lio->lbo", x, w[1:]),
    "traced": lambda w, x: jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ w[i] @ w[i].T), x),
    "swapped": lambda w, x: jnp.einsum("bi,loi->lbo", x, w.transpose(0, 2, 1)),
    "innermost": lambda w, x: jnp.einsum("bi,iol->lbo", x, jnp.moveaxis(w, 0, -1)),
    "parts": lambda w, x: [x @ part[0] for part in jnp.split(w, 3)],
    "columns": lambda w, x: x @ w[2, :, 1:4],
}


@pytest.mark.parametrize("scale", [0.7, np.array([0.5, 1.5, -1.0])], ids=["one", "per layer"])
@pytest.mark.parametrize("name", STACKED)
def test_views_of_a_stack(name, scale):
    same(STACKED[name], leaf("bio", (3, 4, 6), scale=scale), random(5, 4))


@pytest.mark.parametrize("scale", [0.7, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[1.0], [3.0]]])
def test_layers_of_experts(scale):
    weight = leaf("bbio", (2, 3, 4, 6), scale=scale)
    x = random(5, 4)
    same(lambda w, x: x @ w[1, 2], weight, x)
    same(lambda w, x: x @ w[:, 1][0], weight, x)
    same(lambda w, x: jnp.einsum("bi,eio->ebo", x, w[1]), weight, x)
    same(lambda w, x: jnp.einsum("bi,lio->lbo", x, w[:, 2]), weight, x)


@pytest.mark.parametrize("shared", [False, True])
def test_ragged_dot_of_experts(shared):
    weight = leaf("bio", (3, 4, 6), shared=shared, scale=[1.0, 2.0, 3.0])
    sizes = jnp.array([2, 0, 5])
    same(lambda w, x: jax.lax.ragged_dot(x, w, sizes), weight, random(7, 4))


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_rows_of_an_embedding(mode):
    tokens = jnp.array([[0, 3], [99, 1]])
    same(lambda w, t: jnp.take(w, t, axis=0, mode=mode, fill_value=0), leaf(), tokens)


def test_a_lookup_has_no_dropout():
    weight = leaf(key=jax.random.key(3), rate=jnp.asarray(0.5, jnp.float32))
    rows = lj.adapt(lambda w: w[jnp.array([0, 3, 0])])(weight)
    np.testing.assert_allclose(rows, weight.dense()[jnp.array([0, 3, 0])], atol=1e-6)


@jax.custom_jvp
def own_jvp(w, x):
    return x @ w


own_jvp.defjvp(lambda primals, tangents: (own_jvp(*primals), own_jvp(*primals)))


@jax.custom_vjp
def own_vjp(w, x):
    return x @ w


own_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: kept)

IMPOSSIBLE = {
    "derivative of its own": [lambda w, x: own_jvp(w, x), lambda w, x: own_vjp(w, x)],
    r"also takes the weight": [lambda w, x: jnp.concatenate([w, w]), lambda w, x: w.T @ w],
    r"has no rule": [
        lambda w, x: jnp.sum(w),
        lambda w, x: jnp.concatenate([w, x]),
        lambda w, x: jnp.where(x[:4] > 0, w, 0.0),
        lambda w, x: w.at[0].set(0.0),
        lambda w, x: jnp.sort(w),
    ],
    r"a way the LowRank rule cannot do": [
        lambda w, x: w * x[:4, :1],
        lambda w, x: w / x[:4, :1],
        lambda w, x: jnp.take(w, jnp.array([0]), axis=1),
        lambda w, x: w.reshape(3, 8),
        lambda w, x: jnp.einsum("io,io->i", w, x[:4]),
    ],
}
CASES = [(message, f) for message, functions in IMPOSSIBLE.items() for f in functions]


@pytest.mark.parametrize(("message", "f"), CASES)
def test_what_cannot_be_done_says_so(message, f):
    x = random(4, 6) if "also takes" not in message else random(6, 4)
    x = random(5, 4) if "derivative" in message else x
    with pytest.raises(lj.UserError, match=message) as caught:
        lj.adapt(f)(leaf(), x)
    text = str(caught.value)
    assert "layer/kernel" in text and "test_rules.py:" in text and "densify" in text


def test_a_derivative_of_its_own_is_kept_where_no_weight_goes_in():
    f = lambda w, x: own_vjp(x, x @ w)  # noqa: E731
    y = lj.adapt(f)(leaf(), random(6, 4))
    np.testing.assert_allclose(y, f(leaf().dense(), random(6, 4)), atol=1e-5)


def test_two_low_rank_updates_on_one_weight():
    inner = leaf("bio", (3, 4, 6))
    outer = lj.LowRank(inner, random(3, 4, 1), random(3, 1, 6), jnp.asarray(0.4), path="outer")
    for name, f in STACKED.items():
        if name != "traced":  # a recurrence, which amplifies rounding
            same(f, outer, random(5, 4))
    view = lj.adapt(lambda w: w[1])(outer)
    assert isinstance(view.w, lj.LowRank)


def test_dropout_is_on_the_low_rank_input_alone():
    key = jax.random.key(3)
    weight = leaf(key=key, rate=jnp.asarray(0.5, jnp.float32))
    x = random(5, 4)
    ours = lj.adapt(lambda w, x: x @ w)(weight, x)
    keep = jax.random.bernoulli(key, 0.5, x.shape)
    want = x @ weight.w + 0.7 * jnp.where(keep, x / 0.5, 0.0) @ weight.a @ weight.b
    np.testing.assert_allclose(ours, want, atol=1e-5)
    stacked = leaf("bio", (3, 4, 6), key=jax.random.split(key, 3), rate=jnp.asarray(0.5))
    with pytest.raises(lj.UserError, match="outside of the scan"):
        lj.adapt(lambda w, x: jnp.einsum("bi,lio->lbo", x, w))(stacked, x)
    scanned = lj.adapt(lambda w, x: jax.lax.scan(lambda c, w: (c, x @ w), None, w)[1])(stacked, x)
    alone = [lj.adapt(lambda w, x, i=i: x @ w[i])(stacked, x) for i in range(3)]
    np.testing.assert_allclose(scanned, jnp.stack(alone), atol=1e-5)
    assert not np.allclose(alone[0] - x @ stacked.w[0], alone[1] - x @ stacked.w[1])


def test_stop_gradient_stops_the_factors_too():
    weight, x = leaf(), random(5, 4)

    def loss(a, b, stop):
        f = lambda w: jnp.sum(x @ (jax.lax.stop_gradient(w) if stop else w))  # noqa: E731
        view = lj.LowRank(weight.w, a, b, weight.scale, path="w")
        return lj.adapt(f)(view)

    for stop in (True, False):
        grads = jax.grad(loss, (0, 1))(weight.a, weight.b, stop)
        assert all(bool(jnp.any(g != 0)) != stop for g in grads)
