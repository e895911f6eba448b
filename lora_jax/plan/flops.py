"""Floating-point operations of a traced function, counted from its jaxpr.

A compiler's own figure counts the body of a loop once, however often it runs (XLA's
`cost_analysis`), so a model whose layers are scanned looks as cheap as one layer. The jaxpr still
knows the number of iterations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from jax.extend import core as jex


@dataclasses.dataclass(frozen=True)
class Flops:
    """A count, over all devices together.

    Attributes:
      total: of matrix products and convolutions, a multiplication and an addition being two.
        Elementwise work is left out, as is usual: in a transformer it is a few per cent.
      unknown: primitives whose work cannot be read off, and that are counted as 0 (a custom
        kernel without a cost estimate) or once (a while loop).
    """

    total: float
    unknown: tuple[str, ...] = ()


def count_flops(closed: jex.ClosedJaxpr) -> Flops:
    """The FLOPs of one call of a jaxpr, such as `jax.jit(f).trace(*args).jaxpr`.

    The body of a scan counts as often as it runs, the body of a `shard_map` once for each of its
    devices, and of the branches of a `cond` the dearest.
    """
    unknown: set[str] = set()
    total = _jaxpr(closed.jaxpr, unknown)
    return Flops(total, tuple(sorted(unknown)))


def _jaxpr(jaxpr: jex.Jaxpr, unknown: set[str]) -> float:
    return sum(_equation(eqn, unknown) for eqn in jaxpr.eqns)


def _equation(eqn: Any, unknown: set[str]) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name in _PRODUCTS:
        return _PRODUCTS[name](eqn)
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        if estimate is None:
            unknown.add(name)
            return 0.0
        return float(estimate.flops)
    if name == "cond":
        return max(_jaxpr(branch.jaxpr, unknown) for branch in params["branches"])
    inner = sum(_jaxpr(body, unknown) for body in _bodies(params))
    if name == "while" and inner:
        unknown.add(name)
    elif name == "scan":
        inner *= params["length"]
    elif name == "shard_map":
        inner *= math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    elif "call" in name and not inner and not list(_bodies(params)):
        unknown.add(name)  # a foreign function
    return inner


def _bodies(params: dict[str, Any]) -> Iterator[jex.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item


def _dot_general(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _convolution(eqn: Any) -> float:
    numbers = eqn.params["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    # The kernel's input axis already is the features of one group.
    window = math.prod(kernel[i] for i in numbers.rhs_spec[1:])
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * window


def _ragged_dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


_PRODUCTS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged_dot,
}
