"""What one call of a function costs, from the compiler, without running it and without arrays."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax import partition
from lora_jax.plan import flops

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


@dataclasses.dataclass(frozen=True)
class Cost:
    """One call of a compiled function. Bytes are of one device, FLOPs of all together.

    Attributes:
      flops: see `flops.Flops.total`.
      argument_bytes: of the arguments, as the device lays them out.
      output_bytes: of results that do not take the place of a donated argument.
      temp_bytes: of intermediate values, at their peak.
      seconds: that tracing and compiling took.
      unknown: primitives whose FLOPs are not in `flops`, or only once.
      refused: the compiler's words, if it found that the program cannot fit the device. Its
        `temp_bytes` are then what the compiler asked for beyond the arguments.
    """

    flops: float
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    seconds: float = 0.0
    unknown: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def total_bytes(self) -> int:
        """What a device must hold while the function runs."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes


def measure(step: Any, args: Sequence[Any]) -> Cost:
    """The cost of `step(*args)`, compiled for the devices that `args` are placed on.

    Args:
      step: a function, jitted or not; donation counts only if it is jitted.
      args: trees of arrays or `jax.ShapeDtypeStruct`s, with shardings where there is a mesh.
        Nothing is allocated for the latter.
    """
    began = time.perf_counter()
    traced = (step if hasattr(step, "trace") else jax.jit(step)).trace(*args)
    counted = flops.count_flops(traced.jaxpr)
    held = device_bytes(args)
    try:
        memory = traced.lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        # The TPU compiler knows the size of the memory, and gives no program that exceeds it.
        needed, _ = out_of_memory(error)
        beyond, seconds = max(0, needed - held), time.perf_counter() - began
        message = str(error).split("\n\n")[0]
        return Cost(counted.total, held, 0, beyond, seconds, counted.unknown, message)
    return Cost(
        flops=counted.total,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        seconds=time.perf_counter() - began,
        unknown=counted.unknown,
    )


def out_of_memory(error: jax.errors.JaxRuntimeError) -> tuple[int, int]:
    """(bytes needed, bytes there are) of a device, from the compiler's refusal.

    Raises the error itself if it is about something else.
    """
    size = r"([\d.]+)([KMGTP]?)i?B?"
    for pattern in (
        rf"Used {size} of {size} hbm",
        rf"total memory required for .*?\({size}\) exceeds available HBM \({size}\)",
    ):
        if match := re.search(pattern, str(error)):
            used, used_unit, available, available_unit = match.groups()
            return (
                int(float(used) * _UNITS[used_unit]),
                int(float(available) * _UNITS[available_unit]),
            )
    raise error


def device_bytes(tree: Any) -> int:
    """Bytes of a tree's leaves on one device: of the whole leaf where it has no sharding."""
    return sum(map(_leaf_bytes, jax.tree.leaves(tree)))


def _leaf_bytes(leaf: Any) -> int:
    shape = tuple(leaf.shape)
    if getattr(leaf, "sharding", None) is not None:
        shape = leaf.sharding.shard_shape(shape)
    if partition.is_key(leaf):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, leaf.dtype))
        return words.size * words.dtype.itemsize
    return math.prod(shape) * leaf.dtype.itemsize
