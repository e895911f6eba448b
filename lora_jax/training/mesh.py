"""Device meshes and where each array lives on them.

Four axes: `sweep` (members of a pack: frozen kernels are replicated over it), `data` (rows of the
batch), `fsdp` (rows of the batch *and* one axis of each frozen kernel), `tensor` (the other axis
of each kernel). One device is a mesh of 1 x 1 x 1 x 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax import partition
from lora_jax.errors import UserError, nearest
from lora_jax.tensors.base import is_weight

AXES = ("sweep", "data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Spec = tuple[str | tuple[str, ...] | None, ...]
ShardingRules = Sequence[tuple[str, Spec]]

DEFAULT_RULES: ShardingRules = (
    (r"(^|/)embed/embedding$", ("tensor", "fsdp")),
    (r"(^|/)(query|key|value|gate|up)/kernel$", ("fsdp", "tensor")),
    (r"(^|/)(out|down)/kernel$", ("tensor", "fsdp")),
    (r"(^|/)head/kernel$", ("fsdp", "tensor")),
    (r"(^|/)(query|key|value|gate|up)/bias$", ("tensor",)),
    (r".*", ()),
)
"""Axes of a leaf without its layer axis; what no earlier rule names is replicated."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has, and which axes of a leaf lie on which.

    Attributes:
        sweep, data, fsdp, tensor: their product is the number of devices.
        rules: ordered (regex on expanded paths, axes of a leaf without its layer axis), such as
            `((r"mlp/down/kernel$", ("fsdp", None)),)`; they come before DEFAULT_RULES. A regex
            that matches no parameter is a UserError when they are used.
    """

    sweep: int = 1
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    rules: tuple[tuple[str, Spec], ...] = ()

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise UserError(f"mesh axis {axis}={getattr(self, axis)} must be at least 1.")
        for rule in self.rules:
            _check_rule(rule)

    @property
    def shape(self) -> tuple[int, ...]:
        """Devices along each of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.shape)

    @property
    def sharding_rules(self) -> ShardingRules:
        """`rules`, then DEFAULT_RULES: what `shardings`, `init_state` and the like take."""
        return (*self.rules, *DEFAULT_RULES)


