"""A plan: what a training step would need, compiled from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from lora_jax import partition
from lora_jax.plan.cost import Cost, device_bytes, measure
from lora_jax.training import mesh as meshes
from lora_jax.training.step import State, init_state, make_step, state_shardings

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one training step needs. Bytes are of one device.

    Attributes:
      parameters: of the model, trained or not.
      trainable: parameters that train, per target, as the method counts them (no padding).
      tokens: positions of a batch (rows times length), padding included.
      mesh: devices along each axis.
      device: kind of device.
      parts: bytes of the arguments by what they are: "weights" (frozen), "trainable" (factors,
        or leaves trained whole), "optimizer", "batch", and "other": keys, constants, and what
        the device adds by padding arrays to its tiles.
      cost: from the compiler; its FLOPs are of the whole step on all devices.
      memory: bytes there are.
      less_cut: by path, (parts, parts that the mesh rules ask for) of each quantised leaf whose
        layout does not let it be cut so far.
    """

    parameters: int
    trainable: dict[str, int]
    tokens: int
    mesh: dict[str, int]
    device: str
    parts: dict[str, int]
    cost: Cost
    memory: int
    less_cut: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def trainable_total(self) -> int:
        return sum(self.trainable.values())

    @property
    def total_bytes(self) -> int:
        """Arguments, fresh outputs and temporaries."""
        return sum(self.parts.values()) + self.cost.output_bytes + self.cost.temp_bytes

    @property
    def fits(self) -> bool:
        return self.cost.refused is None and self.total_bytes <= self.memory

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the derived ones included."""
        return {
            **dataclasses.asdict(self),
            "trainable_total": self.trainable_total,
            "total_bytes": self.total_bytes,
            "fits": self.fits,
        }

    def __str__(self) -> str:
        share = 100 * self.trainable_total / self.parameters
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.mesh.items() if n > 1)
        devices = math.prod(self.mesh.values())
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("trainable", f"{self.trainable_total:,} ({share:.3g} %)"),
            *((f"  {name}", f"{n:,}") for name, n in self.trainable.items()),
            ("FLOPs a step", f"{self.cost.flops:.4g} for {self.tokens:,} tokens"),
            *((f"  without {name}", "its work cannot be counted") for name in self.cost.unknown),
            ("devices", f"{devices} x {self.device}" + (f", {mesh}" if mesh else "")),
            ("memory a device", ""),
            *((f"  {name}", size(n)) for name, n in self.parts.items()),
            *((f"  {path}", f"in {n} of {m} parts") for path, (n, m) in self.less_cut.items()),
            ("  temporaries", size(self.cost.temp_bytes)),
            ("  outputs", size(self.cost.output_bytes)),
            ("  total", f"{size(self.total_bytes)} of {size(self.memory)}: {self._verdict()}"),
            ("compiled in", f"{self.cost.seconds:.0f} s"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)

    def _verdict(self) -> str:
        if self.fits:
            return "fits"
        return "does not fit" + (" (refused by the compiler)" if self.cost.refused else "")


def size(n: int) -> str:
    """Bytes for people: `10.25 GiB`."""
    for unit, scale in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n} B"


def plan_step(
    loss_fn: Any,
    method: Any,
    tx: Any,
    params: Any,
    batch: Any,
    *,
    mesh: Mesh,
    memory: int,
    rules: meshes.ShardingRules = meshes.DEFAULT_RULES,
    accumulate: int = 1,
) -> Plan:
    """The plan of `make_step(loss_fn, method, tx)` on a mesh, whose devices need not exist.

    Args:
      loss_fn, method, tx, accumulate, rules: as of `training.make_step` and `init_state`. A
        method's `prepare` is not run: it would need weights.
      params, batch: arrays or ShapeDtypeStructs; only their shapes and dtypes are used. The
        batch holds `tokens`, or `images`, which count as one each.
      memory: bytes of a device.
    """
    frozen, state, rows = abstract_arguments(method, tx, params, batch, mesh=mesh, rules=rules)
    step = make_step(
        loss_fn, method, tx,
        accumulate=accumulate, mesh=mesh, state_shardings=jax.tree.map(lambda x: x.sharding, state),
    )  # fmt: skip
    cost = measure(step, (frozen, state, rows))
    parts = bytes_by_part(frozen, state, rows)
    return Plan(
        parameters=sum(_size(x) for x in partition.flatten(params).values()),
        trainable=dict(method.count(params).per_target),
        tokens=math.prod(batch["tokens"].shape) if "tokens" in batch else len(batch["images"]),
        mesh=dict(mesh.shape),
        device=mesh.devices.flat[0].device_kind,
        parts={**parts, "other": max(0, cost.argument_bytes - sum(parts.values()))},
        cost=cost,
        memory=memory,
        less_cut=meshes.less_cut(params, mesh, rules),
    )


def abstract_arguments(
    method: Any,
    tx: Any,
    params: Any,
    batch: Any,
    *,
    mesh: Mesh,
    rules: meshes.ShardingRules = meshes.DEFAULT_RULES,
) -> tuple[Any, State, dict[str, Any]]:
    """What `make_step`'s step takes, (frozen, state, batch), as placed ShapeDtypeStructs."""
    meshes.check_rows(batch, mesh, processes=1)
    rows = place(batch, dict.fromkeys(batch, meshes.batch_sharding(mesh)))
    frozen = method.frozen(place(params, meshes.shardings(params, mesh, rules)))
    state = jax.eval_shape(lambda p: init_state(method, p, tx), params)
    layout = state_shardings(state, params, method.wrap_optimizer(tx), mesh, rules)
    return frozen, place(state, layout), rows


def bytes_by_part(frozen: Any, state: State, batch: Any) -> dict[str, int]:
    """Bytes that a device holds of each part of the step's arguments."""
    return {
        "weights": device_bytes(frozen),
        "trainable": device_bytes(state.trainable),
        "optimizer": device_bytes(state.opt_state),
        "batch": device_bytes(batch),
    }


def place(tree: Any, shardings: Any) -> Any:
    """A tree of ShapeDtypeStructs with the given shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape)
