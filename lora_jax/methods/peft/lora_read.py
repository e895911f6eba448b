"""Reads an adapter in PEFT's format as a LoRA method and its trainable tree."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError, nearest
from lora_jax.methods.peft import fused, targets
from lora_jax.methods.peft.lora_write import module_ranks_of
from lora_jax.methods.peft.patterns import module_paths, regexes, rules
from lora_jax.methods.peft.protocol import PREFIX, AdapterFiles, ModelNames, hf_module, refuse

_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
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


@dataclasses.dataclass
class _Stored:
    """The tensors of an adapter by Hugging Face name: factors as PEFT holds them, whole ones."""

    factors: dict[str, dict[str, np.ndarray]]  # module -> {"A": (r, in), "B": (out, r)}
    whole: dict[str, np.ndarray]  # tensor -> value


def read(
    cls: type[Any], files: AdapterFiles, names: ModelNames, params: Any, saved: Any = None
) -> tuple[Any, dict[str, Any]]:
    """(method, trainable) with `cls`, a LoRA, as the method's class; see `Method.from_peft`.

    Raises:
      UserError: an option that is not implemented, or tensors that do not fit model or config.
    """
    check_supported(files.config, files.where)
    stored = _sort(files, names)
    _check_tied(files, stored, names)
    _check_complete(files, stored, names)
    method = _method(cls, files.config, stored, names)
    if saved is not None and _says_the_same(saved, method, params):
        ranks = module_ranks_of(names, saved.ranks(params))
        factors = fused.unjoin_factors(stored.factors, ranks, names)
        if factors is not None:
            method, stored = saved, _Stored(factors, stored.whole)
    return method, _trainable(method, stored, names, params)


def _says_the_same(saved: Any, told: Any, params: Any) -> bool:
    """Whether what was saved has the scales that the config tells (of part of its modules)."""
    theirs = told.scales(params)
    return all(
        path in theirs and np.allclose(scale, np.where(scale == 0, 0, theirs[path]), rtol=1e-6)
        for path, scale in saved.scales(params).items()
    )


def check_supported(config: Mapping[str, Any], where: str) -> None:
    """UserError that lists every option of an adapter_config.json that is not implemented."""
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


def _sort(files: AdapterFiles, names: ModelNames) -> _Stored:
    """Factors and whole tensors by name; UserError that lists all that do not belong."""
    stored = _Stored({}, {})
    modules, odd = names.modules, []
    for key, value in fused.split(files.tensors, names).items():
        name = key.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(name):
            module, embedding, letter = match.groups()
            known = module in modules or (module == "lm_head" and names.tied)
            if known and bool(embedding) == (module in names.embeddings):
                stored.factors.setdefault(module, {})[letter] = value
                continue
            odd.append(f"{key} ({nearest(module, modules)})")
            continue
        if name.endswith(".base_layer.weight") or ".original_module." in name:
            continue  # PEFT's copies of frozen weights
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        tied_head = name == "lm_head.weight" and names.tied
        if name in names.ours and value.shape != names.shapes[name]:
            odd.append(f"{key} is {list(value.shape)}, the model's is {list(names.shapes[name])}")
        elif name in names.ours or tied_head:
            stored.whole[name] = value
        else:
            odd.append(f"{key} ({nearest(name, names.ours)})")
    for module, pair in stored.factors.items():
        if set(pair) != {"A", "B"}:
            odd.append(f"{module} has only lora_{''.join(pair)}")
    refuse(odd, f"{files.where} does not fit this model")
    return stored


def _check_tied(files: AdapterFiles, stored: _Stored, names: ModelNames) -> None:
    """Drops the head's share of a tied embedding; UserError where the two are not one."""
    if not names.tied:
        return
    embedding = names.tied_embedding
    head_ab, head = stored.factors.pop("lm_head", None), stored.whole.pop("lm_head.weight", None)
    ab, whole = stored.factors.get(embedding), stored.whole.get(f"{embedding}.weight")
    if head_ab is None and head is None and ab is None and whole is None:
        return
    equal = False
    if head_ab is not None and ab is not None:
        equal = np.array_equal(head_ab["A"], ab["B"].T) and np.array_equal(head_ab["B"], ab["A"].T)
    elif head is not None and whole is not None:
        equal = np.array_equal(head, whole)
    if not (equal and files.config.get("ensure_weight_tying")):
        raise UserError(
            f"{files.where} changes the embedding and the head differently, but in this model the "
            "head is the embedding. In PEFT train both with ensure_weight_tying=True, or load a "
            "base whose config.json says tie_word_embeddings: false and whose file holds "
            "lm_head.weight"
        )


