"""Builds a parameter tree from a source of tensors: each leaf straight into its shards."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.models.family import TensorSpec
from lora_jax.pretrained.source import Index, TensorSource

SHOWN = 8  # names listed per kind of mistake


def leaf_shape(spec: TensorSpec, layers: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the leaf that holds the layers from the first to before the second."""
    start, stop = layers
    return ((stop - start,) if spec.layers else ()) + tuple(spec.our_shape)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from paths."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def abstract_params(
    specs: Sequence[TensorSpec], dtype: Any = jnp.float32, cuts: Collection[int] = ()
) -> dict[str, Any]:
    """The tree of shapes (`jax.ShapeDtypeStruct`) that `assemble` would load: costs nothing.

    `cuts` are layers at which stacks are cut besides where their specs say.
    """
    flat = {}
    for spec in specs:
        for path, layers in spec.segments(cuts):
            flat[path] = jax.ShapeDtypeStruct(leaf_shape(spec, layers), dtype)
    return nest(flat)


def check_tensors(
    source: TensorSource, specs: Sequence[TensorSpec], ignored: Sequence[str] = ()
) -> None:
    """UserError that lists every missing, unknown and misshapen tensor at once."""
    wanted = {hf: spec for spec in specs for _, hf in spec.expand()}
    stored = source.shapes
    skip = re.compile("|".join(f"(?:{p})" for p in ignored)) if ignored else None
    missing = [n for n in wanted if n not in stored]
    unknown = [n for n in stored if n not in wanted and not (skip and skip.fullmatch(n))]
    misshapen = [
        f"{n} is {list(stored[n])}, should be {list(spec.shape)}"
        for n, spec in wanted.items()
        if n in stored and tuple(stored[n]) != tuple(spec.shape)
    ]
    if not (missing or unknown or misshapen):
        return
    lines = [f"the tensors of {source.describe()} are not those its config asks for:"]
    lines += _listed("missing", [_with_nearest(n, unknown) for n in missing[:SHOWN]], len(missing))
    lines += _listed("unknown", [_with_nearest(n, missing) for n in unknown[:SHOWN]], len(unknown))
    lines += _listed("of another shape", misshapen[:SHOWN], len(misshapen))
    lines.append("is config.json the one that belongs to these tensors?")
    raise UserError("\n  ".join(lines))


def _with_nearest(name: str, others: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.7)
    return f"{name} (nearest: {close[0]})" if close else name


def _listed(kind: str, shown: Sequence[str], total: int) -> list[str]:
    if not total:
        return []
    more = f", and {total - len(shown)} more" if total > len(shown) else ""
    return [f"{kind} ({total}): {', '.join(shown)}{more}"]


Choice = Callable[[str, tuple[int, ...], bool], Sharding | None]
"""(path of a leaf, its shape, whether it is stacked) -> its sharding."""


def sharding_of(shardings: Any, mesh: Mesh | None) -> Choice:
    """Where each leaf goes.

    `shardings` may be None (one device, or replicated over `mesh`), a Sharding for every leaf, a
    function of (path, shape), a tree or flat dict of Shardings, or ordered (regex, PartitionSpec)
    rules over expanded paths. A rule speaks of one layer; the layer axis is not sharded.
    """
    if shardings is None:
        every = NamedSharding(mesh, PartitionSpec()) if mesh is not None else None
        return lambda path, shape, stacked: every
    if isinstance(shardings, Sharding):
        return lambda path, shape, stacked: shardings
    if isinstance(shardings, Mapping):
        flat = partition.arrays(shardings)

        def look_up(path: str, shape: tuple[int, ...], stacked: bool) -> Sharding:
            if path not in flat:
                raise UserError(f"shardings: nothing given for {path!r}")
            return flat[path]

        return look_up
    if callable(shardings):
        return lambda path, shape, stacked: shardings(path, shape)
    if mesh is None:
        raise UserError("shardings given as (regex, PartitionSpec) rules need a mesh")
    rules = shardings if isinstance(shardings, partition.Rules) else partition.Rules.of(shardings)

    def by_rule(path: str, shape: tuple[int, ...], stacked: bool) -> Sharding:
        axes = rules.get(partition.expand(path)[0], PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(None, *axes) if stacked else axes)

    return by_rule


def assemble(
    source: TensorSource,
    specs: Sequence[TensorSpec],
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    shardings: Any = None,
    ignored: Sequence[str] = (),
) -> dict[str, Any]:
    """The parameter tree of `specs`, each leaf [layers, *our shape] or [*our shape] in `dtype`.

    With a mesh, every process reads only the slices its own devices hold, and no leaf ever
    exists whole in one place unless it is replicated.
    """
    check_tensors(source, specs, ignored)
    choose = sharding_of(shardings, mesh)
    flat = {}
    for spec in specs:
        for path, layers in spec.segments():
            shape = leaf_shape(spec, layers)
            sharding = choose(path, shape, spec.layers > 0)
            if sharding is None:
                block = _block(source, spec, dtype, layers, _everything(shape))
                flat[path] = jax.device_put(block)
            else:
                flat[path] = _sharded(source, spec, dtype, layers, sharding)
    return nest(flat)


def _sharded(
    source: TensorSource,
    spec: TensorSpec,
    dtype: Any,
    layers: tuple[int, int],
    sharding: Sharding,
) -> jax.Array:
    shape = leaf_shape(spec, layers)
    # Devices that hold the same slice (replicas) share one read.
    blocks: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def fetch(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index if index is not None else _everything(shape)
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        if key not in blocks:
            blocks[key] = _block(source, spec, dtype, layers, tuple(slice(*k) for k in key))
        return blocks[key]

    return jax.make_array_from_callback(shape, sharding, fetch)


def _everything(shape: tuple[int, ...]) -> Index:
    return tuple(slice(0, n) for n in shape)


def _block(
    source: TensorSource, spec: TensorSpec, dtype: Any, layers: tuple[int, int], index: Index
) -> np.ndarray:
    """The slice `index` of the leaf that holds `layers`, as a NumPy array in `dtype`."""
    rows, inner = (index[0], index[1:]) if spec.layers else (None, index)
    theirs = _their_index(spec, inner)
    if rows is None:
        return np.ascontiguousarray(_ours(source.read(spec.name, theirs), spec), dtype=dtype)
    numbers = range(*layers)[rows]
    sizes = [len(range(*s.indices(n))) for s, n in zip(inner, spec.our_shape, strict=True)]
    out = np.empty((len(numbers), *sizes), dtype)
    for at, layer in enumerate(numbers):
        out[at] = _ours(source.read(spec.name.format(i=layer), theirs), spec)
    return out


def _their_index(spec: TensorSpec, inner: Index) -> Index:
    """The slice of the stored tensor that is the slice `inner` of our leaf (of one layer)."""
    if spec.part is not None:
        size = spec.our_shape[-1]
        start, stop, _ = inner[-1].indices(size)
        skip = spec.part[0] * size
        inner = (*inner[:-1], slice(skip + start, skip + stop))
    return inner[::-1] if spec.op == "transpose" else inner


def _ours(tensor: np.ndarray, spec: TensorSpec) -> np.ndarray:
    return tensor.T if spec.op == "transpose" else tensor
