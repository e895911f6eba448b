"""The update of every kind of method, against merged minus base, and what the frames say of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import lora_jax as lj
from lora_jax import analysis, inside, methods, partition
from lora_jax.errors import UserError
from lora_jax.inside import of_method
from lora_jax.inside.places import located

L, D, H, V = 3, 6, 10, 8
BOTH = r"attention/(query|value)$"


def toy(seed=1):
    rng = np.random.default_rng(seed)

    def random(*shape):
        return jnp.asarray(rng.normal(0, 1.5 / shape[-2] ** 0.5, shape), jnp.float32)

    return {
        "embed": {"embedding": random(V, D)},
        f"layers[0:{L}]": {
            "attention": {n: {"kernel": random(L, D, D)} for n in ("query", "value")},
            "mlp": {"up": {"kernel": random(L, D, H)}, "down": {"kernel": random(L, H, D)}},
        },
        "head": {"kernel": random(D, V), "bias": jnp.zeros(V)},
    }


def moved(tree, seed=2, size=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(size * rng.normal(size=x.shape), x.dtype), tree)


def trained(method, params, seed=2):
    return moved(method.init(jax.random.key(0), params), seed)


def by_layer(params):
    """Every matrix of a tree by the path that its update has."""
    found = {}
    for path, leaf in partition.flatten(params).items():
        layers = np.asarray(leaf) if partition.stack_of(path) else [np.asarray(leaf)]
        for ours, w in zip(partition.expand(path), layers, strict=True):
            found[partition.module(ours)] = w
    return found


def method(name, **fields):
    return methods.METHODS[name](**{"rank": 2, "alpha": 3.0, "targets": (BOTH, "mlp/"), **fields})


LOW_RANK = {
    "lora": method("lora"),
    "rslora, unequal ranks": method(
        "lora", rank=((r"layers/1/", 3), (r"query", 0), (".*", 1)), scaling="rslora"
    ),
    "embedding and head": method("lora", targets=("embed", "head")),
    "lora_xs": method("lora_xs"),
    "pissa": method("pissa"),
    "adalora": method("adalora", rank=3, target_rank=1, total_steps=10),
    "loha": method("loha"),
    "vera": methods.METHODS["vera"](rank=4, targets=BOTH),
}
DENSE = {
    "dora": method("dora"),
    "lokr": method("lokr", rank=1),
    "relora": method("relora", every=2, warmup=1),
    "ia3": methods.METHODS["ia3"](targets=("value$", "mlp/down$")),
    "full": methods.METHODS["full"](train=("kernel$",)),
}


def check(found, method, params, trainable):
    before, after = by_layer(params), by_layer(method.merge(params, trainable))
    changed = {p for p in before if before[p].ndim == 2 and not np.array_equal(before[p], after[p])}
    assert {x.path for x in found} == changed
    for x in found:
        delta = after[x.path] - before[x.path]
        np.testing.assert_allclose(x.weight(), before[x.path], atol=0)
        svd = x.svd()
        np.testing.assert_allclose((svd.u * svd.s) @ svd.vt, delta, atol=2e-6)
        dense = np.linalg.svd(delta, compute_uv=False)
        np.testing.assert_allclose(svd.s, dense[: len(svd.s)], atol=2e-6)
        np.testing.assert_allclose(x.tuned(x.weight()), after[x.path], atol=2e-6)
        np.testing.assert_allclose(x.singular_values(), svd.s, atol=1e-6)


@pytest.mark.parametrize("name", LOW_RANK)
def test_factors_of_low_rank_methods_are_merged_minus_base(name):
    params, chosen = toy(), LOW_RANK[name]
    trainable = trained(chosen, params)
    if name == "rslora, unequal ranks":
        stray = {x.path for x in inside.updates(chosen, trainable, params)}
        assert "layers/0/attention/query" not in stray  # whatever its padding holds
        start = chosen.init(jax.random.key(0), params)
        for path, ab in trained(chosen, params).items():  # as training leaves it: padding is zero
            live = jnp.any(start[path]["a"] != 0, axis=1)
            a, b = ab["a"] * live[:, None, :], ab["b"] * live[:, :, None]
            trainable[path] = {"a": a, "b": b}
    if name == "adalora":  # a pruned direction is no part of the update
        path = f"layers[0:{L}]/attention/query/kernel"
        trainable[path]["e"] = trainable[path]["e"].at[1, 0].set(0.0)
    found = inside.updates(chosen, trainable, params)
    assert all(x.factors is not None for x in found)
    check(found, chosen, params, trainable)
    if name == "adalora":
        ranks = {x.path: x.rank for x in found}
        assert ranks["layers/1/attention/query"] == 2 and ranks["layers/0/attention/query"] == 3
    if name == "rslora, unequal ranks":  # padding is no rank; rank 0 is no row
        ranks = {x.path: x.rank for x in found}
        assert ranks["layers/1/attention/query"] == 3 and ranks["layers/0/mlp/up"] == 1
        assert "layers/0/attention/query" not in ranks


@pytest.mark.parametrize("name", DENSE)
def test_other_methods_are_whole_differences_and_only_on_request(name):
    params, chosen = toy(), DENSE[name]
    trainable = trained(chosen, params)
    with pytest.raises(UserError, match="--dense"):
        inside.updates(chosen, trainable, params)
    check(inside.updates(chosen, trainable, params, dense=True), chosen, params, trainable)


def test_layers_that_are_not_adapted_are_no_rows():
    params, dora = toy(), method("dora", targets="layers/1/attention/query")
    path = f"layers[0:{L}]/attention/query/kernel"
    trainable = dora.init(jax.random.key(0), params)
    trainable[path]["b"] = trainable[path]["b"].at[1].add(0.5)
    found = inside.updates(dora, trainable, params, dense=True)
    assert [x.path for x in found] == ["layers/1/attention/query"]


def test_experts_and_kernels_of_many_axes():
    params = {"l[0:2]": {"moe": {"kernel": jnp.ones((2, 3, 4, 5))},
                         "out": {"kernel": jnp.ones((2, 2, 3, 4))}}}  # fmt: skip
    chosen = lj.LoRA(rank=2, alpha=2.0, targets=("moe", "out"),
                     layouts=(("moe", "bbio"), ("out", "biio")))  # fmt: skip
    trainable = trained(chosen, params)
    found = {x.path: x for x in inside.updates(chosen, trainable, params)}
    assert len(found) == 2 * 3 + 2 and found["l/1/moe[2]"].layer == 1
    after = chosen.merge(params, trainable)["l[0:2]"]
    svd = found["l/1/moe[2]"].svd()
    expected = np.asarray(after["moe"]["kernel"][1, 2]) - 1
    np.testing.assert_allclose((svd.u * svd.s) @ svd.vt, expected, atol=1e-6)
    svd = found["l/0/out"].svd()
    expected = np.asarray(after["out"]["kernel"][0]).reshape(6, 4) - 1
    np.testing.assert_allclose((svd.u * svd.s) @ svd.vt, expected, atol=1e-6)


def test_whole_differences_have_the_layout_of_the_method_or_the_one_told():
    rng = np.random.default_rng(0)
    params = {"attention": {"query": {"kernel": jnp.asarray(rng.normal(size=(6, 2, 3)), "f")}},
              "head": {"kernel": jnp.ones((6, 4))}}  # fmt: skip
    dora = method("dora", targets="query", train=("^head/",), layouts=((".*", "ioo"),))
    trainable = trained(dora, params)
    found = {x.path: x for x in inside.updates(dora, trainable, params, dense=True)}
    assert found["head"].shape == (6, 4)  # trained whole, so none of those the rule is for
    x = found["attention/query"]
    after = dora.merge(params, trainable)["attention"]["query"]["kernel"]
    delta = np.asarray(after - params["attention"]["query"]["kernel"]).reshape(6, 6)
    np.testing.assert_allclose(x.difference(), delta, atol=1e-6)
    s = np.linalg.svd(delta, compute_uv=False)
    np.testing.assert_allclose(x.singular_values(), s, atol=1e-5)

    experts = {"l[0:2]": {"moe": {"kernel": jnp.ones((2, 3, 4, 5))}}}
    full = lj.FullFineTuning()
    moved_all = trained(full, experts)

    def frame(*layouts):
        return inside.adapter(full, moved_all, experts, dense=True, layouts=layouts)

    assert frame()[["d_in", "d_out"]].values.tolist() == [[12, 5]] * 2
    told = frame(("moe", "bbio"))
    assert told[["d_in", "d_out"]].values.tolist() == [[4, 5]] * 6
    one = np.asarray(moved_all["l[0:2]/moe/kernel"])[1, 2] - 1
    at = told.set_index("path").loc["l/1/moe[2]"]
    np.testing.assert_allclose(at["norm"], np.linalg.norm(one), rtol=1e-5)
    for rule, said in (
        (("moe", "iiio"), "begin with b"),
        (("moe", "bio"), "say which axes"),
        (("mow", "bbio"), "layouts: the pattern 'mow' matches nothing"),
    ):
        with pytest.raises(UserError, match=said):
            frame(rule)


def test_no_difference_is_taken_of_modules_that_were_not_asked_for(monkeypatch):
    params, full = toy(), methods.METHODS["full"](train=("kernel$",))
    trainable, seen = trained(full, params), []
    every = inside.updates(full, trainable, params, dense=True)

    def densify(x):
        seen.append(x.shape)
        return x

    monkeypatch.setattr(of_method, "densify", densify)
    found = inside.updates(full, trainable, params, dense=True, modules="mlp/up")
    assert set(seen) == {(L, D, H)}
    places = [(x.path, x.layer, x.module) for x in every if "mlp/up" in x.path]
    assert [(x.path, x.layer, x.module) for x in found] == places
    up = f"layers[0:{L}]/mlp/up/kernel"
    unmoved = {**trainable, up: jnp.copy(partition.flatten(params)[up])}
    with pytest.raises(UserError, match="changed no matrix of the model that modules='mlp/up'"):
        inside.updates(full, unmoved, params, dense=True, modules="mlp/up")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_differences_over_a_quantised_base_are_not_rounded_to_its_dtype(kind):
    """A gain of 1.001 is less than bfloat16 tells from 1."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy())
    params = lj.quantize(params, ((BOTH, kind),))
    ia3 = methods.METHODS["ia3"](targets="value$")
    trainable = jax.tree.map(lambda x: 1.001 * x, ia3.init(jax.random.key(0), params))
    found = inside.updates(ia3, trainable, params, dense=True)
    assert len(found) == L
    for x in found:
        np.testing.assert_allclose(x.difference(), 0.001 * x.weight(), rtol=1e-2, atol=1e-6)
    dora = method("dora", targets=BOTH)  # its norms are those of the base that it was trained on
    with pytest.raises(UserError, match="changed no matrix"):
        inside.updates(dora, dora.init(jax.random.key(0), params), params, dense=True)


