"""Which modules an adapter_config.json speaks of, by PEFT's own rules of matching names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax.methods.peft.fused import plain

CLASSIFIERS = frozenset(("classifier", "score"))
"""Modules that PEFT trains whole whenever task_type is SEQ_CLS, with everything inside."""


def lookup(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value PEFT takes from rank_pattern or alpha_pattern: regexes of the name's end."""
    module = plain(module)
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return (pattern or {}).get(module, default)


def is_targeted(config: Mapping[str, Any], module: str, linear: Collection[str], head: str) -> bool:
    """Whether PEFT would adapt the Hugging Face module `module`.

    `linear` are the modules that "all-linear" means, `head` the language-model head, which it
    leaves out. A classification head is left out, however targeted, if task_type is SEQ_CLS.
    """
    is_linear, module = module in linear, plain(module)
    if _named(config.get("exclude_modules"), module):
        return False
    for kept in config.get("modules_to_save") or ():
        if re.match(rf"(^|.*\.){kept}($|\..*)", module):
            return False
    if config.get("task_type") == "SEQ_CLS" and unit(module) in CLASSIFIERS:
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return is_linear and (module != head or module in CLASSIFIERS)
        return re.fullmatch(targets, module) is not None
    if module in (targets or ()):
        return True  # a whole name is taken whatever layers_to_transform says
    return _named(targets, module) and _layer_wanted(config, module)


def _named(names: Any, module: str) -> bool:
    """A regex for the whole name, or a list of names or their ends."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == n or module.endswith(f".{n}") for n in names or ())


def _layer_wanted(config: Mapping[str, Any], module: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern")
    if not patterns:  # then PEFT wants something before the list of layers
        regexes = [r".*?\.[^.]*\.(\d+)\."]
    else:
        listed = [patterns] if isinstance(patterns, str) else patterns
        regexes = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in listed]
    for regex in regexes:
        if match := re.match(regex, module):
            return int(match[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def unit(module: str) -> str:
    """What PEFT saves whole together: a classification head with all in it, else the module."""
    module = plain(module)
    first = module.split(".", 1)[0]
    return first if first in CLASSIFIERS else module


def is_kept(config: Mapping[str, Any], module: str) -> bool:
    """Whether modules_to_save names the module or one that contains it."""
    kept = config.get("modules_to_save") or ()
    return any(m == k or m.endswith(f".{k}") for m in with_parents([module]) for k in kept)


def with_parents(modules: Iterable[str]) -> set[str]:
    """The modules and all that contain them, as torch's named_modules has them."""
    parts = [plain(m).split(".") for m in modules]
    return {".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}


def short_names(chosen: Collection[str], every: Collection[str]) -> list[str]:
    """The shortest names by which PEFT finds exactly `chosen` among `every` module.

    `q_proj` where all modules of that name are chosen, else the whole name of each. PEFT compares
    modules_to_save by the end of the string, so `norm` would mean `input_layernorm` too.
    """
    chosen, names = set(chosen), set()
    for module in chosen:
        last = module.rsplit(".", 1)[-1]
        alike = {m for m in every if m.endswith(last)}
        names.add(last if alike <= chosen else module)
    return sorted(names)


def pattern_of(values: Mapping[str, float], default: float) -> dict[str, float]:
    """rank_pattern or alpha_pattern: the values that differ from the default, by module.

    By a module's last name where all that share it agree. Whole names contain dots, which match
    themselves as regexes; nothing else in a module's name is special.
    """
    by_last: dict[str, set[float]] = {}
    for module, value in values.items():
        by_last.setdefault(module.rsplit(".", 1)[-1], set()).add(value)
    pattern = {}
    for module, value in values.items():
        last = module.rsplit(".", 1)[-1]
        if value != default:
            pattern[last if len(by_last[last]) == 1 else module] = value
    return pattern
