"""Sites: named points in a model where a method may act on activations.

A block calls ``site(self, "out", x)`` where something could be inserted. The call is the identity
unless the Linen variable collection ``"sites"`` holds a `Site` at that module's path, e.g.
``variables["sites"]["layers[0:4]"]["attention"]["kv"]``. Models know sites, never methods.

The points every text family offers, and what ``fn`` gets (``**ctx`` must be accepted, whole):

=============== ============================ ================================================
site            fn                           context
=============== ============================ ================================================
embed/tokens    (params, x_BTD) -> x_BTD     tokens [B, T]: new rows for some of the tokens
embed/out       (params, x_BTD) -> x_BTD     tokens [B, T]
in              (params, x_BTD) -> x_BTD     tokens [B, T]: what a layer reads, with the prompt of
                                             embed/out in front where it is part of the call
attention/kv    (params, k, v) -> (k, v)     inputs x_BTD; k and v are [B, S, K, H], after
                                             rotary embedding (and after the cache, if any)
attention/out   (params, x_BTD) -> x_BTD     inputs: what the attention read (after the norm)
mlp/out         (params, x_BTD) -> x_BTD     inputs: what the MLP read (after the norm)
out             (params, x_BTD) -> x_BTD     none: what a layer passes on
=============== ============================ ================================================

``attention``, ``mlp``, ``in`` and ``out`` are of each layer: ``layers[0:4]/in``.

``length`` is by how much ``fn`` lengthens the sequence, at its start: allowed for embed/out (soft
prompts) and attention/kv (prefixes), zero for the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from lora_jax.errors import UserError

COLLECTION = "sites"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Site:
    """What a method puts at a site.

    Attributes:
      params: pytree of arrays. Inside a stack of layers (``layers[0:N]``) every array has a leading
        axis of N and the function sees one layer's slice.
      fn: hashable function, see the module's table. Static: a new function means a new compile.
      length: positions that ``fn`` adds at the start of the sequence. Static.
    """

    params: Any
    fn: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(default=0, metadata={"static": True})


def find(module: nn.Module, name: str) -> Site | None:
    """The `Site` called `name` at `module`'s path, or None."""
    if not module.has_variable(COLLECTION, name):
        return None
    found: Any = module.get_variable(COLLECTION, name)
    if not isinstance(found, Site):
        where = "/".join((*module.path, name))
        raise UserError(f"sites[{where!r}] holds a {type(found).__name__}; put a Site there.")
    return found


def site(
    module: nn.Module, name: str, *values: jax.Array, may_lengthen: bool = False, **context: Any
) -> Any:
    """Applies the `Site` called `name` at `module`'s path to `values`, or returns them unchanged.

    Args:
      module: the bound Linen module that offers the site.
      name: the site's name within the module, such as ``"out"``.
      *values: one or more arrays, [B, T, ...].
      may_lengthen: whether a longer sequence (axis 1) is meaningful here.
      **context: further values for ``fn``.

    Returns:
      One array for one value, else a tuple.

    Raises:
      UserError: a wrong number of results, or a sequence whose length is not what `Site.length`
        says.
    """
    found = find(module, name)
    if found is None:
        return values[0] if len(values) == 1 else values
    where = "/".join((*module.path, name))
    if found.length and not may_lengthen:
        raise UserError(f"site {where} cannot lengthen the sequence; use Site(length=0).")
    result = found.fn(found.params, *values, **context)
    results = result if isinstance(result, tuple) else (result,)
    if len(results) != len(values):
        raise UserError(
            f"site {where}: the function must return {len(values)} array(s), not {len(results)}."
        )
    for before, after in zip(values, results, strict=True):
        wanted = (before.shape[0], before.shape[1] + found.length, *before.shape[2:])
        if after.shape != wanted:
            raise UserError(
                f"site {where}: the function returned shape {after.shape}, but "
                f"length={found.length} calls for {wanted}."
            )
    # A float32 adapter must not turn a bfloat16 model into a float32 one.
    results = tuple(a.astype(b.dtype) for a, b in zip(results, values, strict=True))
    return results[0] if len(values) == 1 else results


def length_at(variables: Mapping[str, Any], *path: str) -> int:
    """By how much the site at `path` (say ``"embed", "out"``) lengthens the sequence; 0 if none."""
    node: Any = variables.get(COLLECTION, {})
    for part in path:
        if not isinstance(node, Mapping) or part not in node:
            return 0
        node = node[part]
    return node.length if isinstance(node, Site) else 0


def prompt_length(variables: Mapping[str, Any]) -> int:
    """Positions that ``embed/out`` prepends: what a KV cache must have room for besides tokens."""
    return length_at(variables, "embed", "out")
