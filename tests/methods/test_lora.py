import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import partition

KEY = jax.random.key(0)


def stacked(n=3, d=6, out=5):
    shapes = {"query": (n, d, out), "value": (n, d, out)}
    kernels = {k: {"kernel": jax.random.normal(KEY, s)} for k, s in shapes.items()}
    head = {"kernel": jnp.ones((d, 7)), "bias": jnp.zeros(7)}
    return {f"layers[0:{n}]": {"attention": kernels}, "head": head}


def test_smaller_rank_is_the_prefix_of_a_larger_one():
    for start in ("uniform", "gaussian"):
        small, large = (
            lj.LoRA(rank=r, start=start).init(KEY, stacked())["layers[0:3]/attention/query/kernel"][
                "a"
            ]
            for r in (4, 8)
        )
        np.testing.assert_array_equal(small, large[..., :4])
    assert float(jnp.abs(large).max()) > 0


def test_start_does_not_depend_on_how_layers_are_cut():
    params = stacked()
    whole = lj.LoRA().init(KEY, params)["layers[0:3]/attention/value/kernel"]["a"]
    cut = lj.LoRA().init(KEY, partition.split_stacks(params, {"layers": [2]}))
    np.testing.assert_array_equal(cut["layers[2:3]/attention/value/kernel"]["a"], whole[2:])


def test_uniform_bound_and_gaussian_spread():
    params = {"w": jnp.zeros((400, 3))}
    uniform = lj.LoRA(rank=64, targets="w$").init(KEY, params)["w"]["a"]
    assert 0.95 / 20 < float(jnp.abs(uniform).max()) <= 1 / 20
    gaussian = lj.LoRA(rank=64, targets="w$", start="gaussian").init(KEY, params)["w"]["a"]
    np.testing.assert_allclose(gaussian.std(), 1 / 20, rtol=0.05)


def test_unequal_ranks_count_scale_and_pad():
    params = stacked()
    method = lj.LoRA(rank=((r"layers/1/", 2), (".*", 4)), alpha=8.0, targets="query$")
    name = "layers[0:3]/attention/query/kernel"
    assert method.ranks(params) == {name: [4, 2, 4]}
    np.testing.assert_allclose(method.scales(params)[name], [2.0, 4.0, 2.0])
    rslora = lj.LoRA(rank=4, alpha=8.0, targets="query$", scaling="rslora")
    np.testing.assert_allclose(rslora.scales(params)[name], 4.0)
    assert method.count(params).per_target == {"layers/*/attention/query/kernel": 10 * 11}
    trainable = method.init(KEY, params)
    assert not np.any(trainable[name]["a"][1, :, 2:]) and np.any(trainable[name]["a"][0, :, 2:])


def test_padding_stays_zero_under_training():
    params = stacked()
    method = lj.LoRA(rank=((r"layers/1/", 2), (".*", 4)), targets="query$")
    name = "layers[0:3]/attention/query/kernel"
    x = jax.random.normal(KEY, (8, 6))

    def model(p, x):
        return jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ w @ jnp.ones((5, 6))), None),
            x,
            p["layers[0:3]"]["attention"]["query"]["kernel"],
        )[0]

    loss = lambda t: jnp.sum(lj.adapt(model)(method.combine(params, t)["params"], x) ** 2)  # noqa: E731
    trainable = method.init(KEY, params)
    for _ in range(3):
        gradient = jax.grad(loss)(trainable)
        trainable = jax.tree.map(lambda t, g: t - 0.1 * g, trainable, gradient)
    assert np.all(trainable[name]["a"][1, :, 2:] == 0) and np.all(trainable[name]["b"][1, 2:] == 0)
    assert np.any(trainable[name]["b"][1, :2] != 0)


def test_merge_unmerge_within_the_stated_error():
    params = stacked()
    method = lj.LoRA(rank=4, targets="query$")
    trainable = jax.tree.map(lambda x: x + 0.1, method.init(KEY, params))
    merged = method.merge(params, trainable)
    back = method.unmerge(merged, trainable)
    for a, b, c in zip(*map(jax.tree.leaves, (params, merged, back)), strict=True):
        unit = np.finfo(np.float32).eps * np.maximum(np.abs(a), np.abs(b))
        assert np.all(np.abs(a - c) <= unit)
    assert (
        np.abs(
            merged["layers[0:3]"]["attention"]["query"]["kernel"]
            - params["layers[0:3]"]["attention"]["query"]["kernel"]
        ).max()
        > 0.01
    )


def test_leaves_trained_whole_leave_a_hole_and_are_copies():
    params = stacked()
    method = lj.LoRA(targets="query$", train=(r"^head",))
    trainable = method.init(KEY, params)
    assert trainable["head/kernel"] is not params["head"]["kernel"]
    assert (
        trainable["head/kernel"].unsafe_buffer_pointer()
        != params["head"]["kernel"].unsafe_buffer_pointer()
    )
    frozen = method.frozen(params)
    assert isinstance(frozen["head"]["bias"], partition.Hole)
    full = method.combine(frozen, trainable)["params"]
    np.testing.assert_array_equal(full["head"]["kernel"], params["head"]["kernel"])


