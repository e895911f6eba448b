"""NF4 weights that bitsandbytes quantised, from the tensors it writes beside one another."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError
from lora_jax.tensors.nf4 import BLOCK, NESTED, NF4

STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
"""What stands beside a quantised tensor, as suffixes of its name."""


_STATE = {"quant_type": str, "blocksize": int, "shape": list, "dtype": str}


def state_of(packed: np.ndarray, name: str) -> dict[str, Any]:
    """What bitsandbytes says of a quantised tensor, from its bytes; UserError if they are none."""
    try:
        state = json.loads(packed.tobytes())
    except ValueError:
        state = None
    if not isinstance(state, dict) or not all(
        isinstance(state.get(key), kind) for key, kind in _STATE.items()
    ):
        raise UserError(f"{name}.{STATE} is damaged: get the file again")
    return state


def from_bitsandbytes(tensors: Mapping[str, Any], name: str, *, path: str = "") -> NF4:
    """The weight (in, out) of a linear layer, whose tensor `name` is (out, in) and quantised.

    Args:
      tensors: of a checkpoint, as NumPy arrays: `name` (uint8), `name.absmax`,
        `name.quant_state.bitsandbytes__nf4` (JSON as bytes) and, with double quantisation,
        `name.nested_absmax`.

    Raises:
      UserError: a tensor is missing or of another size, or it is not NF4 in blocks of 64 (and 256).
    """

    def of(suffix: str) -> np.ndarray:
        key = f"{name}.{suffix}" if suffix else name
        if key not in tensors:
            raise UserError(f"no tensor {key!r}: is {name!r} quantised to NF4 by bitsandbytes?")
        return np.asarray(tensors[key])

    state = state_of(of(STATE), name)
    nested = "nested_blocksize" in state
    if nested and not isinstance(state.get("nested_offset"), float):
        raise UserError(f"{name}.{STATE} has no nested_offset: get the file again")
    found = (state["quant_type"], state["blocksize"], state.get("nested_blocksize", NESTED))
    if found != ("nf4", BLOCK, NESTED) or len(state["shape"]) != 2:
        raise UserError(f"{name!r} is {found} of shape {state['shape']}, not ('nf4', 64, 256)")
    # Two codes a byte, whatever dtype they are kept as (`bnb_4bit_quant_storage`).
    codes = np.ascontiguousarray(of("")).reshape(-1).view(np.uint8)
    count = math.prod(state["shape"])
    blocks = -(-count // BLOCK)
    sizes = [("bytes of codes", codes.size, -(-count // 2)), ("absmax", of("absmax").size, blocks)]
    if nested:
        sizes.append(("nested_absmax", of("nested_absmax").size, -(-blocks // NESTED)))
    for part, size, wanted in sizes:
        if size != wanted:
            raise UserError(
                f"{name!r} of shape {state['shape']} has {size} {part} and should have {wanted}: "
                "the file is damaged, get it again"
            )
    return NF4(
        codes=jnp.asarray(codes),
        absmax=jnp.asarray(of("absmax")),
        nested=jnp.asarray(of("nested_absmax")) if nested else None,
        offset=jnp.asarray(state["nested_offset"], jnp.float32) if nested else None,
        stored=tuple(state["shape"]),
        order=(1, 0),
        dtype_name=state["dtype"],
        path=path or name,
    )
