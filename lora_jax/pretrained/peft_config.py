"""PEFT's adapter_config.json: which modules it targets, with which rank and scale.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. Only keys that PEFT knows
are written (its older readers fail on others), and no key that changes the result is ignored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_jax.errors import UserError

# Options that change what an adapter computes or contains, and that are not implemented here.
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
# Starts that also change the base's weights: their adapters belong to another base.
_MOVES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def check_supported(config: Mapping[str, Any], where: str) -> None:
    """UserError that lists every option of an adapter_config.json that is not implemented."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {config.get('peft_type')!r}; only LORA is read")
    odd = [
        f"{k}={config[k]!r}"
        for k in sorted(config)
        if config[k] and (k in _UNSUPPORTED or k not in _KNOWN)
    ]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        odd.append(f"init_lora_weights={start!r} (it changes the base's weights)")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        odd.append(f"bias={config['bias']!r}")
    if odd:
        raise UserError(
            f"{where} uses options that are not implemented here: {'; '.join(odd)}. Merge the "
            "adapter with PEFT (merge_and_unload, save_pretrained) and load the merged model"
        )


def lookup(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value PEFT takes from rank_pattern or alpha_pattern: regexes of the name's end."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return (pattern or {}).get(module, default)


def is_targeted(config: Mapping[str, Any], module: str, linear: Collection[str], head: str) -> bool:
    """Whether PEFT would adapt the Hugging Face module `module`.

    `linear` are the modules that "all-linear" means, `head` the one that it leaves out.
    """
    if _named(config.get("exclude_modules"), module):
        return False
    for kept in config.get("modules_to_save") or ():
        if re.match(rf"(^|.*\.){kept}($|\..*)", module):
            return False
    targets = config.get("target_modules")
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return module in linear and module != head
        return re.fullmatch(targets, module) is not None
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
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(match[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


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


def make_config(
    *,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    every_module: Collection[str],
    modules_to_save: Sequence[str],
    bias: str,
    rslora: bool,
    dropout: float,
    start: str,
    tied: bool,
    base_name: str,
) -> dict[str, Any]:
    """adapter_config.json of modules with these ranks and alphas (by Hugging Face name)."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": short_names(ranks, every_module),
        "modules_to_save": list(modules_to_save) or None,
        "bias": bias,
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if start == "gaussian" else True,
        "rank_pattern": pattern_of(ranks, rank),
        "alpha_pattern": pattern_of(alphas, alpha),
    }
    # Younger options are written only where they matter, so that older readers manage.
    if rslora:
        config["use_rslora"] = True
    if tied:
        config["ensure_weight_tying"] = True
    return config
