"""Trees that name their matrices themselves: several of them in one module, lists, odd shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import partition
from lora_jax.methods import METHODS

KEY = jax.random.key(0)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def block():
    return {"block0": {"wq": draw(0, 8, 6), "wk": draw(1, 8, 6), "wv": draw(2, 8, 6)}}


TREES = {
    "a module of three": (block(), (("wq$", 2), ("wv$", 4)), "(wq|wv)$"),
    "a list": ({"layers": [draw(0, 8, 6), draw(1, 8, 6)]}, (("0$", 2), ("1$", 3)), "layers"),
    "experts beside a router": (
        {"moe": {"router": draw(0, 8, 3), "wi": draw(1, 8, 6)}}, (("wi$", 3),), "wi$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_settling_keeps_every_matrix_apart(name):
    params, rank, targets = TREES[name]
    method = METHODS["pissa"](rank=rank, alpha=8.0, targets=targets)
    trainable = jax.tree.map(lambda x: x + 0.1, method.init(KEY, params))
    plain, kept = method.settle(params, trainable)
    merged, settled = method.merge(params, trainable), plain.merge(params, kept)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), merged, settled)
    held = sum(np.size(x) for x in jax.tree.leaves(kept))
    assert plain.count(params).total <= held  # what is padding is no parameter
    assert set(plain.ranks(params)) == set(kept)


def test_a_sum_names_only_the_matrices_it_changes():
    params, method = block(), lj.LoRA(rank=2, targets="(wq|wv)$")
    trainable = jax.tree.map(lambda x: x + 0.1, method.init(KEY, params))
    found = lj.combine_adapters(params, [(method, trainable)] * 2, [0.5, 0.5])
    assert set(found.method.ranks(params)) == set(found.trainable) == {"block0/wq", "block0/wv"}
    back = found.method.unmerge(found.method.merge(params, found.trainable), found.trainable)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), back, params)


def test_eva_gives_matrices_of_one_module_ranks_of_their_own():
    table = draw(3, 12, 8) * jnp.asarray([9.0, 5, 1, 1, 1, 1, 1, 1])[None]
    params = {**block(), "embed": {"embedding": table}}

    def apply(variables, tokens):
        w, x = variables["params"]["block0"], variables["params"]["embed"]["embedding"][tokens]
        return (x @ w["wq"]) * (x @ w["wk"]) + jnp.sin(9.0 * x) @ w["wv"]

    seen = [{"tokens": np.arange(24).reshape(3, 8) % 12}]
    chosen = METHODS["eva"](rank=2, rho=3.0, alpha=4.0, targets="(wq|wv)$").prepare(
        lj.adapt(apply), params, seen
    )
    ranks, trainable = chosen.ranks(params), chosen.init(KEY, params)
    assert sum(map(sum, ranks.values())) == 4 and ranks["block0/wq"] != ranks["block0/wv"]
    for path, [r] in ranks.items():
        assert trainable[path]["a"].shape == (8, r) and trainable[path]["b"].shape == (r, 6)
    with pytest.raises(lj.UserError, match="no input goes through 'block0/unused'"):
        params["block0"]["unused"] = draw(4, 8, 6)
        METHODS["eva"](rank=2, targets="(wq|unused)$").prepare(lj.adapt(apply), params, seen)


def test_factors_of_two_ranks_are_refused():
    params, method = block(), lj.LoRA(rank=3, targets="wq$")
    trainable = method.init(KEY, params)
    trainable["block0/wq"]["b"] = jnp.ones((1, 6))  # a product would broadcast it
    with pytest.raises(lj.UserError, match="'block0/wq' are of ranks 3 and 1"):
        method.combine(params, trainable)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "all-linear"}, "where there are no stacks"),
        ({"targets": "w", "alpha": (("wq$", 4.0),)}, "no rule matches 'block0/wk', whose rank is"),
        ({"targets": "wq$", "rank": ("wq$", 4)}, r"rules are pairs"),
        ({"targets": "wq$", "rank": 4.7}, "rank=4.7 must be a whole number"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(options, message):
    with pytest.raises(lj.UserError, match=message):
        lj.LoRA(**options).init(KEY, block())


@pytest.mark.parametrize("name", ["loha", "lokr", "adalora", "vera"])
def test_experts_outside_of_a_stack_are_refused_by_what_knows_only_layers(name):
    params = {"wi": draw(0, 3, 4, 6)}
    layouts = (("wi$", "bio"),)
    with pytest.raises(lj.UserError, match="adapts matrices"):
        METHODS[name](rank=2, targets="wi$", layouts=layouts).init(KEY, params)
    assert lj.LoRA(rank=2, targets="wi$", layouts=layouts).init(KEY, params)["wi"]["a"].ndim == 3


def test_the_advice_of_an_unknown_layout_can_be_followed():
    params = {"layers[0:2]": {"attention": {"query": {"kernel": draw(0, 2, 8, 2, 4)}}}}
    with pytest.raises(lj.UserError, match="say which axes") as told:
        lj.LoRA(rank=2).init(KEY, params)
    layouts = eval(str(told.value).split("layouts=")[1].split("; got")[0])
    found = lj.LoRA(rank=2, targets="query$", layouts=layouts).init(KEY, params)
    assert found["layers[0:2]/attention/query/kernel"]["b"].shape == (2, 2, 2, 4)


def test_a_misspelt_stack_is_not_passed_over():
    params = {"layers[0:2]": {"w": jnp.zeros((2, 3))}}
    with pytest.raises(lj.UserError, match="no stack 'layer'; did you mean layers"):
        partition.split_stacks(params, {"layer": [1]})


def test_ia3_on_the_input_of_a_convolution_has_a_number_a_channel():
    params = {"conv": {"kernel": draw(0, 3, 3, 4, 5)}}
    method = METHODS["ia3"](targets="conv$", feedforward="conv$")
    trainable = method.init(KEY, params)
    assert trainable["conv/kernel"]["l"].shape == (4,)
    trainable = {"conv/kernel": {"l": jnp.arange(1.0, 5.0)}}
    x = draw(1, 2, 6, 6, 4)

    def apply(variables, x):
        kernel = variables["params"]["conv"]["kernel"]
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)

    found = lj.adapt(apply)(method.combine(params, trainable), x)
    expected = apply({"params": params}, x * jnp.arange(1.0, 5.0)[None, None, None])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    merged = apply({"params": method.merge(params, trainable)}, x)
    np.testing.assert_allclose(merged, expected, atol=1e-4)


def test_ia3s_feedforward_is_about_its_targets():
    params = {"mlp": {"up": {"kernel": draw(0, 4, 8)}, "down": {"kernel": draw(1, 8, 4)}}}
    with pytest.raises(lj.UserError, match="'mlp/down/kernel', which is none of the targets"):
        METHODS["ia3"](targets="up$", feedforward="(up|down)$").init(KEY, params)


def test_adaloras_budget_never_rises():
    method = METHODS["adalora"](rank=4, total_steps=10, initial_steps=1, final_steps=2)
    budgets = [int(method.budget(jnp.asarray(t), jnp.asarray(8), jnp.asarray(2))) for t in range(9)]
    assert set(budgets) == {8}


def test_merging_rounds_once():
    with jax.enable_x64(True):
        params = {"wq": jnp.ones((4, 4), jnp.float64) + 1e-12}
        for name in ("lora", "relora", "loha"):
            method = METHODS[name](rank=2, targets="wq$")
            merged = method.merge(params, method.init(KEY, params))
            np.testing.assert_array_equal(merged["wq"], params["wq"])
    params = {"wq": draw(0, 64, 64).astype(jnp.bfloat16)}
    method = METHODS["dora"](rank=2, targets="wq$")
    trainable = jax.tree.map(lambda x: x + 0.05, method.init(KEY, params))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    exact = method.merge(wide, trainable)["wq"].astype(jnp.bfloat16)
    differ = np.mean(np.asarray(method.merge(params, trainable)["wq"] != exact))
    assert differ < 0.01  # of its norms, which are of the rounded weight
