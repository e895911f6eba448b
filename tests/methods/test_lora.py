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
    frozen = method.dropped(params)
    assert isinstance(frozen["head"]["bias"], partition.Hole)
    full = method.combine(frozen, trainable)["params"]
    np.testing.assert_array_equal(full["head"]["kernel"], params["head"]["kernel"])


def test_some_layers_of_a_stack_must_be_cut_first():
    params = stacked()
    method = lj.FullFineTuning(train=(r"layers/2/",))
    with pytest.raises(lj.UserError, match=r"split_stacks\(params, \{'layers': \[2\]\}\)"):
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