def _check_rule(rule: Any) -> None:
    well_formed = isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[1], tuple)
    if not well_formed:
        raise UserError(f'mesh rule {rule!r}: write (regex, axes), e.g. ("head/kernel$", ()).')
    partition.compiled(rule[0])
    for axes in rule[1]:
        for axis in axes if isinstance(axes, tuple) else (axes,):
            if axis is not None and axis not in AXES:
                raise UserError(f"mesh rule {rule!r}: {nearest(str(axis), AXES)}")


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices`: by default all, or the first one for a mesh of one.

    Raises UserError if the product of the axes is not the number of devices.
    """
    wanted = config.devices
    if devices is None:
        devices = jax.devices()[:1] if wanted == 1 else jax.devices()
    if len(devices) != wanted:
        axes = " x ".join(f"{axis}={n}" for axis, n in zip(AXES, config.shape, strict=True))
        raise UserError(
            f"mesh {axes} needs {wanted} devices, but there are {len(devices)}; change the axes "
            f"so that their product is {len(devices)}."
        )
    # Auto: the compiler propagates shardings; Explicit axes are refused by Flax's partitioning.
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(config.shape, AXES, axis_types=types, devices=devices)


def shardings(params: Any, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Any:
    """A tree like `params` of NamedShardings (one for each array inside a weight).

    Args:
        params: arrays or ShapeDtypeStructs; a stacked leaf's layer axis is never sharded.
        rules: ordered (regex on expanded paths, axes), first match wins, no match: replicated.

    A quantised leaf lies as its rule says as far as its layout allows (`Weight.specs`): int8 as
    the dense kernel does, NF4 in equal runs of whole blocks; `less_cut` names the leaves that lie
    on every device in larger parts than the rule asks for.

    Raises UserError if an axis does not divide, or the layers of one stack get different rules.
    """
    flat = partition.flatten(params)
    _check_rules(rules, flat)
    out = {path: _leaf_sharding(path, leaf, mesh, rules) for path, leaf in flat.items()}
    return partition.unflatten_like(params, out) if flat else params


def load_shardings(
    mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> Callable[[str, Sequence[int]], NamedSharding]:
    """What `load_pretrained(mesh=mesh, shardings=…)` takes so that leaves land where `shardings`
    would put them: a function of a leaf's path and shape."""

    def place(path: str, shape: Sequence[int]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*_spec(path, shape, mesh, rules)))

    return place


def _check_rules(rules: ShardingRules, flat: Mapping[str, Any]) -> None:
    """UserError for a rule of the user's own that matches no leaf."""
    own = [pattern for pattern, spec in rules if (pattern, spec) not in DEFAULT_RULES]
    names = [name for path in flat for name in partition.expand(path)]
    partition.check_patterns(own, names, "mesh rules")


def _leaf_sharding(path: str, leaf: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    if isinstance(leaf, partition.Hole):
        return leaf
    if _is_array(leaf):
        return NamedSharding(mesh, PartitionSpec(*_spec(path, leaf.shape, mesh, rules)))
    if not is_weight(leaf):
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), leaf)
    specs = leaf.specs(_wanted(path, leaf.shape, mesh, rules), mesh.shape)

    def place(part: Any, spec: PartitionSpec) -> NamedSharding:
        _check_divides(path, part.shape, tuple(spec), mesh)
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, leaf, specs)


def less_cut(
    params: Any, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> dict[str, tuple[int, int]]:
    """(parts, parts that its rule asks for) of each quantised leaf that is cut in fewer, by path.

    Args: as of `shardings`.
    """
    found = {}
    for path, leaf in partition.flatten(params).items():
        if not is_weight(leaf):
            continue
        wanted = _parts(_wanted(path, leaf.shape, mesh, rules), mesh, path)
        placed = jax.tree.leaves(_leaf_sharding(path, leaf, mesh, rules))
        parts = max(_parts(sharding.spec, mesh, path) for sharding in placed)
        if parts < wanted:
            found[path] = parts, wanted
    return found


def _parts(spec: Any, mesh: Mesh, path: str) -> int:
    return math.prod(_size(mesh, axis, path) for axis in spec)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct | np.generic)


def _spec(path: str, shape: Sequence[int], mesh: Mesh, rules: ShardingRules) -> Spec:
    """The full spec of a leaf, its layer axis included, checked against its shape."""
    spec = _wanted(path, shape, mesh, rules)
    _check_divides(path, shape, spec, mesh)
    return spec


def _wanted(path: str, shape: Sequence[int], mesh: Mesh, rules: ShardingRules) -> Spec:
    """What the rules say of a leaf, its layer axis included."""
    names = partition.expand(path)
    ordered = partition.Rules.of(tuple((p, tuple(s)) for p, s in rules))
    found = {ordered.get(name, ()) for name in names}
    if len(found) > 1:
        raise UserError(f"sharding rules treat the layers of {path} differently: {found}.")
    spec: Spec = found.pop()
    if spec and partition.stack_of(path) is not None:
        spec = (None, *spec)
    if len(spec) > len(shape):
        raise UserError(f"sharding rule {spec} of {path} has more axes than its shape {shape}.")
    for axis in spec:
        _size(mesh, axis, path)
    return spec


def _divides(path: str, shape: Sequence[int], spec: Spec, mesh: Mesh) -> bool:
    return all(n % _size(mesh, axis, path) == 0 for n, axis in zip(shape, spec, strict=False))


def _check_divides(path: str, shape: Sequence[int], spec: Spec, mesh: Mesh) -> None:
    for size, axis in zip(shape, spec, strict=False):
        parts = _size(mesh, axis, path)
        if size % parts:
            raise UserError(
                f"{path}: an axis of length {size} does not divide over {axis}={parts} devices "
                f"(shape {tuple(shape)}); change the mesh, or put a rule before the others that "
                f'replicates it: (r"{partition.module(partition.expand(path)[0])}", ()).'
            )


def _size(mesh: Mesh, axis: str | tuple[str, ...] | None, path: str) -> int:
    axes = () if axis is None else (axis,) if isinstance(axis, str) else axis
    for name in axes:
        if name not in mesh.shape:
            known = tuple(mesh.shape)
            raise UserError(f"sharding rule of {path} names axis {name!r}; the mesh has {known}.")
    return math.prod(mesh.shape[name] for name in axes)


def trainable_shardings(
    trainable: Mapping[str, Any], params: Any, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> dict[str, Any]:
    """NamedShardings of a method's trainable tree {path: value}.

    Leaves trained whole live like the frozen leaf they replace. Low-rank factors are replicated
    without tensor parallelism (fewest collectives); with it `a` [*, in, r] and `b` [*, r, out]
    are sharded like the kernel's axes they stand for, where these divide (a kernel in NF4 need
    not). Anything else is replicated.
    """
    leaves = partition.flatten(params)
    _check_rules(rules, leaves)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path: str, value: Any) -> Any:
        kernel = leaves.get(path)
        if kernel is None:
            return jax.tree.map(lambda _: everywhere, value)
        stacked = partition.stack_of(path) is not None
        spec = _wanted(path, kernel.shape, mesh, rules)
        if not is_weight(kernel):
            _check_divides(path, kernel.shape, spec, mesh)
        elif not _divides(path, kernel.shape, spec, mesh):
            return jax.tree.map(lambda _: everywhere, value)
        spec = (*spec, *[None] * (len(kernel.shape) - len(spec)))
        if _is_array(value):
            same = tuple(value.shape) == tuple(kernel.shape)
            return NamedSharding(mesh, PartitionSpec(*spec)) if same else everywhere
        factors = isinstance(value, Mapping) and {"a", "b"} <= set(value)
        # Factors of kernels with more axes are over flattened ones: these stay whole.
        if mesh.shape["tensor"] == 1 or not factors or len(spec) != 2 + stacked:
            return jax.tree.map(lambda _: everywhere, value)
        first, last = spec[-2:]
        axes = {"a": (first, None), "b": (None, last)}
        return {
            name: NamedSharding(mesh, PartitionSpec(*[None] * stacked, *axes[name]))
            if name in axes
            else jax.tree.map(lambda _: everywhere, part)
            for name, part in value.items()
        }

    return {path: place(path, value) for path, value in trainable.items()}


def optimizer_shardings(tx: Any, trainable: Any, placed: Any, mesh: Mesh) -> Any:
    """Shardings of `tx.init(trainable)`: moments live like their leaf, the rest everywhere.

    A moment is an array whose path ends with that of a trainable leaf of the same shape.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    leaves, _ = jax.tree_util.tree_flatten_with_path(trainable)
    homes = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(placed), strict=True)
    }

    def place(path: Any, leaf: Any) -> NamedSharding:
        for start in range(len(path) + 1):
            shape, sharding = homes.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return everywhere

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, trainable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`; every other axis of a batch whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place_batch(
    batch: Mapping[str, Any], mesh: Mesh, lead: str | None = None
) -> dict[str, jax.Array]:
    """This process's rows of the batch onto the mesh. UserError if they do not divide.

    Args:
        lead: mesh axis of a leading axis before the rows: `sweep`, of a pack's batches.
    """
    spec = PartitionSpec(BATCH_AXES) if lead is None else PartitionSpec(lead, BATCH_AXES)
    check_rows(batch, mesh, jax.process_count(), axis=0 if lead is None else 1)
    return {
        name: jax.make_array_from_process_local_data(NamedSharding(mesh, spec), np.asarray(value))
        for name, value in batch.items()
    }


def check_rows(batch: Mapping[str, Any], mesh: Mesh, processes: int, axis: int = 0) -> None:
    """UserError unless the rows that `processes` hold together divide over data x fsdp."""
    parts = math.prod(mesh.shape[name] for name in BATCH_AXES)
    for name, value in batch.items():
        rows = value.shape[axis] * processes
        if rows % parts:
            raise UserError(
                f"batch of {rows} rows ({name}) does not divide over data x fsdp = {parts} "
                f"devices; use a batch size that is a multiple of {parts}."
            )
