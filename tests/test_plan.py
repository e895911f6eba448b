"""Plans against closed forms, against what arrays really take, and against the compiler."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from lora_jax import config as configs
from lora_jax import experiment as experiments
from lora_jax import training
from lora_jax.errors import UserError
from lora_jax.methods import FullFineTuning, LoRA, Method
from lora_jax.methods.base import Counts
from lora_jax.models import family_for
from lora_jax.plan import Cost, count_flops, measure, parse_memory, plan_config, plan_step
from lora_jax.plan.cost import device_bytes, out_of_memory
from lora_jax.plan.devices import device_memory, mesh_for, topology_devices
from lora_jax.plan.plan import abstract_arguments, bytes_by_part
from lora_jax.plan.sketch import Sketch
from lora_jax.pretrained import hf_config
from lora_jax.pretrained.assemble import abstract_params
from lora_jax.pretrained.load import build_model
from lora_jax.tensors import adapt

D, M, V, L, HEADS, KV, HEAD = 64, 160, 96, 3, 4, 2, 16  # sizes of the tiny Llama
B, T, R = 4, 32, 5
SHAPE = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": M,
    "num_hidden_layers": L,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HEAD,
    "tie_word_embeddings": False,
}
LORA = LoRA(rank=R, targets=r"attention/(query|value)$")
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="needs the extra tpu (libtpu)")


def experiment(method=None, **changes):
    """The tiny Llama's experiment, with groups of fields replaced: `model={"remat": "full"}`."""
    built = {
        "model": {"shape": SHAPE},
        "method": method or {"kind": "lora", "rank": R, "targets": LORA.targets},
        "data": {
            "source": {"kind": "files", "path": "not/there.jsonl"},
            "task": {"kind": "g2p"},
            "batch_size": B,
            "length": T,
        },
    }
    for name, fields in changes.items():
        built[name] = {**built.get(name, {}), **fields}
    return experiments.from_dict(built)


def parts(method, **options):
    """(jitted step, arguments without shardings) of a method on the tiny Llama."""
    model = build_model(SHAPE, options)
    params = abstract_params(family_for("llama").tensors(model.config))
    tx = training.make_optimizer(training.OptimizerConfig(), 10)
    state = jax.eval_shape(lambda p: training.init_state(method, p, tx), params)
    kinds = {"tokens": "int32", "loss_mask": "float32", "positions": "int32"}
    batch = {name: jax.ShapeDtypeStruct((B, T), dtype) for name, dtype in kinds.items()}

    def loss(variables, batch):
        apply = adapt(model.apply)
        logits = apply(variables, batch["tokens"], positions=batch["positions"])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["tokens"][..., None], -1)
        return -jnp.sum(chosen[..., 0] * batch["loss_mask"]), jnp.sum(batch["loss_mask"])

    return training.make_step(loss, method, tx), (method.frozen(params), state, batch)


def closed_form(full):
    """FLOPs of a step without remat: 6 a weight and token, or 4 where the weight is frozen."""
    query, kv = HEADS * HEAD, KV * HEAD
    kernels = D * (query + 2 * kv) + query * D + 3 * D * M
    attention = 3 * 4 * T * query  # two products forwards, four backwards
    if full:
        return B * T * (L * (6 * kernels + attention) + 6 * D * V)
    factors = R * (D + query) + R * (D + kv)
    return B * T * (L * (4 * kernels + attention + 6 * factors) + 4 * D * V)


@pytest.mark.parametrize("method", [LORA, FullFineTuning()], ids=["lora", "full"])
@pytest.mark.parametrize("unroll", [1, L])
def test_flops_are_those_of_the_closed_form_scanned_or_not(method, unroll):
    step, args = parts(method, unroll=unroll)
    counted = count_flops(step.trace(*args).jaxpr)
    assert counted.total == closed_form(full=method is not LORA)
    assert counted.unknown == ()


def test_flops_agree_with_xla_where_nothing_loops():
    step, args = parts(FullFineTuning(), unroll=L)
    traced = step.trace(*args)
    theirs = traced.lower().cost_analysis()["flops"]
    # XLA counts elementwise work too: 4.6 % of so small a model, 1.1 % at four times the width.
    assert 1.0 < theirs / count_flops(traced.jaxpr).total < 1.06


def test_remat_costs_a_forward_pass_but_its_last_product():
    plain, remat = (
        count_flops(step.trace(*args).jaxpr).total
        for step, args in (parts(LORA), parts(LORA, remat="full"))
    )
    query, kv = HEADS * HEAD, KV * HEAD
    # A layer's output is not needed to differentiate it: `down` is not computed again.
    again = 2 * (D * (query + 2 * kv) + query * D + 2 * D * M) + 4 * T * query
    again += 2 * R * (2 * D + query + kv)
    assert remat - plain == B * T * L * again


