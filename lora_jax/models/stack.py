"""Stacks of equal layers: which segments a tree holds, and one scan over each.

A segment is one path component ``layers[0:30]`` whose arrays carry a leading layer axis. A tree may
hold several (``layers[0:10]``, ``layers[10:30]``): layers that train whole are then a segment of
their own, and the step never slices or concatenates weights.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
from flax import linen as nn

from lora_jax import partition
from lora_jax.errors import UserError

REMAT = ("none", "full", "dots")
FEW = 6
"""So many layers are compiled without a loop, unless a config says otherwise."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers ``start`` to ``stop`` - 1."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"layers[{self.start}:{self.stop}]"

    @property
    def size(self) -> int:
        return self.stop - self.start


def segments_in(
    names: Iterable[str], num_layers: int, cuts: Iterable[int] = ()
) -> tuple[Segment, ...]:
    """The segments among the keys of a parameter tree, in order; where none is there, those that
    `cuts` make of the whole stack.

    Raises:
      UserError: the segments leave out a layer or hold one twice.
    """
    found = [Segment(*span) for name in names if (span := partition.stack_of(name))]
    if not found:
        edges = [0, *cuts, num_layers]
        return tuple(Segment(*pair) for pair in itertools.pairwise(edges))
    found.sort(key=lambda segment: segment.start)
    edges = [0] + [segment.stop for segment in found]
    starts = [segment.start for segment in found]
    if starts != edges[:-1] or edges[-1] != num_layers or any(s.size < 1 for s in found):
        raise UserError(
            f"the segments {[s.name for s in found]} must cover layers 0 to "
            f"{num_layers - 1} once each."
        )
    return tuple(found)


def iteration(size: int, unroll: int | None) -> int:
    """Layers per iteration of the compiled loop over `size` layers.

    By default one, and all where there are few. A loop writes what its backward pass needs into
    arrays of all layers, which it first fills with zeros, and computes gradients of the first
    layer's input, which nobody reads: without it, a step of 6 layers takes 7 to 10 % less time on a
    CPU, and hardly longer to compile.
    """
    if unroll is None:
        return size if size <= FEW else 1
    return min(unroll, size)


def scanned(
    block: type[nn.Module],
    segment: Segment,
    *,
    remat: str,
    unroll: int | None,
    inputs: int,
    **fields: Any,
) -> nn.Module:
    """`block` scanned over the layers of `segment`.

    The block's ``__call__(carry, per_layer, *shared)`` returns ``(carry, per_layer_out)``.

    Args:
      block: a Linen module class.
      segment: the layers; also the module's name.
      remat: "none", "full" (keep only the layers' inputs) or "dots" (also products with
        weights).
      unroll: as of `iteration`.
      inputs: how many shared arguments follow `per_layer`.
      **fields: fields of the block.
    """
    layers = iteration(segment.size, unroll)
    if remat == "full":
        policy = None
    elif remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if remat != "none":
        # Inside a loop XLA cannot merge the recomputation with the forward pass; once unrolled
        # it can, and would undo the remat unless told not to.
        block = nn.remat(block, policy=policy, prevent_cse=layers > 1)
    scan = nn.scan(
        block,
        variable_axes={"params": 0, "sites": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0,) + (nn.broadcast,) * inputs,
        out_axes=0,
        length=segment.size,
        unroll=layers,
    )
    return scan(**fields, name=segment.name)
