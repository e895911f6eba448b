"""Sums of adapters: the update of the result against the sum of updates, and what PEFT gives."""

from __future__ import annotations

import descendants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from descendants import BOTH, DOWN, KEY, LAYERS, QUERY, VALUE, moved, toy_params

import lora_jax as lj
from lora_jax import methods, partition

WEIGHTS = [0.7, -1.3, 2.0]


def adapters():
    """Three that differ in rank, alpha, scaling and targets."""
    every = [
        lj.LoRA(rank=2, alpha=3.0, targets=(BOTH,)),
        lj.LoRA(rank=((r"layers/1/", 3), (".*", 1)), alpha=5.0, targets=(r"query$", r"mlp/down$"),
                scaling="rslora"),
        lj.LoRA(rank=1, alpha=2.0, targets=(r"layers/[12]/attention/query$",)),
    ]  # fmt: skip
    return [(m, padded(m, moved(m.init(KEY, toy_params()), seed=i))) for i, m in enumerate(every)]


def padded(method, trainable):
    """With zeros beyond each layer's rank, where training leaves them."""
    for path, ranks in method.ranks(toy_params()).items():
        widest = trainable[path]["b"].shape[-2]
        live = np.arange(widest) < np.asarray(ranks)[:, None]
        a, b = trainable[path]["a"] * live[:, None], trainable[path]["b"] * live[..., None]
        trainable = {**trainable, path: {"a": a, "b": b}}
    return trainable


def update(method, trainable, params=None):
    """ΔW by path, float64."""
    params = toy_params() if params is None else params
    old = partition.flatten(params)
    new = partition.flatten(method.combine(params, trainable)["params"])
    return {
        p: np.asarray(x.delta() if isinstance(x, lj.LowRank) else x - old[p], np.float64)
        for p, x in new.items()
        if x is not old[p]
    }


def weighted_sum(some=None, weights=WEIGHTS):
    total = {}
    for (method, trainable), w in zip(some or adapters(), weights, strict=True):
        for path, delta in update(method, trainable).items():
            total[path] = total.get(path, 0.0) + w * delta
    return total