def jaxpr_of(f, *shapes):
    return jax.jit(f).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr


def test_flops_of_convolutions_batches_and_branches():
    def grouped(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", feature_group_count=2)

    # [1, 6, 8, 8] * [4, 3, 3, 3] -> [1, 4, 6, 6], each output from 3 channels of a 3 x 3 window.
    assert count_flops(jaxpr_of(grouped, (1, 6, 8, 8), (4, 3, 3, 3))).total == 2 * 4 * 36 * 27
    assert count_flops(jaxpr_of(jnp.matmul, (7, 2, 3), (7, 3, 5))).total == 2 * 7 * 2 * 3 * 5

    def branches(x):
        return jax.lax.cond(x.sum() > 0, lambda: x @ x, lambda: x @ x @ x)

    assert count_flops(jaxpr_of(branches, (4, 4))).total == 2 * 2 * 4**3


def test_a_while_loop_counts_once_and_says_so():
    def loop(x):
        return jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ y, x)

    counted = count_flops(jaxpr_of(loop, (4, 4)))
    assert (counted.total, counted.unknown) == (2 * 4**3, ("while",))


def test_shard_map_counts_for_all_its_devices():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    sharded = jax.shard_map(
        lambda a, b: a @ b,
        mesh=mesh,
        in_specs=(PartitionSpec("x"), PartitionSpec()),
        out_specs=PartitionSpec("x"),
    )
    assert count_flops(jaxpr_of(sharded, (4, 3), (3, 5))).total == 2 * 4 * 3 * 5


def test_measure_multiplies_with_vmap_and_counts_donated_outputs_once():
    def step(w, state, x):
        return state + x @ w, x.sum()

    def shape(*n):
        return jax.ShapeDtypeStruct(n, jnp.float32)

    args = (shape(8, 8), shape(6, 4, 8), shape(6, 4, 8))
    pack = jax.vmap(step, in_axes=(None, 0, 0))
    donated = measure(jax.jit(pack, donate_argnums=1), args)
    assert donated.flops == 6 * 2 * 4 * 8 * 8
    assert donated.argument_bytes == 4 * (8 * 8 + 2 * 6 * 4 * 8)
    kept = measure(pack, args)
    # CPU rounds a table of pointers into its outputs: only the state's own bytes must go.
    assert kept.output_bytes - donated.output_bytes == 4 * 6 * 4 * 8
    assert kept.total_bytes == kept.argument_bytes + kept.output_bytes + kept.temp_bytes


def arguments(method=None, **changes):
    """(experiment, (frozen, state, batch)) of a plan, without its compilation."""
    e = experiment(method, **changes)
    mesh = mesh_for(e.mesh, None)
    bench = Sketch(e, mesh)
    tx = training.make_optimizer(e.optimizer, e.training.steps)
    placed = abstract_arguments(
        e.method, tx, bench.params, next(bench.batches(0)), mesh=mesh, rules=bench.sharding_rules
    )
    return e, placed


def part_bytes(method=None, **changes):
    return bytes_by_part(*arguments(method, **changes)[1])


@functools.cache
def tiny_plan():
    return plan_config(experiment(), memory="1GiB")


