"""Each descendant by its paper: the published equation, count, schedule or start."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import site_models
from descendants import (
    BOTH,
    DOWN,
    KEY,
    METHODS,
    QUERY,
    VALUE,
    L,
    batch,
    logits,
    moved,
    prepared,
    toy,
    toy_loss,
    toy_params,
)  # fmt: skip
from flax import nnx

import lora_jax as lj
from lora_jax import partition
from lora_jax.methods import METHODS as ALL
from lora_jax.methods import data_driven
from lora_jax.training import make_optimizer, step_function
from lora_jax.training.optimizer import OptimizerConfig
from lora_jax.training.step import init_state


def shapes(layers, **kernels):
    """Abstract parameters of a stack."""
    tree = {}
    for name, size in kernels.items():
        module, leaf = name.split("_")
        like = jax.ShapeDtypeStruct((layers, *size), jnp.float32)
        tree.setdefault(module, {})[leaf] = {"kernel": like}
    return {f"layers[0:{layers}]": tree}


def test_counts_of_the_papers():
    d, h = 4096, 11008
    llama = shapes(
        32, attention_query=(d, d), attention_key=(d, d), attention_value=(d, d),
        mlp_up=(d, h), mlp_down=(h, d),
    )  # fmt: skip
    assert lj.LoRA(rank=32, targets="all-linear").count(llama).total == 56_098_816
    assert ALL["dora"](rank=32, targets="all-linear").count(llama).total == 56_975_360
    for name in ("lora_plus", "pissa", "olora", "eva", "lora_ga", "relora"):
        assert ALL[name](rank=32, targets="all-linear").count(llama).total == 56_098_816
    for layers, d, r, total in ((12, 768, 1024, 43_008), (24, 1024, 256, 61_440)):
        roberta = shapes(layers, attention_query=(d, d), attention_value=(d, d))
        assert ALL["vera"](rank=r).count(roberta).total == total
        assert ALL["lora_xs"](rank=25).count(roberta).total == layers * 2 * 25**2
        assert ALL["lora_fa"](rank=8).count(roberta).total == layers * 2 * 8 * d
        assert ALL["loha"](rank=8).count(roberta).total == layers * 2 * 2 * 16 * d
    deberta = shapes(
        12, attention_query=(768, 768), attention_key=(768, 768), attention_value=(768, 768),
        attention_out=(768, 768), mlp_up=(768, 3072), mlp_down=(3072, 768),
    )  # fmt: skip
    for r, total in ((8, 1_327_104), (2, 331_776)):
        assert lj.LoRA(rank=r, targets="all-linear").count(deberta).total == total
        ada = ALL["adalora"](rank=r, targets="all-linear").count(deberta).total
        assert ada == total + 12 * 6 * r  # a singular value a triplet


def run(method, steps, *, lr=0.01, config=None, **changes):
    params = toy_params()
    tx = make_optimizer(
        OptimizerConfig(learning_rate=lr, schedule="constant", **(config or {})), steps
    )
    state = init_state(method, params, tx, **changes)
    step = jax.jit(step_function(toy_loss, method, tx))
    states = [state]
    for i in range(steps):
        states.append(step(params, states[-1], batch(i))[0])
    return states


def test_rates_scale_and_start_are_one_choice_under_adam():
    """(alpha, init, lr_A, lr_B) -> (alpha/(p q), p init, p lr_A, q lr_B): the same function."""
    p, q, lr = 2.0, 4.0, 0.01
    one = ALL["lora_plus"](rank=2, alpha=8.0, lr_ratio=3.0)
    two = dataclasses.replace(one, alpha=8.0 / (p * q), init_scale=p, lr_ratio=3.0 * q / p)
    config = {"eps": 1e-30}
    a = run(one, 3, lr=lr, config=config)[-1].trainable[QUERY]
    b = run(two, 3, lr=p * lr, config=config)[-1].trainable[QUERY]
    np.testing.assert_allclose(b["a"], p * a["a"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(b["b"], q * a["b"], rtol=1e-4, atol=1e-5)


def test_lora_plus_multiplies_the_update_of_b_alone():
    method = ALL["lora_plus"](rank=2, lr_ratio=5.0, targets=(BOTH, "embed$"), train=("^head/",))
    params = toy_params()
    trainable = method.init(KEY, params)
    grads = jax.tree.map(jnp.ones_like, trainable)
    tx = method.wrap_optimizer(optax.sgd(1.0))
    updates, _ = tx.update(grads, tx.init(trainable))
    assert np.all(updates[QUERY]["b"] == -5) and np.all(updates[QUERY]["a"] == -1)
    assert np.all(updates["embed/embedding"]["b"] == -1) and np.all(updates["head/bias"] == -1)


def test_lora_fa_trains_b_alone_from_its_own_seed():
    method, params = METHODS["lora_fa"], toy_params()
    assert set(method.init(KEY, params)[QUERY]) == {"b"}
    drawn = method.projections(params)[QUERY]
    other = dataclasses.replace(method, projection_seed=4).projections(params)[QUERY]
    assert not np.allclose(drawn, other)
    with pytest.raises(lj.UserError, match="embedding"):
        ALL["lora_fa"](targets="embed$").init(KEY, params)


def test_vera_by_its_equation():
    method, params = METHODS["vera"], toy_params()
    trainable = moved(method.init(KEY, params))
    numbers = method.numbers(params)
    a, b = numbers["shared"]["a"], numbers["shared"]["b"]
    assert a.shape == (10, 4) and b.shape == (4, 10)
    delta = (
        partition.flatten(method.merge(params, trainable))[DOWN] - partition.flatten(params)[DOWN]
    )
    d, g = trainable[DOWN]["d"][1], trainable[DOWN]["b"][1]
    np.testing.assert_allclose(delta[1], a[:10] @ jnp.diag(d) @ b[:, :6] @ jnp.diag(g), atol=1e-5)
    with pytest.raises(lj.UserError, match="one rank"):
        ALL["vera"](rank=((r"query", 2), (".*", 3))).init(KEY, params)


def test_pissa_and_olora_start_from_decompositions():
    params = toy_params()
    w = np.asarray(partition.flatten(params)[QUERY])
    pissa = METHODS["pissa"].starts(params)[QUERY]
    s = 1.5  # alpha / rank
    for layer in range(L):
        u, sigma, vt = np.linalg.svd(w[layer])
        best = (u[:, :2] * sigma[:2]) @ vt[:2]
        np.testing.assert_allclose(s * pissa["a"][layer] @ pissa["b"][layer], best, atol=1e-5)
        np.testing.assert_allclose(
            np.linalg.norm(pissa["a"][layer], axis=0), np.sqrt(sigma[:2] / s), rtol=1e-4
        )
        q, r = np.linalg.qr(w[layer].T)
        olora = METHODS["olora"].starts(params)[QUERY]
        product = olora["a"][layer] @ olora["b"][layer]
        np.testing.assert_allclose(product, (q[:, :2] @ r[:2]).T, atol=1e-5)
        rows = olora["b"][layer]
        np.testing.assert_allclose(rows @ rows.T, np.eye(2), atol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "olora", "lora_ga"])
def test_export_as_plain_lora_is_exact(name):
    method, params = prepared(name), toy_params()
    trainable = moved(method.init(KEY, params))
    lora, tree = method.to_lora(params, trainable)
    assert type(lora) is lj.LoRA
    assert lora.ranks(params) == {p: [4] * L for p in method.ranks(params)}
    want = logits(method.combine(params, trainable))
    np.testing.assert_allclose(logits(lora.combine(params, tree)), want, rtol=1e-5, atol=1e-5)


def test_lora_xs_by_its_equation():
    method, params = METHODS["lora_xs"], toy_params()
    trainable = moved(method.init(KEY, params))
    w = np.asarray(partition.flatten(params)[VALUE])
    frozen = method.projections(params)[VALUE]
    best = np.linalg.svd(w[2])
    np.testing.assert_allclose(
        frozen["a"][2] @ frozen["b"][2], (best[0][:, :2] * best[1][:2]) @ best[2][:2], atol=1e-5
    )
    merged = partition.flatten(method.merge(params, trainable))[VALUE]
    want = 1.5 * frozen["a"][2] @ trainable[VALUE]["r"][2] @ frozen["b"][2]
    np.testing.assert_allclose(merged[2] - w[2], want, atol=1e-5)


def test_eva_takes_the_principal_directions_of_the_inputs():
    """Layer 0's query reads the embeddings alone, so its inputs are known here."""
    params, seen = toy_params(), [batch(0), batch(1)]
    method = prepared("eva")
    tokens = np.concatenate([b["tokens"].reshape(-1) for b in seen])
    x = np.asarray(params["embed"]["embedding"])[tokens]
    _, _, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    a = method.init(KEY, params)[QUERY]["a"][0]
    r = method.ranks(params)[QUERY][0]
    assert r and not np.any(a[:, r:])
    np.testing.assert_allclose(np.abs(a[:, :r].T @ vt[:r].T), np.eye(r), atol=1e-3)
    assert sum(map(sum, method.ranks(params).values())) == 2 * 2 * L
    for scale, layers in zip(method.scales(params).values(), method.ranks(params).values()):  # noqa: B905
        np.testing.assert_allclose(scale, np.where(np.asarray(layers) > 0, 1.5, 0), rtol=1e-6)
    uniform = ALL["eva"](rank=2, rho=1.0).prepare(lj.adapt(toy), params, seen)
    assert all(r == 2 for layers in uniform.ranks(params).values() for r in layers)


