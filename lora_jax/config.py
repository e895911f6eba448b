"""From a config file to frozen dataclasses, once, at the edge.

Defaults live in the dataclasses only. A config file names what it changes; `expand` fills in the
rest, so that a saved config is complete and every field can be overridden on the command line.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import hashlib
import importlib.util
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.errors import UserError, nearest

Kinds = Mapping[str, type]


def load_file(spec: str) -> dict[str, Any]:
    """`get_config(arg)` of `path.py` or `path.py:arg`, as plain dicts."""
    path, _, arg = spec.partition(":")
    module = load_module(path)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path!r} defines no get_config(arg)")
    config = module.get_config(arg) if arg else module.get_config()
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def load_module(spec: str) -> types.ModuleType:
    """The module of a config file, `path.py` or `path.py:arg`.

    It may import what lies beside it, as a script may, also later, in its functions: its folder
    stays at the end of `sys.path`.
    """
    path = spec.partition(":")[0]
    if not Path(path).is_file():
        raise UserError(f"no config file {path!r}")
    full = Path(path).resolve()
    name = f"lora_jax_config_{hashlib.sha256(str(full).encode()).hexdigest()[:12]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{path!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    if (folder := str(full.parent)) not in sys.path:
        sys.path.append(folder)
    sys.modules[name] = module  # dataclasses look their module up there
    module_spec.loader.exec_module(module)
    return module


def parse_arg(arg: str, **defaults: Any) -> types.SimpleNamespace:
    """`"steps=20,fast"` over typed defaults; an unknown key or a wrong type is a UserError.

    A key alone is true, if it is one of a bool. Where the default is text, what is given is too.
    """
    values = dict(defaults)
    for part in filter(None, arg.split(",")):
        key, equals, text = part.partition("=")
        if key not in defaults:
            raise UserError(f"config argument {key!r} is unknown; {nearest(key, defaults)}")
        kind = type(defaults[key])
        if not equals and kind is not bool:
            raise UserError(f"config argument {key!r} needs a value: {key}=…")
        given = (text if kind is str else literal(text)) if equals else True
        values[key] = convert(given, kind, f"config argument {key!r}")
    return types.SimpleNamespace(**values)


def literal(text: str) -> Any:
    """A Python literal, or the text itself where it is none. `true`, `false`, `none` too."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def override(config: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Applies `method.rank=4` and the like to an expanded config; unknown keys are UserErrors.

    Changing a `kind` drops the fields of the old kind, so put it before the fields of the new; it
    also begins what is None (`evaluation.forgetting.kind=files`).
    """
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"{assignment!r}: write --config.key=value")
        config = assign(config, dotted, literal(text))
    return config


def assign(config: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy of an expanded config with the value at `method.rank` and the like replaced."""
    config = copy.deepcopy(config)
    *parents, last = dotted.split(".")
    node: Any = config
    for at, key in enumerate([*parents, last]):
        # A field of a kind need not be there, since it has a default; nothing is below it.
        is_field = isinstance(node, dict) and "kind" in node and at == len(parents)
        if not isinstance(node, dict) or (key not in node and not is_field):
            known = node if isinstance(node, dict) else ()
            where = ".".join([*parents, last][:at]) or "the config"
            if node is None:
                raise UserError(f"{where} is none; set {where}.kind first, if it has kinds")
            raise UserError(f"{where} has no key {key!r}; {nearest(key, known)}")
        if at < len(parents):
            if node[key] is None and [*parents, last][at + 1] == "kind":
                node[key] = {"kind": None}  # there was none: it begins with its kind
            node = node[key]
    if last == "kind" and node["kind"] != value:
        node.clear()
    node[last] = value
    return config


def build(cls: Any, value: Any, kinds: Mapping[str, Kinds], path: str = "config") -> Any:
    """The dataclass `cls` from nested mappings.

    Args:
      kinds: for the name of a field annotated Any, the classes its `kind` chooses among.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{path} must be a mapping, not {value!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            raise UserError(f"{path} has no key {key!r}; {nearest(str(key), fields)}")
    built = {}
    for name, item in value.items():
        where = f"{path}.{name}"
        if name in kinds and hints[name] is Any:
            optional = fields[name].default is None and item is None
            built[name] = None if optional else _of_kind(item, kinds[name], kinds, where)
        elif dataclasses.is_dataclass(hints[name]):
            built[name] = build(hints[name], item, kinds, where)
        else:
            built[name] = convert(item, hints[name], where)
    try:
        return cls(**built)
    except TypeError as error:
        raise UserError(f"{path}: {error}") from None


def _of_kind(value: Any, classes: Kinds, kinds: Mapping[str, Kinds], path: str) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"{path} must be a mapping with a kind, not {value!r}")
    rest = dict(value)
    kind = rest.pop("kind", None)
    if not isinstance(kind, str) or kind not in classes:
        raise UserError(f"{path}.kind is {kind!r}; {nearest(str(kind), classes)}")
    return build(classes[kind], rest, kinds, path)


def convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotated type, where that loses nothing; UserError otherwise.

    NumPy's scalars, as of a sweep over `2 ** np.arange(9)`, become Python's: they can be saved.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if hint is Any:
        return _frozen(value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return convert(value, option, path)
            except UserError:
                continue
    elif origin is typing.Literal and value in args:
        return value
    elif hint is tuple and isinstance(value, list | tuple):
        return _frozen(value)
    elif origin is tuple and isinstance(value, list | tuple):
        each = (args[0],) * len(value) if args[1:] == (...,) else args
        if len(each) == len(value):
            return tuple(convert(x, t, path) for x, t in zip(value, each, strict=True))
    elif (origin or hint) in (dict, Mapping) and isinstance(value, Mapping):
        return dict(value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif (hint in (type(None),) and value is None) or (
        isinstance(hint, type) and type(value) is hint
    ):
        return value
    raise UserError(f"{path} must be {_in_words(hint)}, not {value!r}{_advice(value, hint)}")


def _in_words(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, args))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        if args[1:] == (...,):
            return f"a list, of {_in_words(args[0])} each"
        return f"a list of {len(args)}: {', '.join(map(_in_words, args))}"
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _advice(value: Any, hint: Any) -> str:
    """For the end of a message: the nearest word, or how a number is written as text."""
    options = typing.get_args(hint) or (hint,)
    words = [x for o in (hint, *options) if typing.get_origin(o) is typing.Literal
             for x in typing.get_args(o) if isinstance(x, str)]  # fmt: skip
    if words and isinstance(value, str):
        return f"; {nearest(value, words)}"
    if str in options and (value is None or isinstance(value, int | float)):
        return f"; in quotes, \"'{str(value).lower()}'\", it is text"
    return ""


def plain(value: Any) -> Any:
    """The value with Python's numbers in place of NumPy's, which JSON cannot hold."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def expand(obj: Any, kinds: Mapping[str, Kinds]) -> Any:
    """The complete plain form of a built dataclass: what is saved and overridden."""
    if dataclasses.is_dataclass(obj):
        out = {}
        for field in dataclasses.fields(obj):
            item = getattr(obj, field.name)
            out[field.name] = expand(item, kinds)
            if field.name in kinds and dataclasses.is_dataclass(item):
                kind = next(k for k, c in kinds[field.name].items() if c is type(item))
                out[field.name] = {"kind": kind, **out[field.name]}
        return out
    if isinstance(obj, tuple | list):
        return [expand(x, kinds) for x in obj]
    return dict(obj) if isinstance(obj, Mapping) else obj