def test_some_layers_of_a_stack_must_be_cut_first():
    params = stacked()
    method = lj.FullFineTuning(train=(r"layers/2/",))
    with pytest.raises(lj.UserError, match=r"cut it first: params = method.arrange"):
        method.init(KEY, params)
    cut = partition.split_stacks(params, {"layers": [2]})
    assert all("[2:3]" in p for p in method.init(KEY, cut))
    assert method.count(cut).total == 2 * 30


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"targets": r"attention/qery$"}, "did you mean layers/0/attention/query"),
        ({"targets": r"head/bias$"}, "at least two axes"),
        ({"scaling": "other"}, "scaling must be"),
        ({"dropout": 1.0}, "dropout"),
        ({"rank": ((r"nothing", 2), (".*", 4))}, "matches nothing"),
        ({"train": (r"hed$",)}, "did you mean head"),
    ],
)
def test_bad_settings_say_what_to_do(kwargs, message):
    with pytest.raises(lj.UserError, match=message):
        lj.LoRA(**kwargs).init(KEY, stacked())


def test_axes_that_are_not_evident_must_be_told():
    with pytest.raises(lj.UserError, match="layouts"):
        lj.LoRA(targets="w$").init(KEY, {"w": jnp.ones((2, 3, 4))})


def test_alpha_rules_are_per_layer():
    method = lj.LoRA(rank=4, alpha=((r"layers/1/", 2.0), (".*", 8.0)), targets="query$")
    name = "layers[0:3]/attention/query/kernel"
    np.testing.assert_allclose(method.scales(stacked())[name], [2.0, 0.5, 2.0])
    trainable = jax.tree.map(jnp.ones_like, method.init(KEY, stacked()))
    merged = partition.flatten(method.merge(stacked(), trainable))[name]
    delta = merged - partition.flatten(stacked())[name]
    np.testing.assert_allclose(delta[:, 0, 0], [8.0, 2.0, 8.0], rtol=1e-5)


def test_embeddings_start_the_other_way_round():
    params = {"embed": {"embedding": jnp.ones((50, 400))}}
    start = lj.LoRA(rank=8, targets="embed$").init(KEY, params)["embed/embedding"]
    assert not np.any(start["a"]) and start["a"].shape == (50, 8)
    np.testing.assert_allclose(start["b"].std(), 1.0, rtol=0.05)


def test_init_scale_multiplies_the_start():
    one, two = (
        lj.LoRA(init_scale=s).init(KEY, stacked())["layers[0:3]/attention/query/kernel"]
        for s in (1.0, 2.5)
    )
    np.testing.assert_allclose(two["a"], 2.5 * one["a"], rtol=1e-6)
    assert not np.any(two["b"])


def test_all_linear_is_every_matrix_of_a_stack_and_nothing_else():
    found = lj.LoRA(targets="all-linear").ranks(stacked())
    assert set(found) == {f"layers[0:3]/attention/{n}/kernel" for n in ("query", "value")}


def test_a_leaf_trained_whole_has_no_factors():
    method = lj.LoRA(targets=(r"query$", r"head$"), train=(r"^head/kernel",))
    trainable = method.init(KEY, stacked())
    assert trainable["head/kernel"].shape == (6, 7)
    assert method.count(stacked()).total == 8 * 11 * 3 + 42


def test_dropout_is_off_without_a_key_and_differs_by_layer():
    method = lj.LoRA(targets="query$", dropout=0.5)
    name = "layers[0:3]/attention/query/kernel"
    params = stacked()
    trainable = method.init(KEY, params)
    off = partition.flatten(method.combine(params, trainable)["params"])[name]
    assert off.key is None
    on = partition.flatten(method.combine(params, trainable, key=KEY)["params"])[name]
    assert len({tuple(k) for k in jax.random.key_data(on.key).tolist()}) == 3
    # A layer's mask does not depend on how the stack is cut.
    cut = partition.split_stacks(params, {"layers": [2]})
    part = method.combine(cut, method.init(KEY, cut), key=KEY)["params"]
    last = partition.flatten(part)["layers[2:3]/attention/query/kernel"].key
    np.testing.assert_array_equal(jax.random.key_data(last)[0], jax.random.key_data(on.key)[2])


def test_layers_of_experts_have_a_scale_per_layer():
    params = {"layers[0:2]": {"experts": jnp.ones((2, 3, 4, 5))}}
    method = lj.LoRA(
        rank=((r"layers/0/", 1), (".*", 2)), alpha=2.0, targets="experts$",
        layouts=((".*", "bbio"),), dropout=0.5,
    )  # fmt: skip
    trainable = jax.tree.map(lambda x: x + 1.0, method.init(KEY, params))
    assert method.count(params).total == (1 + 2) * 3 * (4 + 5)
    factors = trainable["layers[0:2]/experts"]
    want = jnp.einsum("leir,lero->leio", factors["a"], factors["b"])
    want = 1.0 + jnp.array([2.0, 1.0]).reshape(2, 1, 1, 1) * want
    merged = method.merge(params, trainable)["layers[0:2]"]["experts"]
    np.testing.assert_allclose(merged, want, rtol=1e-5)
    x = jax.random.normal(KEY, (7, 4))

    def f(p, x):
        def layer(c, w):
            return c, jnp.einsum("bi,eio->ebo", x, w)

        return jax.lax.scan(layer, None, p["layers[0:2]"]["experts"])[1]

    adapted = lj.adapt(f)
    plain = adapted(method.combine(params, trainable)["params"], x)
    np.testing.assert_allclose(plain, jnp.einsum("bi,leio->lebo", x, want), rtol=1e-4, atol=1e-4)
    dropped = adapted(method.combine(params, trainable, key=KEY)["params"], x)
    assert not np.allclose(dropped, plain)
