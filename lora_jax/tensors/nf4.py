"""4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

In the layout of bitsandbytes: a weight is a run of numbers in PyTorch's order (out, in), cut in
blocks of 64. A number is the index of the nearest of 16 levels, once its block is divided by its
largest magnitude; two indices a byte, the first one in the high half. The blocks' magnitudes,
less their mean, are quantised in turn: blocks of 256, an index of 8 bits each (section 3).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax.errors import UserError
from lora_jax.tensors.base import WeightError
from lora_jax.tensors.coded import Coded

BLOCK = 64  # numbers that share a magnitude
NESTED = 256  # magnitudes that share one
_STATIC: dict[str, Any] = {"static": True}

# Quantiles of N(0, 1) scaled to [-1, 1], with an exact 0 (appendix E of the paper).
LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def _dynamic_levels() -> np.ndarray:
    """The 256 levels of the dynamic data type (Dettmers et al. 2022, arXiv:2110.02861, fig. 2).

    For the exponent 10^(i-6), i = 0 … 6, the middles of 2^i equal parts of [0.1, 1] and their
    negatives; besides 0 and 1.
    """
    found = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2**i + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        found += [*middles, *-middles]
    return np.sort(np.asarray(found)).astype(np.float32)


DYNAMIC_LEVELS = _dynamic_levels()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4(Coded):
    """A weight of 4 bits a number and, doubly quantised, 0.127 bits for its magnitudes.

    Args:
      codes: uint8 [*batch, n / 2], n the numbers of one matrix; two a byte.
      absmax: uint8 [*batch, n / 64], or float32 where the magnitudes are not quantised.
      nested: float32 [*batch, n / 64 / 256], the largest of each 256 magnitudes less `offset`;
        None where `absmax` is float32.
      offset: float32 [*batch], the mean of the magnitudes.
      stored: the matrix's shape in the order of the codes, such as (out, in).
      order: the weight's axes after the batch as axes of `stored`: (1, 0) for a kernel (in, out).
      dtype_name: of the array that it stands for. Levels are scaled in float32 and rounded once.
      path: the weight's path, for errors.
    """

    advice: ClassVar[str] = (
        "A magnitude is of 64 numbers in a run: {path!r} can be cut between layers, and along its "
        "outputs where whole runs begin and end. Leave it out of what is quantised, with "
        "({path!r}, None) before the other rules of `quantize`, quantise it to int8, or make it "
        "dense first (lora_jax.densify)."
    )

    codes: jax.Array
    absmax: jax.Array
    nested: jax.Array | None = None
    offset: jax.Array | None = None
    stored: tuple[int, ...] = dataclasses.field(default=(), metadata=_STATIC)
    order: tuple[int, ...] = dataclasses.field(default=(1, 0), metadata=_STATIC)
    dtype_name: str = dataclasses.field(default="float32", metadata=_STATIC)
    path: str = dataclasses.field(default="", metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], *(self.stored[i] for i in self.order))

    @property
    def batch(self) -> int:
        """How many axes come before the matrix's."""
        return self.codes.ndim - 1

    def magnitudes(self) -> jax.Array:
        """float32 [*batch, blocks]."""
        if self.nested is None or self.offset is None:
            return self.absmax
        scale = jnp.repeat(self.nested, NESTED, -1)[..., : self.absmax.shape[-1]]
        return _looked_up(DYNAMIC_LEVELS, self.absmax) * scale + self.offset[..., None]

    def dense(self) -> jax.Array:
        size, blocks = math.prod(self.stored), self.absmax.shape[-1]
        front = self.codes.shape[:-1]
        bytes_ = _padded(self.codes, blocks * BLOCK // 2)
        halves = bytes_[..., None] >> np.array([4, 0], np.uint8).reshape(*[1] * len(front), 1, 2)
        levels = _looked_up(LEVELS, halves & 15).reshape(*front, blocks, BLOCK)
        w = (levels * self.magnitudes()[..., None]).reshape(*front, blocks * BLOCK)
        w = w[..., :size].reshape(*front, *self.stored).astype(self.dtype)
        n = len(front)
        return w.transpose(*range(n), *(n + i for i in self.order))

    def stacked(self) -> Any:
        if not self.batch:
            raise WeightError(f"scan runs along an input or output axis of {self.path!r}")
        return jax.tree.map(lambda _: True, self)

    def specs(self, spec: Sequence[Any], sizes: Mapping[str, int]) -> Any:
        """The run of numbers in equal parts, over as many of the devices in `spec` as it can be.

        A part is whole rows of the first axis of `stored` and whole blocks of 64; where parts are
        not whole blocks of 256 magnitudes, these few numbers stay whole. Layers are never cut: a
        scan over them would first gather all of them on every device.
        """
        ours = [*spec, *[None] * (self.ndim - len(spec))][self.batch :]
        first = [ours[self.order.index(i)] for i in range(len(self.stored))]
        names = [n for x in first if x for n in ((x,) if isinstance(x, str) else x)]
        names = [n for n in names if sizes[n] > 1]
        cuts = [c for n in range(len(names) + 1) for c in itertools.combinations(names, n)]
        whole, blocks = math.prod(self.stored), self.absmax.shape[-1]

        def parts(cut: tuple[str, ...]) -> int:
            return math.prod(sizes[name] for name in cut)

        def fits(cut: tuple[str, ...]) -> bool:
            n = parts(cut)
            return n == 1 or (self.stored[0] % n == 0 and whole % (n * BLOCK) == 0)

        best = max(filter(fits, cuts), key=parts)
        last = PartitionSpec(*[None] * self.batch, best) if best else PartitionSpec()
        nested = last if blocks % (parts(best) * NESTED) == 0 else PartitionSpec()
        flags: dict[str, Any] = dict(codes=last, absmax=last)
        if self.nested is not None:
            flags |= dict(nested=nested, offset=PartitionSpec())
        return dataclasses.replace(self, **flags)

    # Other views of the same codes: layers, whole blocks, or the matrix transposed.

    def rule_transpose(self, args: Sequence[Any], at: int, params: Any) -> Any:
        n, permutation = self.batch, params["permutation"]
        if tuple(permutation[:n]) != tuple(range(n)):
            return NotImplemented
        order = tuple(self.order[i - n] for i in permutation[n:])
        return dataclasses.replace(self, order=order)

    def _layers(self, cut: Any) -> NF4:
        return jax.tree.map(cut, self)

    @property
    def _first(self) -> int:
        """The weight's axis along which the codes run slowest."""
        return self.batch + self.order.index(0)

    def _run(self, start: Any, count: int) -> NF4:
        """`count` entries of the first axis of `stored`, from `start` on: whole blocks.

        Magnitudes are looked up first: theirs of 256 need not begin where the run does.
        """
        entry = math.prod(self.stored[1:])
        last = self.batch  # the axis of the arrays that runs over numbers

        def cut(x: jax.Array, each: int) -> jax.Array:
            at, size = start * entry // each, -(-count * entry // each)
            return jax.lax.dynamic_slice_in_dim(x, at, size, last)

        codes, absmax = cut(self.codes, 2), cut(self.magnitudes(), BLOCK)
        parts: dict[str, Any] = dict(codes=codes, absmax=absmax, nested=None, offset=None)
        return dataclasses.replace(self, **parts, stored=(count, *self.stored[1:]))

    def rule_slice(self, args: Sequence[Any], at: int, params: Any) -> Any:
        strides = params["strides"] or (1,) * self.ndim
        cuts = [
            slice(*b)
            for b in zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        ]
        layers = self._layers(lambda x: x[tuple(cuts[: self.batch])])
        whole = [slice(0, size, 1) for size in self.shape]
        inside = {i for i in range(self.batch, self.ndim) if cuts[i] != whole[i]}
        if not inside:
            return layers
        run, entry = cuts[self._first], math.prod(self.stored[1:])
        ends = run.stop == self.stored[0] or run.stop * entry % BLOCK == 0
        if inside != {self._first} or run.step != 1 or run.start * entry % BLOCK or not ends:
            return NotImplemented
        return layers._run(run.start, run.stop - run.start)

    def rule_split(self, args: Sequence[Any], at: int, params: Any) -> Any:
        axis, start, parts = params["axis"], 0, []
        for size in params["sizes"]:
            begin, end = [0] * self.ndim, list(self.shape)
            begin[axis], end[axis] = start, start + size
            part = self.rule_slice(
                [self], 0, dict(start_indices=begin, limit_indices=end, strides=None)
            )
            if part is NotImplemented:
                return NotImplemented
            parts.append(part)
            start += size
        return parts

    def rule_dynamic_slice(self, args: Sequence[Any], at: int, params: Any) -> Any:
        sizes, starts, n = params["slice_sizes"], args[1:], self.batch
        if at != 0:
            return NotImplemented

        def cut(x: jax.Array) -> jax.Array:
            for axis in range(n):
                x = jax.lax.dynamic_slice_in_dim(x, starts[axis], sizes[axis], axis)
            return x

        inside = {i for i in range(n, self.ndim) if sizes[i] != self.shape[i]}
        if not inside:
            return self._layers(cut)
        if inside != {self._first} or math.prod(self.stored[1:]) % BLOCK:
            return NotImplemented  # where it begins is not known before the program runs
        return self._layers(cut)._run(starts[self._first], sizes[self._first])

    def rule_reshape(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """Of the axes before the matrix's: layers in groups, or one layer without its axis."""
        sizes, matrix = tuple(params["new_sizes"]), self.shape[self.batch :]
        front = sizes[: len(sizes) - len(matrix)]
        if params.get("dimensions") is not None or sizes != (*front, *matrix):
            return NotImplemented
        return self._layers(lambda x: x.reshape(*front, *x.shape[self.batch :]))

    def rule_squeeze(self, args: Sequence[Any], at: int, params: Any) -> Any:
        axes = tuple(params["dimensions"])
        if any(axis >= self.batch for axis in axes):
            return NotImplemented
        return self._layers(lambda x: jnp.squeeze(x, axes))

    def rule_broadcast_in_dim(self, args: Sequence[Any], at: int, params: Any) -> Any:
        """One weight for a stack of layers: new axes in front."""
        new = len(params["shape"]) - self.ndim
        last = tuple(range(new, len(params["shape"])))
        if len(args) > 1 or tuple(params["broadcast_dimensions"]) != last:
            return NotImplemented
        front = tuple(params["shape"][:new])
        if (*front, *self.shape) != tuple(params["shape"]):
            return NotImplemented
        return self._layers(lambda x: jnp.broadcast_to(x, (*front, *x.shape)))

    # Times a scalar: the magnitudes take it.

    def _times(self, factor: Any) -> NF4:
        factor = jnp.asarray(factor, jnp.float32)
        if self.nested is None or self.offset is None:
            return dataclasses.replace(self, absmax=self.absmax * factor)
        return dataclasses.replace(self, nested=self.nested * factor, offset=self.offset * factor)

    def rule_neg(self, args: Sequence[Any], at: int, params: Any) -> Any:
        return self._times(-1.0)

    def rule_mul(self, args: Sequence[Any], at: int, params: Any) -> Any:
        return self._times(args[1 - at]) if jnp.ndim(args[1 - at]) == 0 else NotImplemented

    def rule_div(self, args: Sequence[Any], at: int, params: Any) -> Any:
        if at != 0 or jnp.ndim(args[1]) != 0:
            return NotImplemented
        return self._times(1.0 / jnp.asarray(args[1], jnp.float32))


def nf4(
    w: Any, *, batch: int = 0, order: tuple[int, ...] = (1, 0), double: bool = True, path: str = ""
) -> NF4:
    """`w` quantised; layer by layer, so that only one layer's numbers are in float32 at a time.

    Args:
      w: [*batch, …], any float dtype.
      batch: how many leading axes are layers or experts; each has blocks of its own.
      order: see `NF4`; the codes are in the order of W transposed by it: (1, 0) for a kernel
        (in, out), which PyTorch holds as (out, in), (0, 1) for an embedding.
      double: whether the magnitudes are quantised too.
    """
    front, matrix = tuple(w.shape[:batch]), tuple(w.shape[batch:])
    if sorted(order) != list(range(len(matrix))):
        raise UserError(f"order {order} is no order of the axes of {matrix}, at {path!r}")
    back = tuple(int(i) for i in np.argsort(order))
    quantised = functools.partial(_quantised, back=back, double=double)
    layers = jnp.reshape(w, (-1, *matrix))
    made = jax.lax.map(quantised, layers) if batch else quantised(layers[0])
    parts = jax.tree.map(lambda x: x.reshape(*front, *x.shape[1:]), made) if batch else made
    stored = tuple(matrix[i] for i in back)
    return NF4(**parts, stored=stored, order=order, dtype_name=jnp.dtype(w.dtype).name, path=path)


def _quantised(w: jax.Array, *, back: tuple[int, ...], double: bool) -> dict[str, jax.Array]:
    """The arrays of one matrix."""
    numbers = w.astype(jnp.float32).transpose(back).reshape(-1)
    size = numbers.shape[0]
    blocks = -(-size // BLOCK)
    index, absmax = _nearest(LEVELS, numbers, BLOCK)
    index = _padded(index[:size], -(-size // 2) * 2, fill=7)  # 7: the level 0
    parts = {"codes": (index[0::2] << 4) | index[1::2], "absmax": absmax}
    if not double:
        return parts
    offset = jnp.mean(absmax)
    index, nested = _nearest(DYNAMIC_LEVELS, absmax - offset, NESTED)
    return {**parts, "absmax": index[:blocks], "nested": nested, "offset": offset}


def _nearest(levels: np.ndarray, x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """(uint8 [blocks · block] indices of levels, float32 [blocks] magnitudes) of x, 0 at its end.

    An index is the number of middles between neighbouring levels that the number exceeds.
    """
    blocks = _padded(x, -(-x.shape[0] // block) * block).reshape(-1, block)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = blocks / jnp.where(absmax > 0, absmax, 1.0)[:, None]
    middles = (levels[1:] + levels[:-1]) / 2
    index = jnp.searchsorted(middles, scaled.reshape(-1), method="compare_all")
    return index.astype(jnp.uint8), absmax


def _looked_up(levels: np.ndarray, index: jax.Array) -> jax.Array:
    return jnp.asarray(levels).at[index].get(mode="promise_in_bounds")


def _padded(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
    """x with its last axis lengthened to `size`."""
    more = size - x.shape[-1]
    if not more:
        return x
    return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, more)], constant_values=fill)