def test_eva_leaves_alone_what_it_gives_no_rank(monkeypatch):
    """A kernel that gets none in any layer, beside others that all get the same."""

    def of(*variances):
        return np.stack([np.diag([*variances, 1.0])] * L)  # the last entry counts the inputs

    known = {QUERY: of(1, 1, 0, 0, 0, 0), DOWN: of(*[1] * 10)}
    monkeypatch.setattr(ALL["eva"], "_moments", lambda *_: known)
    unprepared = ALL["eva"](rank=1, targets=(r"query$", r"mlp/down$"))
    method = unprepared.prepare(lj.adapt(toy), toy_params(), [batch()])
    assert method.ranks(toy_params()) == {QUERY: [2] * L}
    assert set(method.init(KEY, toy_params())) == {QUERY}


def test_eva_sees_the_one_position_that_a_scoring_head_reads():
    """There the last layer has queries of [CLS] alone, and keys and values of all tokens."""
    model, params = site_models.MODELS["bert"], site_models.params_of("bert")
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2, [0] * 6], np.int32)  # the last row: none at all
    tokens = np.concatenate([site_models.TOKENS, site_models.TOKENS[:1]]).astype(np.int32)
    seen = [{"tokens": tokens, "attention_mask": mask, "labels": np.zeros(3, np.int32)}]
    method = ALL["eva"](rank=2, targets="attention/(query|value)$")
    moments = method._moments(lj.adapt(model.apply), params, seen)
    _, hidden = model.apply({"params": params}, tokens, mask, output_hidden_states=True)
    last = np.asarray(hidden, np.float64)[-2]  # what the last layer reads, [B, T, D]
    for name, inputs in {"query": last[:2, 0], "value": last[mask > 0]}.items():
        x = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
        found = moments[f"layers[1:2]/attention/{name}/kernel"][0]
        np.testing.assert_allclose(found, x.T @ x, rtol=1e-4, atol=1e-4)
    assert set(method.prepare(lj.adapt(model.apply), params, seen).ranks(params)) == set(moments)