def best(delta, rank):
    """The best approximation of each layer, dense."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def close(got, want, atol=1e-5):
    assert set(got) == set(want)
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=atol, rtol=1e-5)


@pytest.mark.parametrize("how", ["linear", "cat"])
def test_side_by_side_is_the_weighted_sum_of_updates(how):
    method, trainable, energy = lj.combine_adapters(toy_params(), adapters(), WEIGHTS, how)
    close(update(method, trainable), weighted_sum())
    assert method.ranks(toy_params()) == {DOWN: [1, 3, 1], QUERY: [3, 6, 4], VALUE: [2, 2, 2]}
    assert set(energy.values()) == {1.0} and len(energy) == 9
    # An ordinary adapter, which goes on training.
    assert jax.tree.structure(method.init(KEY, toy_params())) == jax.tree.structure(trainable)


def test_svd_is_the_best_approximation_of_the_sum():
    want = weighted_sum()
    for rank in (1, 2, 3):
        method, trainable, energy = lj.combine_adapters(
            toy_params(), adapters(), WEIGHTS, "svd", rank=rank
        )
        close(update(method, trainable), {p: best(x, rank) for p, x in want.items()})
        for path, x in want.items():
            s = np.linalg.svd(x, compute_uv=False) ** 2
            for layer, squares in zip(partition.expand(path), s, strict=True):
                share = squares[:rank].sum() / squares.sum()
                np.testing.assert_allclose(energy[layer], share, rtol=1e-5)
    # By default the largest rank there is; by rules, where they match.
    method, _, _ = lj.combine_adapters(toy_params(), adapters(), WEIGHTS, "svd")
    assert method.ranks(toy_params()) == {DOWN: [1, 3, 1], QUERY: [2, 3, 2], VALUE: [2, 2, 2]}
    method, _, _ = lj.combine_adapters(
        toy_params(), adapters(), WEIGHTS, "svd", rank=((r"layers/2/attention/query", 4),)
    )
    assert method.ranks(toy_params())[QUERY] == [2, 3, 4]


def test_reducing_the_rank_keeps_what_energy_says():
    method, trainable = adapters()[1]
    kept = lj.reduce_rank(method, trainable, toy_params(), 1)
    want = update(method, trainable)
    close(update(kept.method, kept.trainable), {p: best(x, 1) for p, x in want.items()})
    assert kept.energy["layers/0/mlp/down/kernel"] == pytest.approx(1.0)
    assert 0.3 < kept.energy["layers/1/mlp/down/kernel"] < 1.0
    same = lj.reduce_rank(method, trainable, toy_params(), 3)
    close(update(same.method, same.trainable), want)


def test_any_method_whose_update_is_a_product_can_be_added():
    names = ("vera", "loha", "pissa", "adalora")
    some = []
    for i, name in enumerate(names):
        method = descendants.METHODS[name]
        some.append((method, moved(method.init(KEY, toy_params()), seed=i)))
    weights = [1.0, 0.5, -1.0, 2.0]
    method, trainable, _ = lj.combine_adapters(toy_params(), some, weights)
    want = {}
    for (m, t), w in zip(some, weights, strict=True):
        merged = partition.flatten(m.merge(toy_params(), t))
        for path, x in partition.flatten(toy_params()).items():
            want[path] = want.get(path, 0.0) + w * (np.asarray(merged[path], np.float64) - x)
    close(update(method, trainable), {p: x for p, x in want.items() if np.any(x)}, atol=1e-4)


def test_leaves_trained_whole_are_moved_by_the_sum_of_their_moves():
    params = toy_params()
    one = lj.LoRA(rank=2, targets=(BOTH,), train=("^head/",))
    two = lj.FullFineTuning(train=("^head/kernel$", r"layers/.*/mlp/up"))
    some = [(m, moved(m.init(KEY, params), seed=i)) for i, m in enumerate((one, two))]
    method, trainable, _ = lj.combine_adapters(params, some, [0.5, 2.0])
    close(update(method, trainable), weighted_sum(some, [0.5, 2.0]))
    assert set(trainable) == {QUERY, VALUE, "head/kernel", "head/bias", f"{LAYERS}/mlp/up/kernel"}
    assert lj.METHODS["lora"].count(method, params).total > 0


# TIES and DARE.


def ties_by_hand(tau, density):
    """Algorithm 1 of the paper, an entry at a time."""
    kept = np.zeros_like(tau)
    for i, x in enumerate(tau):
        order = np.argsort(-np.abs(x).reshape(-1))[: int(density * x.size)]
        kept[i].reshape(-1)[order] = x.reshape(-1)[order]
    merged = np.zeros_like(tau[0])
    for at in np.ndindex(merged.shape):
        column = kept[(slice(None), *at)]
        agreeing = column[np.sign(column) == np.sign(column.sum())]
        merged[at] = agreeing.mean() if len(agreeing) and column.any() else 0.0
    return merged


def test_ties_trims_elects_signs_and_averages_those_that_agree():
    some = [a for a in adapters() if a[0].scaling == "standard"]
    method, trainable, energy = lj.combine_adapters(
        toy_params(), some, [1.0, 0.8], "ties", rank=6, density=0.5
    )
    one, two = (update(*a)[QUERY] for a in some)
    got = update(method, trainable)[QUERY]
    for layer in (1, 2):
        want = ties_by_hand(np.stack([one[layer], 0.8 * two[layer]]), 0.5)
        np.testing.assert_allclose(got[layer], want, atol=1e-5)
    assert all(e == pytest.approx(1.0) for e in energy.values())  # rank 6 is all there is
    _, _, energy = lj.combine_adapters(toy_params(), some, [1.0, 0.8], "ties", rank=2, density=0.5)
    assert min(energy.values()) < 0.95


def test_dare_drops_entries_and_rescales_the_others():
    some = adapters()[:1]
    delta = update(*some[0])[QUERY]
    draws = []
    for seed in range(60):
        method, trainable, _ = lj.combine_adapters(
            toy_params(), some, [2.0], "dare", rank=6, density=0.25, seed=seed
        )
        draws.append(update(method, trainable)[QUERY])
    ratio = np.stack(draws) / (2.0 * delta)[None]
    dropped = np.abs(ratio) < 1e-2
    np.testing.assert_allclose(ratio[~dropped], 4.0, rtol=2e-2)  # 1 / density
    assert abs(dropped.mean() - 0.75) < 0.01
    assert not np.array_equal(dropped[0], dropped[1])
    again = lj.combine_adapters(toy_params(), some, [2.0], "dare", rank=6, density=0.25, seed=3)
    np.testing.assert_array_equal(update(again.method, again.trainable)[QUERY], draws[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "tise"}, "did you mean ties"),
        ({"weights": [1.0]}, "one weight for each"),
        ({"rank": 2}, "leave out rank"),
        ({"how": "svd", "rank": 0}, "must be at least 1"),
        ({"how": "svd", "rank": (("querry", 2),)}, "matches nothing"),
        ({"how": "ties", "density": 0.0}, "above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    given = {"weights": WEIGHTS, **options}
    with pytest.raises(lj.UserError, match=message):
        lj.combine_adapters(toy_params(), adapters(), **given)


def test_updates_that_are_no_products_are_refused():
    params = toy_params()
    for name in ("dora", "ia3", "relora"):
        method = methods.METHODS[name]()
        with pytest.raises(lj.UserError, match="by more than a product of two factors"):
            lj.combine_adapters(params, [(method, method.init(KEY, params))], [1.0])
    zero = lj.LoRA(rank=2), lj.LoRA(rank=2).init(KEY, params)
    method, trainable, energy = lj.combine_adapters(params, [zero], [1.0], "svd")
    assert all(not np.any(x) for x in update(method, trainable).values())
    assert set(energy.values()) == {1.0}


# PEFT.


def peft_model(ranks, rslora):
    """A PEFT model with one linear layer 8 -> 6 and adapters "0", "1", …; alpha is 4."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(8, 6, bias=False)

    config = [
        peft.LoraConfig(r=r, lora_alpha=4, target_modules=["lin"], use_rslora=rslora,
                        init_lora_weights=False)
        for r in ranks
    ]  # fmt: skip
    model = peft.get_peft_model(Net(), config[0], adapter_name="0")
    for i, c in enumerate(config[1:], 1):
        model.add_adapter(str(i), c)
    return model


