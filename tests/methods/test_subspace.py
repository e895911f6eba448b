"""Random subspaces: theta_0 + P·theta_d, what is in it, what d is spent on, and how it is saved."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import partition, projections
from lora_jax.methods.subspace import Subspace
from lora_jax.sweeps import padding
from lora_jax.tensors.base import Weight
from lora_jax.tensors.quantized import quantize

SHAPES = {
    "embed/embedding": (4, 4),
    "layers[0:3]/query/kernel": (3, 4, 4),
    "layers[0:3]/norm/scale": (3, 4),
    "final_norm/scale": (4,),
    "head/kernel": (4, 4),
}
TOTAL = 16 + 48 + 12 + 4 + 16
X = np.array([[1, 2, 3], [0, 3, 2]])


def tree(flat: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = out
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return out


def params_of(dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return tree({p: jnp.asarray(rng.normal(size=s), dtype) for p, s in SHAPES.items()})


def loss(variables: Any) -> jax.Array:
    """Of a small network that uses every leaf; stacks in segments or whole."""
    p = variables["params"]
    x = p["embed"]["embedding"][X]
    for name in sorted(n for n in p if n.startswith("layers[")):
        for query, norm in zip(p[name]["query"]["kernel"], p[name]["norm"]["scale"], strict=True):
            x = jnp.tanh(x @ query) * norm[None, None]
    return ((x * p["final_norm"]["scale"][None, None] @ p["head"]["kernel"]) ** 2).sum()


def moved(method: Subspace, params: Any, seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    start = method.init(jax.random.key(0), params)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), start)


def combine(method: Subspace, params: Any, trainable: Any, numbers: Any = None) -> dict[str, Any]:
    run = jax.jit(lambda f, t, n: method.combine(f, t, numbers=n)["params"])
    numbers = method.numbers(params) if numbers is None else numbers
    return partition.flatten(run(method.frozen(params), trainable, numbers))


@pytest.mark.parametrize("projection", ["dense", "sparse", "fastfood"])
def test_global_is_one_projection_of_all_leaves(projection: str) -> None:
    """theta_0 + P·theta_d leaf by leaf, and the gradient is P* of the plain one, in float64."""
    with jax.enable_x64(True):
        params = params_of(np.float64)
        method = Subspace(dimension=20, projection=projection, projection_seed=5)
        trainable = moved(method, params)
        vector = trainable["subspace"]["vector"]
        assert vector.shape == (20,) and vector.dtype == np.float64
        p = projections.make(projection, TOTAL)
        key = jax.random.key(5, impl="threefry2x32")
        numbers = method.numbers(params)
        held = jax.tree.map(lambda x: x[0], numbers["projections"][str(TOTAL)])
        for name, x in jax.jit(p.numbers, static_argnums=1)(key, 20).items():
            np.testing.assert_allclose(held[name], x, rtol=1e-6)
        offset = jax.jit(p.apply)(key, held, vector)
        # In the order of names without the layers' range.
        order = ["embed/embedding", "final_norm/scale", "head/kernel",
                 "layers[0:3]/norm/scale", "layers[0:3]/query/kernel"]  # fmt: skip
        cuts = np.cumsum([np.prod(SHAPES[n]) for n in order])[:-1]
        parts = dict(zip(order, np.split(np.asarray(offset), cuts), strict=True))
        flat, found = partition.flatten(params), combine(method, params, trainable, numbers)
        for name, part in parts.items():
            np.testing.assert_allclose(found[name], flat[name] + part.reshape(SHAPES[name]))

        def through(t: Any) -> jax.Array:
            return loss(method.combine(params, t, numbers=numbers))

        gradient = jax.jit(jax.grad(through))(trainable)
        merged = method.merge(params, trainable)
        full = partition.flatten(jax.jit(jax.grad(loss))({"params": merged}))
        long = np.concatenate([np.ravel(full[f"params/{n}"]) for n in order])
        back = jax.linear_transpose(lambda x: p.apply(key, held, x), vector)
        (expected,) = jax.jit(back)(long)
        np.testing.assert_allclose(gradient["subspace"]["vector"], expected, rtol=1e-9, atol=1e-12)


def test_did_has_a_projection_a_tensor_and_layer_and_shares_the_vector() -> None:
    params, method = params_of(), Subspace(dimension=16, projection="dense", scope="tensor")
    numbers = method.numbers(params)
    offsets = jax.jit(jax.vmap(lambda x: method.offsets(params, x, numbers)))(jnp.eye(16))
    columns = {p: np.moveaxis(np.asarray(x), 0, -1) for p, x in offsets.items()}
    assert set(columns) == set(SHAPES)
    for name, p in columns.items():  # [layers, size, d]: unit columns in every tensor
        assert p.shape == (3 if "[" in name else 1, np.prod(SHAPES[name]) / p.shape[0], 16)
        np.testing.assert_allclose(np.linalg.norm(p, axis=1), 1.0, rtol=1e-5)
    query = columns["layers[0:3]/query/kernel"]
    assert np.abs(query[0] - query[1]).max() > 0.1
    assert np.abs(columns["layers[0:3]/norm/scale"] - query[:, :4]).max() > 0.1


def test_large_tensors_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    params, method = params_of(), Subspace(dimension=16, scope="tensor", scales="layer")
    trainable = moved(method, params)

    def found() -> Any:
        def through(t: Any) -> jax.Array:
            return loss(method.combine(params, t))

        run = jax.jit(lambda t: (through(t), jax.grad(through)(t)))
        text = run.lower(trainable).as_text()
        return run(trainable), text.count("stablehlo.while")

    together, loops = found()
    monkeypatch.setattr(projections, "LONG", 1)
    jax.clear_caches()
    alone, more = found()
    jax.clear_caches()  # of what was traced so
    assert more > loops
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_said_spends_some_of_d_on_scales() -> None:
    """Three layers, embedding, final norm and head: six scales, of what stands in each."""
    params = params_of()
    method = Subspace(dimension=20, scope="tensor", scales="layer")
    trainable = moved(method, params)
    own = trainable["subspace"]
    assert own["vector"].shape == (14,) and own["scales"].shape == (6,)
    assert method.count(params).total == 20
    np.testing.assert_array_equal(method.init(None, params)["subspace"]["scales"], 1.0)
    plain = Subspace(dimension=14, scope="tensor")
    without = combine(plain, params, {"subspace": {"vector": own["vector"]}})
    with_ = combine(method, params, trainable)
    order = ["embed", "final_norm", "head", "layers/0", "layers/1", "layers/2"]
    for name, w in partition.flatten(params).items():
        layers = [x.reshape(3 if "[" in name else 1, -1) for x in (with_[name], without[name], w)]
        for i, (new, old, base) in enumerate(zip(*layers, strict=True)):
            place = order.index(f"layers/{i}" if "[" in name else name.split("/")[0])
            np.testing.assert_allclose(new - base, own["scales"][place] * (old - base), atol=1e-6)
    each = Subspace(dimension=20, scope="tensor", scales="tensor")
    assert each.count(params).per_target == {"subspace/vector": 11, "subspace/scales": 9}


def test_a_layer_is_also_what_linen_numbers() -> None:
    """`encoderblock_3` inside of another module, as in Flax's own ViT, not only `layers/3`."""
    leaf = {"Dense_0": {"kernel": np.ones((4, 4))}, "Dense_1": {"kernel": np.ones((4, 4))}}
    params = {"Transformer": {f"encoderblock_{i}": leaf for i in range(3)}, "head": leaf}
    counts = Subspace(dimension=30, scope="tensor", scales="layer").count(params).per_target
    assert counts["subspace/scales"] == 3 + 2  # the head's two modules are numbered themselves