def test_lora_ga_starts_along_the_gradient():
    method, params = prepared("lora_ga"), toy_params()

    def loss(w, batch):
        return data_driven.loss(lj.adapt(toy), partition.replace(params, {QUERY: w}), batch)

    w = partition.flatten(params)[QUERY]
    g = jax.grad(loss)(w, batch(0)) + jax.grad(loss)(w, batch(1))
    start, c = method.starts(params)[QUERY], 6**0.25 / 4
    for layer in range(L):
        u, _, vt = np.linalg.svd(g[layer])
        np.testing.assert_allclose(np.abs(u[:, :2].T @ start["a"][layer]), c * np.eye(2), atol=1e-3)
        np.testing.assert_allclose(np.abs(start["b"][layer] @ vt[2:4].T), c * np.eye(2), atol=1e-3)
    with pytest.raises(lj.UserError, match="prepare"):
        METHODS["lora_ga"].init(KEY, params)


def allocator(method, start):
    """(a model of a tree of ours, PEFT's RankAllocator on it)."""
    torch = pytest.importorskip("torch")
    layer = pytest.importorskip("peft.tuners.adalora.layer")

    class Fake:
        def __init__(self, tree):
            self.parameters = {}
            for path, value in tree.items():
                for i in range(L):
                    a, b, e = (np.asarray(value[k][i]) for k in "abe")
                    of = {"lora_A": a.T, "lora_B": b.T, "lora_E": e[:, None]}
                    for name, x in of.items():
                        tensor = torch.nn.Parameter(torch.tensor(x.copy()))
                        self.parameters[f"{path}.{i}.{name}.default"] = tensor

        def named_parameters(self):
            return self.parameters.items()

    config = SimpleNamespace(
        beta1=0.85, beta2=0.85, target_r=method.target_rank, tinit=method.initial_steps,
        tfinal=method.final_steps, deltaT=method.every, total_step=method.total_steps,
    )  # fmt: skip
    fake = Fake(start)
    return Fake, layer.RankAllocator(fake, config, "default")