def peft_delta(model, name):
    """ΔW as x·ΔW, [in, out]."""
    return model.base_model.model.lin.get_delta_weight(name).detach().numpy().T.astype(np.float64)


def ours_of(model, ranks, rslora):
    """The same adapters and base here."""
    layer = model.base_model.model.lin
    params = {"lin": {"kernel": jnp.asarray(layer.base_layer.weight.detach().numpy().T)}}
    found = []
    for i, rank in enumerate(ranks):
        method = lj.LoRA(
            rank=rank, alpha=4.0, targets="lin$", scaling="rslora" if rslora else "standard"
        )
        a, b = (x[str(i)].weight.detach().numpy().T for x in (layer.lora_A, layer.lora_B))
        found.append((method, {"lin/kernel": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}))
    return params, found


@pytest.mark.parametrize("rslora", [False, True])
def test_against_pefts_add_weighted_adapter(rslora):
    """Where PEFT's result is the weighted sum of updates, and where it is not."""
    ranks, weights = (2, 2), [0.5, 1.5]
    model = peft_model(ranks, rslora)
    params, some = ours_of(model, ranks, rslora)
    theirs = [peft_delta(model, str(i)) for i in range(2)]
    wanted = sum(w * d for w, d in zip(weights, theirs, strict=True))

    def ours(how, **options):
        method, trainable, _ = lj.combine_adapters(params, some, weights, how, **options)
        return update(method, trainable, params)["lin/kernel"]

    def peft_result(how, **options):
        name = f"{how}-{rslora}"
        model.add_weighted_adapter(["0", "1"], weights, name, combination_type=how, **options)
        return peft_delta(model, name)

    np.testing.assert_allclose(ours("linear"), wanted, atol=1e-5)
    np.testing.assert_allclose(ours("svd", rank=2), best(wanted, 2), atol=1e-5)
    # "linear" there: (Σ √(w s) A)(Σ √(w s) B), with products of one adapter's A and another's B.
    scale = 4 / (2**0.5 if rslora else 2)
    crossed = [
        sum((w * scale) ** 0.5 * np.asarray(t["lin/kernel"][x]) for w, (_, t) in
            zip(weights, some, strict=True))
        for x in "ab"
    ]  # fmt: skip
    # The new adapter keeps use_rslora but has alpha = r: its own scale is √r in place of 1.
    off = {how: (r**0.5 if rslora else 1.0) for how, r in (("linear", 2), ("cat", 4), ("svd", 2))}
    np.testing.assert_allclose(
        peft_result("linear"), off["linear"] * crossed[0] @ crossed[1], atol=1e-5
    )
    assert np.abs(peft_result("linear") - wanted).max() > 0.1 * np.abs(wanted).max()
    np.testing.assert_allclose(peft_result("cat"), off["cat"] * wanted, atol=1e-5)
    np.testing.assert_allclose(
        peft_result("svd", svd_rank=2), off["svd"] * best(wanted, 2), atol=1e-5
    )
    # TIES of the dense updates agrees, but for that scale.
    got = ours("ties", rank=6, density=0.5)
    theirs = peft_result("ties_svd", svd_rank=6, density=0.5)
    np.testing.assert_allclose(theirs, (6**0.5 if rslora else 1.0) * got, atol=1e-5)


def test_peft_refuses_unequal_ranks_in_linear():
    model = peft_model((2, 3), False)
    params, some = ours_of(model, (2, 3), False)
    with pytest.raises(ValueError, match="same r value"):
        model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "sum", combination_type="linear")
    method, trainable, _ = lj.combine_adapters(params, some, [1.0, 1.0], "linear")
    wanted = peft_delta(model, "0") + peft_delta(model, "1")
    np.testing.assert_allclose(update(method, trainable, params)["lin/kernel"], wanted, atol=1e-5)
