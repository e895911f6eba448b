"""What is lost where an adapter is merged into another base than the one it was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.methods.base import Method, Trainable
from lora_jax.tensors.quantized import Difference, differences


@dataclasses.dataclass(frozen=True)
class MergeError:
    """What `merge_error` finds.

    Attributes:
      weights: of the merged weights, by path, where they differ.
      outputs: of what the model gives; None where no outputs were asked for.
    """

    weights: Mapping[str, Difference]
    outputs: Difference | None = None

    def __str__(self) -> str:
        rows = [("weights", "largest", "rms", "relative")]
        named = {**self.weights, **({"outputs": self.outputs} if self.outputs else {})}
        rows += [
            (p, f"{d.largest:.3g}", f"{d.rms:.3g}", f"{d.relative:.3g}") for p, d in named.items()
        ]
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{a:<{width}} {b:>9} {c:>9} {d:>9}" for a, b, c, d in rows)


def merge_error(
    method: Method,
    trained_on: Any,
    into: Any,
    trainable: Trainable,
    outputs: Callable[[Any], Any] | None = None,
) -> MergeError:
    """How far the base `into`, merged, is from the base `trained_on` with the adapter beside it.

    An adapter of a quantised base may be merged into it: `method.merge(quantised, trainable)` is
    the dequantised base plus the update, and computes what was trained up to rounding. Merged
    into the dense base it came from, it differs by the error of quantisation, which is what this
    states. Where a method's update depends on the base (DoRA, PiSSA), by that too.

    Args:
      trained_on: the base that the adapter belongs to, such as `lora_jax.quantize(params)`.
      into: the base to merge into: the same paths and shapes.
      outputs: a function of variables, such as `lambda v: apply(v, tokens)` with an adapted
        `apply`: then also what the model gives is compared.
    """
    merged = method.merge(into, trainable)
    weights = differences(merged, method.merge(trained_on, trainable))
    if outputs is None:
        return MergeError(weights)
    beside = outputs(method.combine(method.frozen(trained_on), trainable))
    found = differences({"outputs": beside}, {"outputs": outputs({"params": merged})})
    return MergeError(weights, found.get("outputs", Difference(0.0, 0.0, 0.0)))