def test_what_cannot_be_seen_says_so(caplog):
    params = toy()
    lora = method("lora", train=("^head/",))
    found = inside.updates(lora, trained(lora, params), params)
    assert not any(x.module == "head" for x in found) and "head/kernel" in caplog.text
    found = inside.updates(lora, trained(lora, params), params, dense=True)
    assert any(x.module == "head" for x in found)
    with pytest.raises(UserError, match="changed no matrix"):
        inside.updates(lj.FullFineTuning(train=("bias",)), {"head/bias": jnp.ones(V)}, params)
    with pytest.raises(UserError, match="lacks 'head/bias'"):
        inside.updates(lora, trained(lora, params), lora.frozen(params))
    with pytest.raises(UserError, match="did you mean layers/./attention/query"):
        inside.updates(lora, trained(lora, params), params, modules="attention/querry")


def test_a_frame_of_matrices():
    params, lora = toy(), method("lora")
    trainable = trained(lora, params)
    frame = inside.adapter(lora, trainable, params, k=3, modules="query|mlp/up")
    assert list(frame["layer"]) == [0, 1, 2] * 2
    assert list(frame["module"]) == ["attention/query"] * 3 + ["mlp/up"] * 3
    row = frame[frame["path"] == "layers/1/mlp/up"].iloc[0]
    w = by_layer(params)["layers/1/mlp/up"].astype(float)
    delta = by_layer(lora.merge(params, trainable))["layers/1/mlp/up"] - w
    u, s, vt = np.linalg.svd(delta)
    uw, _, vtw = np.linalg.svd(w)
    p = s[:2] / s[:2].sum()
    expected = {
        "rank": 2, "directions": 2, "norm": np.linalg.norm(delta), "spectral_norm": s[0],
        "stable_rank": np.linalg.norm(delta) ** 2 / s[0] ** 2,
        "effective_rank": np.exp(-np.sum(p * np.log(p))), "norm_w": np.linalg.norm(w),
        "w_along_delta": np.linalg.norm(u[:, :2].T @ w @ vt[:2].T),
        "w_along_w": np.linalg.norm(uw[:, :2].T @ w @ vtw[:2].T),
        "w_along_random": 2 * np.linalg.norm(w) / np.sqrt(D * H),
        "similarity_to_w": np.linalg.norm(uw[:, :2].T @ u[:, :2]) ** 2 / 2,
        "similarity_to_random": 2 / D,
    }  # fmt: skip
    expected["amplification"] = expected["norm"] / expected["w_along_delta"]
    cosines = np.abs(vtw[:D] @ np.linalg.svd(w + delta)[2][:3].T)  # of W's own six directions
    expected["intruders"] = int((cosines.max(0) < 0.5).sum())
    for name, value in expected.items():
        np.testing.assert_allclose(row[name], value, rtol=1e-4, err_msg=name)
    table = inside.layer_map(frame, "norm")
    assert table.shape == (2, 3) and table.loc["mlp/up", 1] == row["norm"]