def test_adaloras_budget_is_pefts():
    """The same importance, budget and masks as PEFT's allocator, step by step."""
    method = dataclasses.replace(
        METHODS["adalora"], total_steps=9, initial_steps=1, final_steps=2, every=2
    )
    params = toy_params()
    tree = moved(method.init(KEY, params))
    fake, theirs = allocator(method, tree)
    tx = method.wrap_optimizer(optax.sgd(0.1))
    state = SimpleNamespace(trainable=tree, opt_state=tx.init(tree))
    state.replace = lambda **x: SimpleNamespace(**{**state.__dict__, **x})
    pattern, dropped = None, []
    for t in range(1, 10):
        grads = moved(jax.tree.map(jnp.zeros_like, tree), seed=t)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        new = optax.apply_updates(state.trainable, updates)
        model, of = fake(new), fake(grads)
        for name, x in model.parameters.items():
            x.grad = of.parameters[name].detach()
        last = method.total_steps - method.final_steps
        if t < last:
            pattern = theirs.update_and_allocate(model, t)[1] or pattern
        elif t == last:
            pattern = theirs.update_and_allocate(model, t, force_mask=True)[1]
        else:
            theirs.mask_using_rank_pattern(model, pattern)
        before = SimpleNamespace(trainable=new, opt_state=opt_state)
        before.replace = lambda b=before, **x: SimpleNamespace(**{**b.__dict__, **x})
        state = method.after_update(before)
        for path, value in state.trainable.items():
            for i in range(L):
                want = model.parameters[f"{path}.{i}.lora_E.default"].detach().numpy()[:, 0]
                np.testing.assert_allclose(value["e"][i], want, atol=1e-6)
        dropped.append(int(sum((v["e"] == 0).sum() for v in state.trainable.values())))
    assert dropped[0] == 0 and dropped[-1] == dropped[-2] == 2 * L * 2  # 1 of 3 is left a matrix


def test_adalora_refuses_to_allocate_never():
    with pytest.raises(lj.UserError, match="every=0 and target_rank=8 at least 1"):
        ALL["adalora"](every=0)


def test_adaloras_penalty():
    method, params = METHODS["adalora"], toy_params()
    tree = moved(method.init(KEY, params))
    norms = []
    for value in tree.values():
        for i in range(L):
            a, b = np.asarray(value["a"][i]), np.asarray(value["b"][i])
            norms += [np.linalg.norm(a.T @ a - np.eye(3)), np.linalg.norm(b @ b.T - np.eye(3))]
    np.testing.assert_allclose(method.penalty(tree), 0.5 * np.mean(norms), rtol=1e-5)
    with pytest.raises(lj.UserError, match="total_steps"):
        ALL["adalora"]().wrap_optimizer(optax.sgd(1.0))


def test_relora_merges_without_changing_the_function():
    method, params = METHODS["relora"], toy_params()
    states = run(method, 2, config={"name": "adamw"})
    last = states[-1].trainable
    assert np.any(last[QUERY]["delta"]) and not np.any(last[QUERY]["b"])
    plain = dataclasses.replace(method, every=100, warmup=50)  # the same steps, not merged
    unmerged = run(plain, 2, config={"name": "adamw"})[-1].trainable
    np.testing.assert_allclose(
        logits(method.combine(params, last)), logits(plain.combine(params, unmerged)), atol=1e-5
    )
    assert not np.allclose(last[QUERY]["a"], unmerged[QUERY]["a"])
    moments = [
        x for path, x in jax.tree_util.tree_leaves_with_path(states[-1].opt_state)
        if getattr(path[-1], "key", "") == "b"
    ]  # fmt: skip
    assert moments and all(np.count_nonzero(x) <= L for x in moments)  # one a layer
    sizes = [x.shape for x in jax.tree.leaves(states[-1].opt_state)]
    assert (L, 6, 6) not in sizes  # no moments of what is merged


def test_galore_moves_in_the_gradients_subspace_and_decays_all():
    method = METHODS["galore"]
    w, g = (jax.random.normal(jax.random.key(i), (L, 6, 10)) for i in (1, 2))
    tree = {f"layers[0:{L}]/mlp/up/kernel": w, "head/kernel": jnp.ones((6, 8))}
    grads = {f"layers[0:{L}]/mlp/up/kernel": g, "head/kernel": jnp.ones((6, 8))}
    tx = method.wrap_optimizer(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0)))
    state = tx.init(tree)
    updates, state = tx.update(grads, state, tree)
    name = f"layers[0:{L}]/mlp/up/kernel"
    for i in range(L):
        u, _, _ = np.linalg.svd(g[i])
        p = u[:, :2]
        want = -0.25 * p @ p.T @ g[i] - 0.1 * w[i]
        np.testing.assert_allclose(updates[name][i], want, atol=1e-4)
    np.testing.assert_allclose(updates["head/kernel"], -1.1, rtol=1e-6)
    adam = method.wrap_optimizer(optax.adam(0.1)).init(tree)
    assert {x.shape for x in jax.tree.leaves(adam.inner) if x.ndim == 3} == {(L, 2, 10)}
    kept = state.projections[name]
    _, state = tx.update({**grads, name: 3 * w}, state, tree)  # not yet time for a new one
    np.testing.assert_array_equal(state.projections[name], kept)
    _, state = tx.update({**grads, name: 3 * w}, state, tree)
    assert not np.allclose(state.projections[name], kept)