def test_a_padded_member_has_the_gradient_of_its_own_run() -> None:
    """Members of other d and seed in one program, as in a pack: none of the padding counts."""
    options: dict[str, Any] = dict(
        projection="sparse", scope="tensor", scales="layer", train=("^head/",), train_counts=True
    )
    with jax.enable_x64(True):
        params = params_of(np.float64)
        methods = [
            Subspace(dimension=35, **options),
            Subspace(dimension=37, projection_seed=3, **options),
        ]
        frozen = methods[0].frozen(params)

        def gradient(trainable: Any, numbers: Any) -> Any:
            return jax.grad(lambda t: loss(methods[0].combine(frozen, t, numbers=numbers)))(
                trainable
            )

        alone = [(moved(m, params), m.numbers(params)) for m in methods]
        like = padding.hull([a[0] for a in alone]), padding.hull([a[1] for a in alone])
        both = padding.stack([tuple(map(padding.pad, a, like)) for a in alone])
        packed = jax.jit(jax.vmap(gradient))(*both)
        for i, one in enumerate(alone):
            wanted = padding.pad(jax.jit(gradient)(*one), like[0])
            for x, y in zip(jax.tree.leaves(packed), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(x[i], y, rtol=1e-9, atol=1e-11)


def test_published_d_leaves_no_room_for_a_scale_a_tensor() -> None:
    """RoBERTa-large has 24 layers of 16 tensors; its published SAID d90 on MRPC is 207."""
    leaves = {f"layers[0:24]/part{i}/kernel": np.ones((24, 2, 2)) for i in range(16)}
    params = tree({**leaves, "embed/embedding": np.ones((9, 9)), "head/kernel": np.ones((9, 2))})
    method = Subspace(dimension=207, scope="tensor", scales="layer")
    assert method.count(params).per_target == {"subspace/vector": 181, "subspace/scales": 26}
    with pytest.raises(lj.UserError, match="must be above the 386 scales"):
        Subspace(dimension=207, scope="tensor", scales="tensor").count(params)


def test_the_head_inside_beside_or_counted() -> None:
    params, head = params_of(), ("^head/",)
    inside = Subspace(dimension=30)
    assert inside.count(params).per_target == {"subspace/vector": 30}
    beside = Subspace(dimension=30, train=head)
    assert beside.count(params).per_target == {"subspace/vector": 30, "head/kernel": 16}
    counted = Subspace(dimension=30, train=head, train_counts=True)
    assert counted.count(params).per_target == {"subspace/vector": 14, "head/kernel": 16}
    assert counted.count(params).total == 30
    trainable = moved(counted, params)
    assert trainable["subspace"]["vector"].shape == (14,)
    np.testing.assert_array_equal(
        combine(counted, params, trainable)["head/kernel"], trainable["head/kernel"]
    )
    frozen = partition.flatten(counted.frozen(params))
    assert [p for p, x in frozen.items() if isinstance(x, partition.Hole)] == ["head/kernel"]


def test_what_is_not_covered_stays_the_frozen_array() -> None:
    params = params_of()
    method = Subspace(dimension=9, targets=(r"query/kernel$", "^embed/"), train=("^head/",))
    found = method.combine(params, moved(method, params))["params"]
    for name in ("final_norm", "layers[0:3]"):
        new, old = (partition.flatten(t[name]) for t in (found, params))
        for path, x in old.items():
            assert (new[path] is x) == ("query" not in path), path
    start = method.combine(params, method.init(jax.random.key(0), params))["params"]
    for x, y in zip(jax.tree.leaves(start), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_cutting_a_stack_changes_nothing(scope: str) -> None:
    """An adapter fits a base cut elsewhere, and layers that are left out can be cut away."""
    params, method = params_of(), Subspace(dimension=15, scope=scope, scales="layer")
    trainable, cut = moved(method, params), partition.split_stacks(params, {"layers": [1]})
    whole, parts = combine(method, params, trainable), combine(method, cut, trainable)
    for name, x in whole.items():
        if "[" in name:
            pieces = [parts[name.replace("[0:3]", r)] for r in ("[0:1]", "[1:3]")]
            np.testing.assert_allclose(jnp.concatenate(pieces), x, atol=1e-6)
        else:
            np.testing.assert_allclose(parts[name], x, atol=1e-6)

    some = Subspace(dimension=5, scope=scope, targets=r"layers/[01]/", train=("layers/2/norm",))
    with pytest.raises(lj.UserError, match="cut it first: params = method.arrange"):
        Subspace(dimension=5, scope=scope, targets=r"layers/[01]/").init(jax.random.key(0), params)
    arranged = some.arrange(params)
    assert [n for n in arranged if "[" in n] == ["layers[0:2]", "layers[2:3]"]
    assert [s.path for s in some.spans(arranged)] == [
        "layers[0:2]/norm/scale", "layers[0:2]/query/kernel",
    ]  # fmt: skip


def test_bfloat16_and_quantised_bases() -> None:
    """The sum is rounded once; over a weight type it is a weight, never made dense in training."""
    method = Subspace(dimension=12)
    params = params_of(jnp.bfloat16)
    trainable = moved(method, params)
    found = combine(method, params, trainable)
    wide = jax.tree.map(lambda x: x.astype(np.float32), params)
    for name, x in combine(method, wide, trainable).items():
        assert found[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(found[name], x.astype(jnp.bfloat16))

    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
    frozen = quantize({"w": {"kernel": kernel}}, (("kernel$", "nf4"),))
    trainable = moved(method, frozen)
    leaf = method.combine(frozen, trainable)["params"]["w"]["kernel"]
    assert isinstance(leaf, Weight)
    x = jnp.ones((2, 64))
    y = lj.adapt(lambda p, x: x @ p["w"]["kernel"])({"w": {"kernel": leaf}}, x)
    merged = method.merge(frozen, trainable)["w"]["kernel"]
    np.testing.assert_allclose(y, x @ merged, atol=1e-4)


def test_saved_as_a_seed_and_a_vector(tiny_base: Any, tmp_path: Any) -> None:
    model, params = lj.load_pretrained(str(tiny_base / "base"))
    method = Subspace(dimension=20, projection_seed=7, scales="layer", scope="tensor")
    trainable = moved(method, params)
    lj.save_adapter(tmp_path / "a", model, method, trainable, params=params)
    size = sum(f.stat().st_size for f in (tmp_path / "a").iterdir())
    assert size < 3000, "coordinates and a description"
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["method"] == "subspace"
    again, loaded = lj.load_adapter(tmp_path / "a", model, params)
    assert again == method
    before, after = combine(method, params, trainable), combine(again, params, loaded)
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x)


def test_what_makes_no_sense_is_refused() -> None:
    params = params_of()
    for options, message in [
        ({"projection": "fastfod"}, "did you mean fastfood"),
        ({"scope": "layer"}, "scope must be one of"),
        ({"scales": "yes"}, "scales must be one of"),
        ({"projection_seed": -1}, "must be in"),
        ({"train_counts": True}, "name some there"),
    ]:
        with pytest.raises(lj.UserError, match=message):
            Subspace(**options)
    for method, message in [
        (Subspace(dimension=97), "have only 96 parameters"),
        (Subspace(dimension=16, train=("^head/",), train_counts=True), "above the 0 scales and 16"),
        (Subspace(targets="attention"), "matches nothing"),
        (Subspace(targets="^head/", train=("^head/",)), "covers no leaf"),
    ]:  # fmt: skip
        with pytest.raises(lj.UserError, match=message):
            method.init(jax.random.key(0), params)
    with pytest.raises(lj.UserError, match="holds int32"):
        Subspace(dimension=2).count({"w": jnp.ones(4), "n": jnp.ones(3, jnp.int32)})
