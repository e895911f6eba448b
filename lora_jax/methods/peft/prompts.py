"""PEFT's form of prompts and prefixes: `prompt_embeddings`, and modules trained whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError, nearest
from lora_jax.methods.peft import fused
from lora_jax.methods.peft.patterns import regexes
from lora_jax.methods.peft.protocol import (
    PREFIX,
    UNWRAPPED,
    AdapterFiles,
    ModelNames,
    NoPeftForm,
)
from lora_jax.methods.peft.targets import is_kept, short_names, with_parents
from lora_jax.methods.peft.whole import add_whole

ROWS = "prompt_embeddings"
_KNOWN = {
    "auto_mapping", "base_model_name_or_path", "encoder_hidden_size", "inference_mode",
    "init_weights", "modules_to_save", "num_attention_heads", "num_layers",
    "num_transformer_submodules", "num_virtual_tokens", "peft_type", "peft_version",
    "prefix_projection", "prompt_tuning_init", "prompt_tuning_init_text", "revision", "task_type",
    "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stored:
    """What PEFT's two files hold.

    Attributes:
      rows: float32 [P, columns].
      whole: leaves trained whole, by the paths of the parameters at hand.
      train: regexes of these.
    """

    rows: np.ndarray
    whole: dict[str, Any]
    train: tuple[str, ...]


def write(
    names: ModelNames,
    config: Mapping[str, Any],
    rows: np.ndarray,
    whole: Mapping[str, Any],
    params: Any,
) -> AdapterFiles:
    """The files of a prompt or prefix; PEFT itself adds the model's sizes when it reads them.

    Raises NoPeftForm where biases are trained outside of modules that are trained whole.
    """
    kept: dict[str, np.ndarray] = {}
    bias, modules = add_whole(names, whole, params, set(), kept) if whole else ("none", [])
    if bias != "none":
        raise NoPeftForm("beside a prompt PEFT trains whole modules, not biases alone")
    joined = fused.join_whole(kept)
    tensors = {UNWRAPPED + name.removeprefix(PREFIX): value for name, value in joined.items()}
    tensors[ROWS] = np.ascontiguousarray(rows, np.float32)
    return AdapterFiles(
        {
            **config,
            "num_virtual_tokens": int(rows.shape[0]),
            "num_transformer_submodules": 1,
            "modules_to_save": short_names(modules, with_parents(names.modules)) or None,
        },
        tensors,
    )


def wrapped(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Modules saved whole, named as beside a LoRA, without PEFT's copies of the frozen ones."""
    plain = {n.removeprefix(UNWRAPPED).replace(".modules_to_save.", "."): x
             for n, x in tensors.items() if ".original_module." not in n}  # fmt: skip
    return {PREFIX + name: x for name, x in plain.items()}


def read(files: AdapterFiles, names: ModelNames, params: Any) -> Stored:
    """The rows and the whole leaves of PEFT's files.

    Raises UserError for an option that is not implemented, for tensors that do not belong, and for
    a module that is not there, or only in part.
    """
    odd = [f"{k}={v!r}" for k, v in sorted(files.config.items()) if v and k not in _KNOWN]
    if (files.config.get("num_transformer_submodules") or 1) != 1:
        odd.append("num_transformer_submodules above 1 (encoder and decoder)")
    if odd:
        raise UserError(
            f"{files.where} uses options that are not implemented here: {'; '.join(odd)}. A prompt "
            "cannot be merged: use it with PEFT"
        )
    tensors = dict(files.tensors)
    rows = tensors.pop(ROWS, None)
    if rows is None or rows.ndim != 2:
        raise UserError(f"{files.where} lacks a matrix {ROWS!r}: is it a prompt or prefix of PEFT?")
    wanted = files.config.get("num_virtual_tokens")
    if wanted is not None and wanted != rows.shape[0]:
        raise UserError(
            f"{files.where}: num_virtual_tokens is {wanted}, but {ROWS} has {rows.shape[0]} rows"
        )
    found: dict[str, np.ndarray] = {}
    for tensor, value in fused.split(wrapped(tensors), names).items():
        tensor = tensor.removeprefix(PREFIX)
        if tensor not in names.ours or value.shape != names.shapes[tensor]:
            raise UserError(
                f"{files.where} does not fit this model: {tensor} {list(value.shape)}; "
                f"{nearest(tensor, names.ours)}"
            )
        found[names.ours[tensor]] = value.T if names.transposed[tensor] else value
    for module, ends in names.modules.items():
        for tensor in [f"{module}.{x}" for x in ends if is_kept(files.config, module)]:
            if names.ours[tensor] not in found:
                raise UserError(f"{files.where}: {tensor}, of modules_to_save, is not in the file")
    train = tuple(regexes(found, list(names.theirs)))
    return Stored(rows.astype(np.float32), _leaves(found, params, files.where), train)


def _leaves(found: Mapping[str, np.ndarray], params: Any, where: str) -> dict[str, Any]:
    """Values by expanded path -> leaves by the paths of `params`."""
    leaves = {}
    for path, like in partition.flatten(params).items():
        layers = partition.expand(path)
        held = [layer for layer in layers if layer in found]
        if held and len(held) < len(layers):
            raise UserError(
                f"{where} trains {held[0]!r} whole, but {path!r} holds other layers too: cut it "
                "first, as its method did: params = method.arrange(params)"
            )
        if held:
            values = [found[layer] for layer in layers]
            stacked = partition.stack_of(path) is not None
            leaves[path] = jnp.asarray(np.stack(values) if stacked else values[0], like.dtype)
    return leaves