def test_an_untrained_adapter_has_an_update_of_zero():
    params, lora = toy(), method("lora")
    frame = inside.adapter(lora, lora.init(jax.random.key(0), params), params)
    zero = ["norm", "stable_rank", "effective_rank", "entropy_rank", "rank_90", "intruders"]
    assert (frame[zero] == 0).all().all()
    assert frame[["amplification", "w_along_delta", "similarity_to_w"]].isna().all().all()


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_start_taken_off_again_is_zero(name):
    params, chosen = toy(), method(name)
    start = chosen.init(jax.random.key(0), params)
    found = inside.updates(chosen, start, params)
    assert not any(x.singular_values().any() or x.svd().s.any() for x in found)
    frame = inside.matrices(found)
    zero = ["norm", "stable_rank", "effective_rank", "entropy_rank", "rank_90", "directions"]
    assert (frame[zero] == 0).all().all() and frame["amplification"].isna().all()
    # A change of the start that float32 only just holds is one.
    path = f"layers[0:{L}]/attention/query/kernel"
    a = np.array(start[path]["a"])
    a[:, 0, 0] = np.nextafter(a[:, 0, 0], np.inf)
    changed = inside.updates(chosen, {**start, path: {**start[path], "a": jnp.asarray(a)}}, params)
    assert [x.singular_values()[0] > 0 for x in changed if "query" in x.path] == [True] * L


