"""The devices a plan is made for, present or not, and how much memory each has."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from lora_jax.errors import UserError
from lora_jax.plan.cost import out_of_memory
from lora_jax.training.mesh import MeshConfig, make_mesh

_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


def topology_devices(name: str) -> Sequence[Any]:
    """The devices of a TPU slice such as `v5e:8x8`, of which none need be there.

    They can be compiled for, not run on. Raises UserError if libtpu (the extra `tpu`), which
    holds the compiler, is not installed or knows no such slice.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"topology {name!r} needs the TPU compiler, which is not installed: "
            "pip install 'lora-jax[tpu]'"
        )
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise UserError(
            f"topology {name!r} is none that libtpu can compile for ({_first_line(error)}); write "
            "generation:shape, such as v5e:8x8, v6e:4x4, v5p:2x2x1 or v4:2x2x4, at least one host "
            "(v5e:2x2); with JAX_PLATFORMS=cpu no TPU has to be present"
        ) from None
    return found.devices


def mesh_for(config: MeshConfig, topology: str | None) -> Mesh:
    """The experiment's mesh on the topology, or on what is here.

    A mesh of one device is put on the topology's first.
    """
    wanted = config.devices
    if topology is None:
        if wanted > len(jax.devices()):
            raise UserError(
                f"the config's mesh has {wanted} devices and there are {len(jax.devices())} here: "
                "say --topology (such as v5e:8x8), or set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted} with JAX_PLATFORMS=cpu"
            )
        return make_mesh(config)
    devices = topology_devices(topology)
    return make_mesh(config, devices[:1] if wanted == 1 else devices)


def device_memory(mesh: Mesh, topology: str | None) -> int:
    """Bytes that a program may use on each device of the mesh.

    A TPU's own figure leaves out what the system keeps (15.75 of a v5e's 16 GiB). CPU devices
    share the host's memory evenly.
    """
    device = mesh.devices.flat[0]
    if topology is not None:
        return _compiler_limit(device)
    if device.platform == "cpu":
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return host // mesh.devices.size
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise UserError(f"{device.device_kind} does not say how much memory it has: give --memory")
    return int(stats["bytes_limit"])


def _compiler_limit(device: Any) -> int:
    """The memory that the compiler plans with: what it says when it refuses a petabyte."""
    huge = jax.ShapeDtypeStruct((1 << 50,), jnp.int8, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + jnp.int8(1)).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        return out_of_memory(error)[1]
    raise UserError(f"the compiler knows no limit of {device.device_kind}: give --memory")


def parse_memory(text: str | int) -> int:
    """`"24GiB"`, `"80 GB"` or a number of bytes, as bytes; UserError where it is neither."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() or "B" if match else ""
    try:
        return int(float(match[1]) * _UNITS[unit]) if match else _UNITS[""]
    except (KeyError, ValueError):
        raise UserError(
            f"memory {text!r}: write a number of bytes or 24GiB (1024³), 80GB (1000³)"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