def test_relora_prunes_each_layer_by_itself():
    """As where layers are tensors of their own: a layer of small moments keeps its largest."""
    method = dataclasses.replace(METHODS["relora"], prune=0.5)
    x = jnp.arange(1.0, 9.0).reshape(2, 4, 1) * jnp.asarray([1.0, 100.0])[:, None, None]
    path = (jax.tree_util.DictKey("layers[0:2]/mlp/up/kernel"), jax.tree_util.DictKey("a"))
    kept = np.asarray(method._pruned(path, x))[..., 0] != 0
    np.testing.assert_array_equal(kept, [[False, False, True, True]] * 2)


def test_relora_restarts_beside_targets_of_rank_0():
    """The trainable tree has no leaf that the rule of rank 0 is of."""
    rules = ((r"query$|query/kernel$", 2), (r"value", 0))
    method = dataclasses.replace(METHODS["relora"], rank=rules, targets=(r"query/", r"value/"))
    last = run(method, 2)[-1].trainable
    assert set(last) == {QUERY} and np.any(last[QUERY]["delta"])


def test_lora_ga_sums_batches_in_float32(monkeypatch):
    """What it decomposes, also where the base's own gradients are bfloat16."""
    cls, summed = ALL["lora_ga"], []
    plain = cls._factors_of

    def noted(self, path, leaf, gradient, ranks):
        summed.append(gradient.dtype)
        return plain(self, path, leaf, gradient, ranks)

    monkeypatch.setattr(cls, "_factors_of", noted)
    METHODS["lora_ga"].prepare(lj.adapt(toy), toy_params(jnp.bfloat16), [batch(0), batch(1)])
    assert summed and set(summed) == {jnp.dtype(jnp.float32)}


def test_ia3_rescales_the_bias_of_an_nnx_module():
    graph, state = nnx.split(nnx.Linear(3, 2, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0)))
    method = ALL["ia3"](targets=("kernel$",), feedforward=())
    trainable, x = moved(method.init(KEY, state)), jnp.ones((4, 3))
    call = lj.adapt(lambda v, x: nnx.merge(graph, v["params"])(x))
    factor = np.asarray(trainable["kernel/value"]["l"])
    want = np.asarray(call({"params": state}, x)) * factor
    np.testing.assert_allclose(call(method.combine(state, trainable), x), want, rtol=1e-5)


def test_ia3_says_where_feedforward_is_misspelt():
    method = ALL["ia3"](targets=(r"value$", r"mlp/down$"), feedforward=r"mlp/dwon$")
    with pytest.raises(lj.UserError, match="feedforward.*matches nothing"):
        method.count(toy_params())


def test_galore_projects_all_layers_of_a_stack_or_none():
    method = dataclasses.replace(METHODS["galore"], targets=r"layers/1/mlp/up/kernel$")
    tree = {f"layers[0:{L}]/mlp/up/kernel": jnp.ones((L, 6, 10))}
    with pytest.raises(lj.UserError, match="projected or none: .*method.arrange"):
        method.wrap_optimizer(optax.sgd(1.0)).init(tree)


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "ia3", "adalora", "dora", "lora_fa"])
def test_a_target_counts_once_beside_its_layers_that_train_whole(name: str) -> None:
    """Leaves of one target, adapted in some layers and trained whole in another, add up."""
    params = partition.split_stacks(toy_params(), {"layers": [1]})
    size = {} if name == "ia3" else {"rank": 2}
    method = ALL[name](
        targets=r"layers/(1|2)/attention/query$",
        train=(r"layers/0/attention/query/kernel$",), **size,
        **({"feedforward": "mlp/down$"} if name == "ia3" else {}),
    )  # fmt: skip
    trainable = method.init(KEY, params)
    assert len(trainable) == 2
    held = sum(x.size for x in jax.tree.leaves(trainable))
    assert method.count(params).total == held