def test_a_small_update_is_not_zero():
    params, lora = toy(), method("lora")
    start = lora.init(jax.random.key(0), params)
    rng = np.random.default_rng(0)
    small = {
        path: {**ab, "b": jnp.asarray(1e-6 * rng.normal(size=ab["b"].shape), "f")}
        for path, ab in start.items()
    }
    for x in inside.updates(lora, small, params):
        s = np.linalg.svd(x.factors[0].astype(float) @ x.factors[1], compute_uv=False)
        np.testing.assert_allclose(x.singular_values(), s[:2], rtol=1e-6)
        assert x.singular_values()[1] > 0


def test_a_limit_of_directions_cuts_both_sides_of_the_amplification():
    params, full = toy(), methods.METHODS["full"](train=("query/kernel$",))
    found = inside.updates(full, trained(full, params), params, dense=True)
    frame = inside.matrices(found, directions=2)
    for x, row in zip(found, frame.itertuples(), strict=True):
        s = x.singular_values()
        np.testing.assert_allclose(
            row.amplification, np.linalg.norm(s[:2]) / row.w_along_delta, rtol=1e-5
        )
        np.testing.assert_allclose(row.norm, np.linalg.norm(s), rtol=1e-5)
    every = inside.matrices(found)
    expected = every["norm"] / every["w_along_delta"]
    np.testing.assert_allclose(every["amplification"], expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_named(bad):
    params, lora = toy(), method("lora")
    path = f"layers[0:{L}]/mlp/up/kernel"
    trainable = trained(lora, params)
    trainable[path]["b"] = trainable[path]["b"].at[1, 0, 0].set(bad)
    found = inside.updates(lora, trainable, params)
    for look in (inside.matrices, inside.spectra, lambda x: inside.compare(x, x)):
        with pytest.raises(UserError, match="'layers/1/mlp/up' holds NaN or infinity"):
            look(found)
    assert len(inside.matrices(inside.updates(lora, trainable, params, modules="query"))) == L
    full = methods.METHODS["full"](train=("mlp/up/kernel$",))
    whole = {path: params[f"layers[0:{L}]"]["mlp"]["up"]["kernel"].at[2, 0, 0].set(bad)}
    with pytest.raises(UserError, match="'layers/2/mlp/up' holds NaN or infinity"):
        inside.adapter(full, whole, params, dense=True)


def test_a_planted_intruder_stands_in_its_row():
    """ΔW puts a strong direction, spread over W's outputs, in one layer of three."""
    n = 16
    rng = np.random.default_rng(3)
    w = np.stack([np.linalg.qr(rng.normal(size=(n, n)))[0] * np.linspace(2, 1, n) for _ in "123"])
    params = {"l[0:3]": {"k": {"kernel": jnp.asarray(w, jnp.float32)}}}
    lora = lj.LoRA(rank=1, alpha=1.0, targets="k")
    b = np.zeros((3, 1, n))
    b[0, 0, :], b[1, 0, 4] = 20.0 / 4, 20.0  # W's outputs are axes: the first is like none
    a = np.broadcast_to(
        w[:, :, 4:5] / np.linalg.norm(w[:, :, 4:5], axis=1, keepdims=True), (3, n, 1)
    )
    trainable = {"l[0:3]/k/kernel": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}
    frame = inside.adapter(lora, trainable, params, k=1)
    assert list(frame["intruders"]) == [1, 0, 0]
    assert frame["norm"].iloc[2] == 0  # adapted, and not changed


def test_comparing_two_adapters():
    params = toy()
    small, large = method("lora", rank=2), method("lora", rank=4)
    one, four = trained(small, params), trained(large, params, seed=5)
    for path, ab in one.items():  # the small one's A lies in the large one's
        one[path] = {**ab, "a": four[path]["a"][..., :2]}
    mine, theirs = inside.updates(small, one, params), inside.updates(large, four, params)
    frame = inside.compare(mine, theirs)
    np.testing.assert_allclose(frame["a_all"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(frame["in_all"], 1.0, rtol=1e-5)
    assert (frame["b_all"] < 0.999).any()
    np.testing.assert_allclose(frame["a_random"], 4 / np.where(frame["module"] == "mlp/down", H, D))
    x, y = mine[0], theirs[0]
    u, _, vt = np.linalg.svd(x.factors[0] @ x.factors[1])
    other = y.factors[0] @ y.factors[1]
    share = np.linalg.norm(u[:, :2].T @ other @ vt[:2].T) ** 2 / np.linalg.norm(other) ** 2
    np.testing.assert_allclose(frame["captured"][0], share, rtol=1e-4)
    s = np.linalg.svd(other, compute_uv=False)
    np.testing.assert_allclose(frame["best"][0], (s[:2] ** 2).sum() / (s**2).sum(), rtol=1e-4)
    assert (frame["captured"] <= frame["best"] + 1e-9).all()
    same = inside.compare(mine, mine)
    for side in ("a", "b", "in", "out"):
        np.testing.assert_allclose(same[[f"{side}_first", f"{side}_all"]], 1.0, rtol=1e-6)
    np.testing.assert_allclose(same["captured"], 1.0)
    grid = inside.similarity(mine, theirs)
    part = grid[grid["path"] == "layers/2/mlp/down"]
    assert part[["i", "j"]].max().tolist() == [2, 4]
    np.testing.assert_allclose(part[(part["i"] == 2) & (part["j"] == 4)]["phi"], 1.0, rtol=1e-5)


def test_energy_of_full_fine_tuning_that_a_rank_holds():
    params, full = toy(), methods.METHODS["full"](train=("query/kernel$",))
    found = inside.updates(full, trained(full, params), params, dense=True)
    frame = inside.spectra(found)
    part = frame[frame["layer"] == 1]
    s = np.linalg.svd(found[1].difference(), compute_uv=False)
    np.testing.assert_allclose(part["singular_value"], s, rtol=1e-4)
    np.testing.assert_allclose(part["energy"], np.cumsum(s**2) / np.sum(s**2), rtol=1e-4)
    assert list(part["index"]) == list(range(1, D + 1))
    # An adapter made of the change's first two directions captures the best there is.
    svd = [x.svd() for x in found]
    best = {
        "a": jnp.stack([x.u[:, :2] * x.s[:2] for x in svd]),
        "b": jnp.stack([x.vt[:2] for x in svd]),
    }
    lora = lj.LoRA(rank=2, alpha=2.0, targets="query")
    mine = inside.updates(lora, {f"layers[0:{L}]/attention/query/kernel": best}, params)
    frame = inside.compare(mine, found)
    np.testing.assert_allclose(frame["captured"], frame["best"], rtol=1e-5)
    np.testing.assert_allclose(frame["in_first"], 1.0, rtol=1e-5)
    assert "a_all" not in frame  # a difference has no A
    with pytest.raises(UserError, match="take 'in' or 'out'"):
        inside.similarity(mine, found, "a")


def test_similarity_to_the_base():
    """ΔW made of W's own second direction: φ is 0 at (1, 1) and 1 from i = 2 on (Figure 8)."""
    params = toy()
    svd = [
        np.linalg.svd(w)
        for w in np.asarray(params[f"layers[0:{L}]"]["attention"]["query"]["kernel"])
    ]
    a = jnp.stack([u[:, 1:2] for u, _, _ in svd])
    b = jnp.stack([vt[1:2] for _, _, vt in svd])
    lora = lj.LoRA(rank=1, alpha=1.0, targets="query")
    path = f"layers[0:{L}]/attention/query/kernel"
    found = inside.updates(lora, {path: {"a": a, "b": b}}, params)
    for side in ("a", "out"):
        phi = inside.similarity_to_base(found, side).groupby("i")["phi"].mean()
        np.testing.assert_allclose(phi, [0, 1, 1, 1, 1, 1], atol=1e-5)


def test_places():
    assert located(["layers/3/attention/query", "head"]) == [(3, "attention/query"), (None, "head")]
    assert located(["model.layers.0.self_attn.q_proj"]) == [(0, "self_attn.q_proj")]
    assert located(["h_2/attn", "h_10/attn"]) == [(2, "attn"), (10, "attn")]
    two = located(["encoder.block.1.q", "decoder.block.1.q"])  # not the same matrix
    assert [m for _, m in two] == ["encoder.block/q", "decoder.block/q"]


def test_layers_are_integers_also_beside_none():
    params, lora = toy(), method("lora", targets=("embed", "query"))
    frame = inside.spectra(inside.updates(lora, trained(lora, params), params))
    assert frame["layer"].dtype == "Int64" and frame["layer"].isna().sum() == 2
    assert isinstance(frame, pd.DataFrame) and analysis.norm(frame["singular_value"].to_numpy()) > 0