def _check_complete(files: AdapterFiles, stored: _Stored, names: ModelNames) -> None:
    """UserError for modules that the config names and the file lacks, or the other way round."""
    config, problems = files.config, []
    candidates = names.linear | names.embeddings
    for module, leaves in names.modules.items():
        wanted = module in candidates and targets.is_targeted(
            config, module, names.linear, names.head
        )
        if wanted and module not in stored.factors:
            problems.append(f"no factors for {module}")
        elif module in stored.factors and not wanted:
            problems.append(f"factors for {module}, which the config does not target")
        elif module in stored.factors:
            problems += _misfits(config, module, stored.factors[module], names)
        if targets.is_kept(config, module):
            lacking = [t for x in leaves if (t := f"{module}.{x}") not in stored.whole]
            problems += [f"no tensor {t}" for t in lacking]
    refuse(problems, f"{files.where}: adapter_config.json and adapter_model.safetensors disagree")


def _misfits(
    config: Mapping[str, Any], module: str, pair: Mapping[str, np.ndarray], names: ModelNames
) -> list[str]:
    rank = targets.lookup(config.get("rank_pattern"), module, config.get("r", 8))
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        return [f"{module} should have rank {rank}, has A {a.shape} and B {b.shape}"]
    d_in, d_out = names.sizes[module]
    if (a.shape[1], b.shape[0]) != (d_in, d_out):
        return [f"{module} maps {d_in} to {d_out}, its factors {a.shape[1]} to {b.shape[0]}"]
    return []


def _method(cls: type[Any], config: Mapping[str, Any], stored: _Stored, names: ModelNames) -> Any:
    """The LoRA whose rules say what rank_pattern, alpha_pattern and the rest say."""
    every_leaf = list(names.theirs)
    every = module_paths(every_leaf)
    ranks, alphas = {}, {}
    for module, pair in stored.factors.items():
        ours = partition.module(names.ours[f"{module}.weight"])
        ranks[ours] = int(pair["A"].shape[0])
        alphas[ours] = targets.lookup(
            config.get("alpha_pattern"), module, config.get("lora_alpha", 8)
        )
    whole = [names.ours[t] for t in stored.whole]
    return cls(
        rank=rules(ranks, every),
        alpha=rules(alphas, every),
        targets=tuple(regexes(ranks, every)),
        scaling="rslora" if config.get("use_rslora") else "standard",
        dropout=float(config.get("lora_dropout") or 0.0),
        start="gaussian" if config.get("init_lora_weights") == "gaussian" else "uniform",
        train=tuple(regexes(whole, every_leaf)),
    )


def _trainable(method: Any, stored: _Stored, names: ModelNames, params: Any) -> dict[str, Any]:
    """Fills what `method.init` would make: its paths, its padding, its dtypes."""
    like = jax.eval_shape(method.init, jax.random.key(0), params)
    trainable: dict[str, Any] = {}
    # `eval_shape` sorts the paths; put them in the order `init` has: factors, then whole leaves.
    ranks = method.ranks(params)
    whole = [p for p in partition.flatten(params) if p in like and p not in ranks]
    for path in ranks:
        trainable[path] = _factors(path, like[path], stored, names)
    for path in whole:
        arrays = []
        for ours in partition.expand(path):
            tensor = names.theirs[ours]
            value = stored.whole[tensor]
            arrays.append(value.T if names.transposed[tensor] else value)
        value = np.stack(arrays) if partition.stack_of(path) is not None else arrays[0]
        trainable[path] = jnp.asarray(value, like[path].dtype)
    return trainable


def _factors(path: str, like: Any, stored: _Stored, names: ModelNames) -> dict[str, jax.Array]:
    a = np.zeros(like["a"].shape, np.float32)
    b = np.zeros(like["b"].shape, np.float32)
    stacked = partition.stack_of(path) is not None
    for at, ours in enumerate(partition.expand(path)):
        pair = stored.factors.get(hf_module(names, ours))
        if pair is not None:
            a_l, b_l = (a[at], b[at]) if stacked else (a, b)
            a_l[:, : pair["A"].shape[0]] = pair["A"].T
            b_l[: pair["B"].shape[1]] = pair["B"].T
    return {"a": jnp.asarray(a), "b": jnp.asarray(b)}
