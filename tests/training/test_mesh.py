"""Several devices against one, where arrays live, and loading straight into shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import LoRA
from lora_jax.plan.cost import device_bytes
from lora_jax.pretrained import load_pretrained, save_pretrained
from lora_jax.tensors.quantized import quantize
from lora_jax.training import (
    MeshConfig,
    OptimizerConfig,
    chunked_loss,
    init_state,
    less_cut,
    load_shardings,
    make_mesh,
    make_optimizer,
    make_step,
    mesh,
    place_batch,
    shardings,
    shardings_of,
)

LOSS = functools.partial(chunked_loss, tiny.MODEL, chunk=32)
# A group, since the moments' shardings are found without running the optimizer's checks.
TX = make_optimizer(
    OptimizerConfig(learning_rate=1e-2, clip_norm=1.0, weight_decay=0.1, groups=((r"/b$", 2.0),)),
    20,
)


def run(config, *, steps=4, method=tiny.METHOD, accumulate=1):
    """(final state, history of metrics) on the mesh of `config`; None: no mesh at all."""
    params = tiny.params()
    frozen = method.frozen(params)
    if config is None:
        devices, layout = None, None
        state = init_state(method, params, TX)
    else:
        devices = make_mesh(config, jax.devices()[: config.devices])
        frozen = jax.device_put(frozen, shardings(frozen, devices))
        state = init_state(method, params, TX, mesh=devices)
        layout = shardings_of(state)
    step = make_step(LOSS, method, TX, mesh=devices, state_shardings=layout, accumulate=accumulate)
    history = []
    for i in range(steps):
        batch = tiny.batch(i)
        batch = batch if devices is None else place_batch(batch, devices)
        state, metrics = step(frozen, state, batch)
        history.append({k: float(v) for k, v in metrics.items()})
    if layout is not None:
        assert shardings_of(state) == layout
    return jax.device_get(state), history


@pytest.fixture(scope="module")
def reference():
    return run(None)


@pytest.mark.parametrize(
    ("config", "accumulate"),
    [
        (MeshConfig(), 1),
        *[(MeshConfig(**{axis: n}), 1) for axis in ("data", "fsdp", "tensor") for n in (2, 4)],
        (MeshConfig(sweep=2, fsdp=2), 1),
        (MeshConfig(fsdp=2, tensor=2), 2),
    ],
    ids=lambda x: "x".join(map(str, x.shape)) if isinstance(x, MeshConfig) else str(x),
)
def test_meshes_equal_one_device(reference, config, accumulate):
    state, history = run(config, accumulate=accumulate)
    for found, wanted in zip(history, reference[1], strict=True):
        tiny.close(found, wanted, 1e-4, 1e-6)
    tiny.close(state.trainable, reference[0].trainable, 2e-3, 2e-5)


def test_factors_leave_zero_under_fsdp_as_on_one_device():
    method = LoRA(rank=4, alpha=8, targets=r"attention/(query|value)$")
    start = method.init(jax.random.key(0), tiny.params())
    assert not any(np.any(value["b"]) for value in start.values())
    one, _ = run(None, steps=20, method=method)
    four, _ = run(MeshConfig(fsdp=4), steps=20, method=method)
    for path, value in four.trainable.items():
        assert np.all(np.abs(value["b"]).max(axis=(1, 2)) > 1e-2), path
    tiny.close(four.trainable, one.trainable, 2e-3, 2e-4)


def test_where_things_live():
    params, devices = tiny.params(), make_mesh(MeshConfig(fsdp=2, tensor=2))
    placed = partition.flatten(shardings(params, devices))
    assert placed["layers[0:2]/attention/query/kernel"].spec == P(None, "fsdp", "tensor")
    assert placed["layers[0:2]/mlp/down/kernel"].spec == P(None, "tensor", "fsdp")
    assert placed["embed/embedding"].spec == P("tensor", "fsdp")
    trainable = tiny.METHOD.init(jax.random.key(0), params)
    factors = mesh.trainable_shardings(trainable, params, devices)
    query = factors["layers[0:2]/attention/query/kernel"]
    assert query["a"].spec == P(None, "fsdp", None) and query["b"].spec == P(None, None, "tensor")
    pure = mesh.trainable_shardings(trainable, params, make_mesh(MeshConfig(fsdp=4)))
    assert all(s.is_fully_replicated for s in jax.tree.leaves(pure))
    state = init_state(tiny.METHOD, params, TX, mesh=devices)
    moments = [
        x.sharding.spec for x in jax.tree.leaves(state.opt_state) if x.shape == (2, 4, tiny.WIDTH)
    ]
    assert moments == [P(None, None, "tensor")] * 4  # mu and nu of the factor b of two kernels


def test_a_quantised_base_on_a_mesh_equals_one_device():
    """Loss and gradients, with NF4 in as many parts as there are devices and in fewer, and int8."""
    rules = ((r"attention/|mlp/down", "nf4"), (r"mlp/", "int8"))
    params, devices = quantize(tiny.params(), rules), make_mesh(MeshConfig(fsdp=2, tensor=2))
    trainable = tiny.METHOD.init(jax.random.key(0), params)

    def loss(trainable, params, batch):
        return LOSS(tiny.METHOD.combine(params, trainable), batch)[0]

    run = jax.jit(jax.value_and_grad(loss))
    wanted = run(trainable, params, tiny.batch(0))
    placed = (
        jax.device_put(trainable, mesh.trainable_shardings(trainable, params, devices)),
        jax.device_put(params, shardings(params, devices)),
        place_batch(tiny.batch(0), devices),
    )
    tiny.close(run(*placed), wanted, 1e-3, 1e-5)
    # Each device holds its part, and no more.
    arguments = run.lower(*placed).compile().memory_analysis().argument_size_in_bytes
    assert arguments <= device_bytes(placed) < 0.5 * device_bytes((trainable, params))


def test_where_quantised_weights_live():
    devices = make_mesh(MeshConfig(fsdp=2, tensor=2))
    layers = "layers[0:2]"
    query, down, up = (
        f"{layers}/{name}/kernel" for name in ("attention/query", "mlp/down", "mlp/up")
    )

    def placed(params, mesh=devices):
        return partition.flatten(jax.device_put(params, shardings(params, mesh)))

    def share(leaf):
        return device_bytes(leaf) / sum(x.nbytes for x in jax.tree.leaves(leaf))

    ints = quantize(tiny.params(), "int8")
    leaf = placed(ints)[down]
    assert leaf.w.codes.sharding.spec == P(None, "tensor", "fsdp")
    assert leaf.gain.sharding.spec == P(None, None, "fsdp")
    assert share(leaf.w) == 1 / 4 and share(leaf.gain) == 1 / 2 and not less_cut(ints, devices)
    # 256 numbers a layer are four blocks; 384 are six, which four devices cannot share.
    nf4 = quantize(tiny.params(), "nf4")
    leaves = placed(nf4)
    assert leaves[query].codes.sharding.spec == P(None, ("tensor", "fsdp"))
    assert leaves[down].absmax.sharding.spec == P(None, "fsdp")
    assert leaves[query].nested.sharding.is_fully_replicated
    assert share(leaves[query].codes) == share(leaves[query].absmax) == 1 / 4
    assert share(leaves[down].codes) == 1 / 2
    gate = f"{layers}/mlp/gate/kernel"
    assert less_cut(nf4, devices) == {p: (2, 4) for p in (down, up, gate)}
    # One block a layer: whole, though the layers would divide.
    small = {layers: {"attention": {"query": {"kernel": jnp.ones((2, 4, 16))}}}}
    one = quantize(small)
    assert placed(one)[query].codes.sharding.is_fully_replicated
    assert less_cut(one, devices) == {query: (1, 4)}
    # Enough magnitudes: those of theirs are cut too.
    large = {"attention": {"query": {"kernel": jnp.ones((256, 256))}}}
    leaf = placed(quantize(large))["attention/query/kernel"]
    assert leaf.nested.sharding.spec == P(("tensor", "fsdp")) and share(leaf) < 0.251
    odd = {"attention": {"query": {"kernel": jnp.ones((6, 5))}}}
    with pytest.raises(UserError, match="length 5 does not divide over tensor=2"):
        shardings(quantize(odd, "int8"), devices)
    factors = mesh.trainable_shardings({query: {"a": jnp.ones((2, 16, 3)), "b": jnp.ones(
        (2, 3, 16))}}, nf4, devices)  # fmt: skip
    assert factors[query]["b"].spec == P(None, None, "tensor")


def test_weights_are_read_straight_into_their_shards(tmp_path):
    save_pretrained(tmp_path, tiny.MODEL, tiny.params())
    devices = make_mesh(MeshConfig(fsdp=4))
    _, params = load_pretrained(tmp_path, mesh=devices, shardings=load_shardings(devices))
    whole = partition.flatten(tiny.params())
    wanted = partition.flatten(shardings(tiny.params(), devices))
    kernels = 0
    for path, leaf in partition.flatten(params).items():
        assert leaf.sharding == wanted[path], path
        np.testing.assert_array_equal(leaf, whole[path])
        if path.endswith(("kernel", "embedding")):
            kernels += 1
            sizes = [shard.data.size for shard in leaf.addressable_shards]
            assert sizes == [leaf.size // 4] * 4, path
    assert kernels == 9


def test_rules_of_the_config_come_first():
    config = MeshConfig(fsdp=2, tensor=2, rules=((r"mlp/down$", (None, ("fsdp", "tensor"))),))
    devices = make_mesh(config)
    placed = partition.flatten(shardings(tiny.params(), devices, config.sharding_rules))
    assert placed["layers[0:2]/mlp/down/kernel"].spec == P(None, None, ("fsdp", "tensor"))
    assert placed["layers[0:2]/mlp/up/kernel"].spec == P(None, "fsdp", "tensor")
    loading = load_shardings(devices, config.sharding_rules)
    path = "layers[0:2]/mlp/down/kernel"
    assert loading(path, (2, 24, 16)) == placed[path]
    wrong = MeshConfig(rules=((r"mlp/dwn$", ()),)).sharding_rules
    for use in (
        lambda: shardings(tiny.params(), make_mesh(), wrong),
        lambda: init_state(tiny.METHOD, tiny.params(), TX, mesh=make_mesh(), rules=wrong),
    ):
        with pytest.raises(UserError, match="mesh rules: the pattern 'mlp/dwn"):
            use()


def test_errors_say_what_to_do():
    with pytest.raises(UserError, match="needs 3 devices, but there are 4"):
        make_mesh(MeshConfig(data=3))
    odd = {"head": {"kernel": jnp.zeros((6, 4))}}
    with pytest.raises(UserError, match=r"length 6 does not divide over fsdp=4.*head"):
        shardings(odd, make_mesh(MeshConfig(fsdp=4)))
    with pytest.raises(UserError, match="multiple of 4"):
        place_batch(tiny.batch(0, rows=6), make_mesh(MeshConfig(data=4)))
    assert make_mesh().size == 1
    with pytest.raises(UserError, match="did you mean tensor"):
        MeshConfig(rules=(("head/kernel$", ("tensr",)),))
    with pytest.raises(UserError, match="write"):
        MeshConfig(rules=("head/kernel$",))
    with pytest.raises(UserError, match="fsdp=0"):
        MeshConfig(fsdp=0)
