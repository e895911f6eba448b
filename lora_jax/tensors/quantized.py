"""`quantize`: a parameter tree whose large matrices are NF4 or int8 weights, and what that costs.

LoRA over such a tree is QLoRA (Dettmers et al. 2023, arXiv:2305.14314): a `LowRank` leaf stands
over a quantised one as over any other weight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import partition
from lora_jax.errors import UserError, nearest
from lora_jax.tensors.base import densify, is_weight
from lora_jax.tensors.int8 import Int8, int8
from lora_jax.tensors.nf4 import nf4

KINDS = ("nf4", "int8")
DEFAULT = r"(^|/)(attention|mlp)/[^/]+/kernel$"
"""Where `quantize(params, "nf4")` acts: not on embeddings, norms, biases or heads."""


def quantize(params: Any, rules: Any = "nf4", *, device: Any = None) -> Any:
    """The tree with some leaves quantised and all others as they are.

    One leaf (a stack of layers is one) after the other: besides what is done, only one leaf's
    numbers are on the device at a time if `params` lie elsewhere.

    Args:
      params: arrays, of NumPy or of JAX on any device.
      rules: "nf4" or "int8" for the kernels of attention and MLP (`DEFAULT`), or ordered (regex,
        "nf4" | "int8" | None) over expanded paths, of which the first match counts; what none
        matches stays. Vectors stay, whatever matches them.
      device: a Device or Sharding that every leaf ends on; None: where it is.

    Raises:
      UserError: a rule that matches nothing or names another kind, one that treats the layers of
        a stack differently, or a leaf that is neither a matrix nor a convolution's kernel.
    """
    pairs = ((DEFAULT, rules),) if isinstance(rules, str) else rules
    ordered = partition.Rules.of(pairs)
    for _, kind in ordered.rules:
        if kind is not None and kind not in KINDS:
            raise UserError(f"quantize: the kind {kind!r} is unknown; {nearest(str(kind), KINDS)}")
    flat = partition.flatten(params)
    ordered.check([e for p in flat for e in partition.expand(p)], "quantize")
    new = {}
    for path, leaf in flat.items():
        new[path] = leaf if device is None or is_weight(leaf) else jax.device_put(leaf, device)
        if (kind := _kind(ordered, path, leaf)) is not None:
            new[path] = _quantised(path, new[path], kind)
            if device is not None:
                new[path] = jax.device_put(new[path], device)
    return partition.unflatten_like(params, new)


def _kind(ordered: partition.Rules, path: str, leaf: Any) -> str | None:
    kinds = {ordered.get(e) for e in partition.expand(path)}
    if len(kinds) > 1:
        raise UserError(
            f"quantize: the rules treat the layers of {path!r} differently ({kinds}); cut it first "
            "(lora_jax.partition.split_stacks)"
        )
    stacked = partition.stack_of(path) is not None
    if len(leaf.shape) - stacked < 2:
        return None
    kind = kinds.pop()
    if kind is not None and (is_weight(leaf) or isinstance(leaf, partition.Hole)):
        raise UserError(f"quantize: {path!r} is a {type(leaf).__name__} already")
    return kind


def _quantised(path: str, leaf: Any, kind: str) -> Any:
    batch = int(partition.stack_of(path) is not None)
    # As PyTorch has them: (out, in), an embedding as it is, a convolution (out, in, height, width).
    orders = {2: (1, 0), 4: (2, 3, 1, 0)}
    order = orders.get(len(leaf.shape) - batch)
    if order is None or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise UserError(
            f"quantize: {path!r} of shape {tuple(leaf.shape)} and dtype {leaf.dtype} is neither a "
            "matrix nor a convolution's kernel: put (its path, None) before the rules"
        )
    if partition.module(path) != path and partition.is_embedding(path):
        order = (0, 1)
    made = _program(kind, batch, order)(leaf)
    if isinstance(made, Int8):
        made = dataclasses.replace(made, w=dataclasses.replace(made.w, path=path))
    return dataclasses.replace(made, path=path)


@functools.cache
def _program(kind: str, batch: int, order: tuple[int, ...]) -> Any:
    """Compiled once for all leaves of a shape."""
    if kind == "nf4":
        return jax.jit(functools.partial(nf4, batch=batch, order=order))
    return jax.jit(functools.partial(int8, batch=batch))


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two arrays of one shape, elementwise.

    Attributes:
      largest: the largest absolute difference.
      rms: the root of its mean square.
      relative: rms over the root mean square of the first array.
    """

    largest: float
    rms: float
    relative: float


def differences(first: Any, second: Any) -> Mapping[str, Difference]:
    """`Difference` of two trees by path, where they differ; weights count as what they stand for.

    `differences(params, quantize(params))` is the error of quantisation.
    """
    one, two = partition.flatten(first), partition.flatten(second)
    if set(one) != set(two):
        odd = sorted(set(one) ^ set(two))
        raise UserError(f"the trees have different paths: {', '.join(odd[:4])}")
    found = {p: _difference(densify(one[p]), densify(two[p])) for p in one}
    return {p: d for p, d in found.items() if d.largest}


def _difference(x: Any, y: Any) -> Difference:
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    gap = jnp.abs(x - y)
    rms, own = (float(jnp.sqrt(jnp.mean(jnp.square(v)))) for v in (gap, x))
    return Difference(float(jnp.max(gap)), rms, rms / own if own else 0.0)
