"""LoRA in PEFT's files: https://huggingface.co/docs/peft/developer_guides/checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods.peft import fused
from lora_jax.methods.peft.patterns import seven_digits
from lora_jax.methods.peft.protocol import PREFIX, AdapterFiles, ModelNames, NoPeftForm, hf_module
from lora_jax.methods.peft.targets import (
    CLASSIFIERS,
    pattern_of,
    short_names,
    unit,
    with_parents,
)
from lora_jax.methods.peft.whole import add_whole, host


def write(
    method: Any, trainable: Mapping[str, Any], names: ModelNames, params: Any
) -> AdapterFiles:
    """The files of a LoRA; each layer with its own rank: padding is left out.

    Args:
      method: a `LoRA`; its `ranks`, `scales` and fields are asked.
      trainable: as from `method.init`.
      params: the base, or its shapes where no module is trained in part.

    Raises:
      NoPeftForm, UserError: see `whole.add_whole`.
    """
    ranks, scales = method.ranks(params), method.scales(params)
    whole = {p: v for p, v in trainable.items() if p not in ranks}
    lacking = [p for p in ranks if p not in trainable]
    if lacking:
        raise UserError(f"trainable lacks {', '.join(lacking[:4])}, which the method adapts")
    rslora = method.scaling == "rslora"
    tensors: dict[str, np.ndarray] = {}
    own = module_ranks_of(names, ranks)
    joint = {fused.plain(m) for m in own}  # PEFT adapts all of a fused module
    adapted = {m for m in names.modules if fused.plain(m) in joint}
    bias, to_save = add_whole(names, whole, params, adapted, tensors)
    tensors = fused.join_whole(tensors)
    module_ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    factors = _factors(names, trainable, ranks, scales)
    for module, (a, b, scale) in fused.join_factors(factors, names).items():
        _add_factors(names, module, a, b, tensors)
        module_ranks[module] = a.shape[1]
        alphas[module] = _alpha(scale, a.shape[1], rslora)
    tied = names.tied and names.tied_embedding in {*module_ranks, *to_save}
    if tied:
        _add_tied_head(names, tensors)
    config = _config(module_ranks, alphas, with_parents(names.modules), to_save)
    conv = {fused.plain(m) for m in names.linear if not names.transposed[f"{m}.weight"]}
    config |= {
        "bias": bias,
        "fan_in_fan_out": not conv.isdisjoint(module_ranks),  # GPT-2's Conv1D holds (in, out)
        "lora_dropout": method.dropout,
        "init_lora_weights": "gaussian" if method.start == "gaussian" else True,
    }
    # Younger options are written only where they matter, so that older readers manage.
    if rslora:
        config["use_rslora"] = True
    if tied:
        config["ensure_weight_tying"] = True
    if CLASSIFIERS & ({unit(m) for m in names.modules} - set(to_save)):
        config["task_type"] = None  # for SEQ_CLS, PEFT wants the head whole in the file
    return AdapterFiles(config, tensors)


def module_ranks_of(names: ModelNames, ranks: Mapping[str, list[int]]) -> dict[str, int]:
    """Hugging Face module (or part of one) -> its rank, where that is above 0."""
    layers = [x for leaf, n in ranks.items() for x in zip(partition.expand(leaf), n, strict=True)]
    return {hf_module(names, ours): rank for ours, rank in layers if rank}


def _factors(
    names: ModelNames,
    trainable: Mapping[str, Any],
    ranks: Mapping[str, list[int]],
    scales: Mapping[str, np.ndarray],
) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Hugging Face module (or part of one) -> (A [in, r], B [r, out], scale), unpadded."""
    found = {}
    for leaf, layers in ranks.items():
        a, b = host(trainable[leaf]["a"]), host(trainable[leaf]["b"])
        if partition.stack_of(leaf) is None:
            a, b = a[None], b[None]
        if a.ndim != 3 or b.ndim != 3:
            raise NoPeftForm(f"{leaf!r} has more than an input and an output axis")
        per_layer = np.atleast_1d(scales[leaf])
        for at, ours in enumerate(partition.expand(leaf)):
            if rank := layers[at]:
                module = hf_module(names, ours)
                found[module] = (a[at][:, :rank], b[at][:rank], float(per_layer[at]))
    return found


def _add_factors(
    names: ModelNames, module: str, a: np.ndarray, b: np.ndarray, tensors: dict[str, np.ndarray]
) -> None:
    """PEFT computes x·Aᵀ·Bᵀ with A (r, in), B (out, r); an embedding's A is (r, vocabulary)."""
    stem = f"{PREFIX}{module}.lora_"
    a_name, b_name = ("A.weight", "B.weight")
    if module in names.embeddings:
        a_name, b_name = ("embedding_A", "embedding_B")
    tensors[stem + a_name] = np.ascontiguousarray(a.T)
    tensors[stem + b_name] = np.ascontiguousarray(b.T)


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    alpha = seven_digits(float(scale) * (rank**0.5 if rslora else rank))
    return int(alpha) if alpha == int(alpha) else alpha


def _config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    every: Collection[str],
    to_save: Collection[str],
) -> dict[str, Any]:
    """adapter_config.json of modules with these ranks and alphas; only keys that PEFT knows."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": short_names(ranks, every),
        "modules_to_save": short_names(to_save, every) or None,
        "rank_pattern": pattern_of(ranks, rank),
        "alpha_pattern": pattern_of(alphas, alpha),
    }


def _add_tied_head(names: ModelNames, tensors: dict[str, np.ndarray]) -> None:
    """A tied head changes with the embedding here; PEFT wants the head's share spelled out."""
    if any(p.startswith("head/") for p in names.theirs):
        raise NoPeftForm("the head that is tied to the embedding has layers of its own")
    stem = f"{PREFIX}{names.tied_embedding}"
    if f"{stem}.weight" in tensors:
        tensors[f"{PREFIX}lm_head.weight"] = tensors[f"{stem}.weight"].copy()
        return
    a, b = tensors[f"{stem}.lora_embedding_A"], tensors[f"{stem}.lora_embedding_B"]
    tensors[f"{PREFIX}lm_head.lora_A.weight"] = np.ascontiguousarray(b.T)
    tensors[f"{PREFIX}lm_head.lora_B.weight"] = np.ascontiguousarray(a.T)