def real_bytes(tree):
    """Of trees of real arrays."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def test_parts_are_the_bytes_that_a_real_run_holds():
    planned = tiny_plan()
    specs = family_for("llama").tensors(build_model(SHAPE).config)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract_params(specs))
    state = training.init_state(
        LORA, params, training.make_optimizer(training.OptimizerConfig(), 10)
    )
    assert planned.parameters == sum(x.size for x in jax.tree.leaves(params))
    assert planned.trainable == LORA.count(params).per_target
    assert planned.trainable_total == L * R * (2 * D + HEADS * HEAD + KV * HEAD)
    assert planned.parts["weights"] == real_bytes(params)
    assert planned.parts["trainable"] == real_bytes(state.trainable)
    assert planned.parts["optimizer"] == real_bytes(state.opt_state)
    assert planned.parts["batch"] == B * T * 4 * 4
    # The compiler counts the same arguments, the step's number and the scales besides.
    assert planned.parts["other"] < 64
    assert planned.tokens == B * T
    assert planned.cost.flops == pytest.approx(closed_form(full=False), rel=0.02)


def test_bfloat16_halves_weights_and_leaves_factors_alone():
    wide, narrow = part_bytes(), part_bytes(model={"dtype": "bfloat16"})
    assert 2 * narrow["weights"] == wide["weights"]
    assert narrow["trainable"] == wide["trainable"]


def test_a_mesh_divides_what_is_sharded():
    one, four = part_bytes(), part_bytes(mesh={"fsdp": 2, "tensor": 2})
    norms = (2 * L + 1) * D * 4
    assert four["weights"] - norms == (one["weights"] - norms) / 4
    assert four["trainable"] == one["trainable"] / 2
    assert four["batch"] == one["batch"] / 2
    with pytest.raises(UserError, match="multiple of 2"):
        part_bytes(mesh={"fsdp": 2, "tensor": 2}, data={"batch_size": 3})


def test_a_sharded_step_costs_the_same_flops_and_holds_what_was_said():
    planned = plan_config(experiment(mesh={"fsdp": 2, "tensor": 2}), memory=1 << 30)
    assert planned.cost.flops == tiny_plan().cost.flops
    assert abs(planned.cost.argument_bytes - sum(planned.parts.values())) < 64
    assert "fsdp 2 x tensor 2" in str(planned)


def test_a_quantised_base_is_cut_as_far_as_its_blocks_allow():
    """Five blocks in each matrix of the MLP, of which there are three in a layer."""
    shape = {**SHAPE, "hidden_size": 64, "intermediate_size": 5, "num_hidden_layers": 1}
    model = {"shape": shape, "quantize": "nf4"}
    planned = plan_config(experiment(model=model, mesh={"fsdp": 4}), memory=1 << 30)
    mlp = {f"layers[0:1]/mlp/{name}/kernel" for name in ("gate", "up", "down")}
    assert planned.less_cut == dict.fromkeys(mlp, (1, 4))
    lines = [x for x in str(planned).splitlines() if x.endswith("in 1 of 4 parts")]
    assert {x.split()[0] for x in lines} == mlp


def test_it_fits_exactly_as_much_memory_as_it_needs():
    planned = tiny_plan()
    assert planned.fits
    assert planned.total_bytes > sum(planned.parts.values())
    assert dataclasses.replace(planned, memory=planned.total_bytes).fits
    tight = dataclasses.replace(planned, memory=planned.total_bytes - 1)
    assert not tight.fits
    assert "does not fit" in str(tight)
    assert f"{planned.trainable_total:,}" in str(planned)
    read = json.loads(json.dumps(planned.to_dict()))
    assert read["fits"] is True
    assert read["total_bytes"] == planned.total_bytes


def test_full_fine_tuning_has_no_frozen_weights_and_three_of_everything():
    found, total = part_bytes({"kind": "full"}), tiny_plan().parameters
    assert found["weights"] == 0
    assert found["trainable"] == 4 * total
    assert 0 <= found["optimizer"] - 8 * total < 64


@dataclasses.dataclass(frozen=True)
class OneNumberALayer(Method):
    """A method that the planner has never heard of."""

    def init(self, key, params):
        return {"gain": jnp.ones((L,), jnp.float32)}

    def combine(self, params, trainable, **_):
        stack = params[f"layers[0:{L}]"]
        scaled = stack["mlp_norm"]["scale"] * trainable["gain"][:, None]
        layers = {**stack, "mlp_norm": {"scale": scaled}}
        return {"params": {**params, f"layers[0:{L}]": layers}}

    def count(self, params):
        return Counts({"gain": L})


def test_any_method_can_be_planned_for():
    model = build_model(SHAPE)
    planned = plan_step(
        lambda variables, batch: training.chunked_loss(model, variables, batch),
        OneNumberALayer(),
        training.make_optimizer(training.OptimizerConfig(name="sgd"), 10),
        abstract_params(family_for("llama").tensors(model.config)),
        {
            "tokens": jax.ShapeDtypeStruct((B, T), jnp.int32),
            "loss_mask": jax.ShapeDtypeStruct((B, T), jnp.float32),
        },
        mesh=mesh_for(training.MeshConfig(), None),
        memory=1 << 30,
    )
    assert planned.trainable == {"gain": L}
    assert planned.parts["trainable"] == 4 * L
    assert planned.parts["optimizer"] < 64


def test_made_up_batches_are_what_the_loader_gives():
    bench = Sketch(experiment(), mesh_for(training.MeshConfig(), None))
    batch = next(bench.batches(0))
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
        "tokens": ((B, T), np.int32),
        "loss_mask": ((B, T), np.float32),
        "positions": ((B, T), np.int32),
        "segment_ids": ((B, T), np.int32),
    }
    assert batch["segment_ids"].min() > 0  # no padding: the dearest batch


def test_made_up_batches_of_encoders_have_the_longest_rows():
    shape = {
        "model_type": "bert",
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "intermediate_size": M,
    }
    e = experiment(
        model={"shape": shape}, data={"task": {"kind": "regression"}, "buckets": (8, 16)}
    )
    bench = Sketch(e, mesh_for(e.mesh, None))
    batch = next(bench.batches(0))
    assert (
        batch["tokens"].shape == batch["attention_mask"].shape == (B, T)
    )  # buckets are further, shorter ones
    assert batch["labels"].dtype == np.float32
    loss, weight = jax.eval_shape(bench.loss, {"params": bench.params}, batch)
    assert loss.shape == weight.shape == ()


def test_a_large_model_is_planned_without_its_weights():
    shape = SHAPE | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
    }
    _, (frozen, state, _) = arguments(model={"shape": shape, "dtype": "bfloat16"})
    total = sum(x.size for x in jax.tree.leaves(frozen))
    assert total == 68_976_648_192  # Llama 2 70B
    assert device_bytes(frozen) == 2 * total
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((frozen, state)))


def test_the_model_of_a_plan_needs_only_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    assert hf_config(str(tmp_path)) == SHAPE
    assert hf_config("nothing", SHAPE) == SHAPE
    with pytest.raises(UserError, match="config.json does not exist"):
        hf_config(str(tmp_path.parent))
    with pytest.raises(UserError, match="not an alias"):
        hf_config("nothing")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("24GiB", 24 << 30), ("80GB", 80 * 10**9), (" 1.5 gib", 3 << 29), ("1024", 1024), (7, 7)],
)
def test_memory_is_read_in_units(text, wanted):
    assert parse_memory(text) == wanted


@pytest.mark.parametrize("text", ["lots", "24G", "1.2.3GB", ""])
def test_memory_in_no_unit_is_an_error(text):
    with pytest.raises(UserError, match="GiB"):
        parse_memory(text)


def test_host_memory_is_shared_by_its_devices():
    one = device_memory(mesh_for(training.MeshConfig(), None), None)
    four = device_memory(mesh_for(training.MeshConfig(fsdp=4), None), None)
    assert one > 1 << 28
    assert four == one // 4


def test_a_mesh_larger_than_the_host_asks_for_a_topology():
    with pytest.raises(UserError, match=r"64 devices .* --topology"):
        plan_config(experiment(mesh={"fsdp": 64}, data={"batch_size": 64}))


def test_a_refusal_of_the_compiler_is_read_and_other_errors_are_not():
    def refusal(text):
        return out_of_memory(jax.errors.JaxRuntimeError(text))

    assert refusal(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (25.50G) exceeds available HBM (15.75G). HLO module: jit_step."
    ) == (int(25.5 * 2**30), int(15.75 * 2**30))
    assert refusal("RESOURCE_EXHAUSTED: ... Used 512.0M of 256.00M hbm. Exceeded by") == (
        1 << 29,
        1 << 28,
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        refusal("INTERNAL: something broke")


def test_what_the_compiler_refuses_does_not_fit():
    cost = Cost(flops=1.0, argument_bytes=8, output_bytes=0, temp_bytes=8, refused="too large")
    planned = dataclasses.replace(tiny_plan(), memory=1 << 40, cost=cost)
    assert not planned.fits
    assert "refused by the compiler" in str(planned)


def test_keys_and_shards_have_bytes():
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert device_bytes({"key": key, "x": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}) == 8 + 6


def test_a_missing_tpu_compiler_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    with pytest.raises(UserError, match=r"lora-jax\[tpu\]"):
        topology_devices("v5e:2x2")


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:9x9", "v99:2x2", "v5e"])
def test_an_unknown_topology_is_an_error(name):
    with pytest.raises(UserError, match="generation:shape"):
        topology_devices(name)


@needs_libtpu
def test_a_tpu_slice_that_is_not_there():
    planned = plan_config(experiment(mesh={"fsdp": 2, "tensor": 2}), topology="v5e:2x2")
    assert planned.device == "TPU v5 lite"
    assert planned.memory == int(15.75 * 2**30)
    assert planned.fits
    assert planned.parts["weights"] > 0
    one = plan_config(experiment(), topology="v5e:2x2")
    assert one.mesh == dict.fromkeys(one.mesh, 1)


def gpt3(arg=""):
    path = pathlib.Path(__file__).parents[1] / "configs" / "gpt3_175b.py"
    return experiments.from_dict(configs.load_file(f"{path}:{arg}" if arg else str(path)))


def test_gpt3_has_the_papers_counts():
    found = gpt3()
    model = build_model(hf_config(found.model.source, found.model.shape))
    params = abstract_params(family_for("gpt2").tensors(model.config))
    assert found.method.count(params).total == 37_748_736
    total = sum(x.size for x in jax.tree.leaves(params))
    # 12 d² + 13 d a layer, embeddings of tokens and positions, the last norm.
    d = 12288
    assert total == 96 * (12 * d * d + 13 * d) + (50257 + 2048) * d + 2 * d


@needs_libtpu
def test_gpt3_with_lora_fits_a_v5e_slice_and_full_fine_tuning_does_not():
    lora = plan_config(gpt3(), topology="v5e:8x8")
    assert lora.fits
    full = plan_config(gpt3("full"), topology="v5e:8x8")
    assert not full.fits
    assert "exceeds available HBM" in full.cost.refused
