"""A method as JSON and back, so that an adapter's file says exactly how it was trained."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from lora_jax.errors import UserError, nearest
from lora_jax.methods import METHODS, Method

VERSION = 1  # of this form; a reader refuses a higher one
_PLAIN = (str, int, float, bool, type(None))


def to_json(method: Method) -> str:
    """`{"version": …, "method": registered name, "fields": {…}}`; methods in fields likewise.

    Raises:
      UserError: the class is not registered, or a field is not made of plain values and tuples.
    """
    return json.dumps({"version": VERSION, **_encode_method(method)}, ensure_ascii=False)


def _encode_method(method: Method) -> dict[str, Any]:
    name = type(method).name
    if METHODS.get(name) is not type(method):
        raise UserError(
            f"{type(method).__name__} cannot be saved, since nothing could find it again: put "
            '@lora_jax.methods.register("a_name") before the class'
        )
    fields = [f.name for f in dataclasses.fields(method) if f.init]
    return {
        "method": name,
        "fields": {f: _encode(getattr(method, f), f"{name}.{f}") for f in fields},
    }


def _encode(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Method):
        return _encode_method(value)
    if isinstance(value, tuple | list):
        return [_encode(x, where) for x in value]
    raise UserError(f"{where} holds a {type(value).__name__}, which an adapter's file cannot keep")


def from_json(text: str, where: str) -> Method:
    """The method that `to_json` wrote.

    Raises:
      UserError: it is not what `to_json` writes, of a later version, or of a method or field
        that is not there.
    """
    try:
        content = json.loads(text)
        version, name = int(content["version"]), str(content["method"])
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{where}: the header's lora_jax.method is damaged") from None
    if version > VERSION:
        raise UserError(f"{where} was saved by a later lora_jax; update it to read this adapter")
    if name not in METHODS:
        raise UserError(
            f"{where} was trained with the method {name!r}: import the module that registers it; "
            f"{nearest(name, METHODS)}"
        )
    return _decode_method(content, where)


def _decode_method(content: dict[str, Any], where: str) -> Method:
    cls = METHODS[content["method"]]
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for field in content["fields"]:
        if field not in known:
            raise UserError(
                f"{where}: {content['method']} has no field {field!r} here ({nearest(field, known)}"
                "): was it saved by another version of lora_jax?"
            )
    return cls(**{f: _decode(v, where) for f, v in content["fields"].items()})


def _decode(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return tuple(_decode(x, where) for x in value)
    return _decode_method(value, where) if isinstance(value, dict) else value
