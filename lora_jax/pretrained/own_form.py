"""Adapters of methods that PEFT does not have: the trainable tree as it is, in the same two files.

adapter_model.safetensors holds its arrays, named by their place in the tree, and in the header
the tree with those names in the arrays' stead (`lora_jax.tree`, JSON).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError

PEFT_TYPE = "LORA_JAX"
KEY = "lora_jax.tree"


def tensors_of(trainable: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], str]:
    """(arrays by name, the tree as JSON). Dicts, lists, tuples, numbers and None may be in it."""
    tensors: dict[str, np.ndarray] = {}
    return tensors, json.dumps(_encode(dict(trainable), "", tensors), ensure_ascii=False)


def _encode(node: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    if isinstance(node, Mapping):
        return {
            str(k): _encode(x, f"{name}.{k}" if name else str(k), tensors) for k, x in node.items()
        }
    if isinstance(node, tuple | list):
        items = [_encode(x, f"{name}.{i}", tensors) for i, x in enumerate(node)]
        return [type(node).__name__, *items]
    if node is None or isinstance(node, bool | int | float):
        return node
    if not isinstance(node, jax.Array | np.ndarray | np.generic):
        raise UserError(f"{name!r} in the trainable tree is a {type(node).__name__}, not an array")
    if partition.is_key(node):
        raise UserError(f"{name!r} in the trainable tree is a random key; only numbers are saved")
    if name in tensors:
        raise UserError(f"two arrays of the trainable tree would be called {name!r}")
    tensors[name] = np.ascontiguousarray(jax.device_get(node)).reshape(node.shape)
    return name


def read(
    tensors: Mapping[str, np.ndarray], tree: str | None, params: Any, where: str
) -> dict[str, Any]:
    """The trainable tree.

    Raises:
      UserError: the tree is damaged or wider than JAX may hold, its layers are cut otherwise than
        those of `params`, or a leaf trained whole has another shape there.
    """
    wide = [n for n, x in tensors.items() if jnp.asarray(x).dtype != x.dtype]
    if wide:
        raise UserError(
            f"{where}: {wide[0]!r} is stored as {tensors[wide[0]].dtype}; enable jax_enable_x64"
        )
    try:
        trainable = _decode(_parsed(tree), tensors)
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{where}: the header's {KEY} is damaged") from None
    _check_fits(trainable, params, where)
    return trainable


def edges(tree: str | None, where: str) -> dict[str, list[int]]:
    """Where the tree's stacks begin and end, by their name; UserError where it is damaged."""
    try:
        paths = list(_parsed(tree))
    except (ValueError, TypeError):
        raise UserError(f"{where}: the header's {KEY} is damaged") from None
    found: dict[str, list[int]] = {}
    for path in paths:
        if (span := partition.stack_of(path)) is not None:
            found.setdefault(partition.stack_name(path), []).extend(span)
    return found


def _parsed(tree: str | None) -> dict[str, Any]:
    content = json.loads(tree or "")
    if not isinstance(content, dict):
        raise TypeError
    return content


def _decode(node: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    if isinstance(node, dict):
        return {k: _decode(x, tensors) for k, x in node.items()}
    if isinstance(node, list):
        items = [_decode(x, tensors) for x in node[1:]]
        return tuple(items) if node[0] == "tuple" else items
    if not isinstance(node, str):
        return node
    return jnp.asarray(tensors[node])


def _check_fits(trainable: Mapping[str, Any], params: Any, where: str) -> None:
    flat = partition.flatten(params)
    ranges = {r for r in map(partition.stack_of, flat) if r is not None}
    for path, value in trainable.items():
        span = partition.stack_of(path)
        if span is not None and span not in ranges:
            edges = {edge for r in map(partition.stack_of, trainable) if r for edge in r}
            cuts = sorted(edges - {0, *(stop for _, stop in ranges)})
            raise UserError(
                f"{where} holds {path!r}, but the parameters' layers are cut as "
                f"{sorted(ranges)}; load them whole and cut them alike: params = "
                f"lora_jax.partition.split_stacks(params, {{'layers': {cuts}}})"
            )
        if path in flat and hasattr(value, "shape") and value.shape != tuple(flat[path].shape):
            raise UserError(
                f"{where} does not fit this model: {path!r} is {list(value.shape)}, the model's "
                f"is {list(flat[path].shape)}"
            )
