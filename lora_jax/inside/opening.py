"""Updates of what lies on disk: a run, an adapter of PEFT's or ours, or a fine-tuned model."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import partition, pretrained, runs
from lora_jax.errors import UserError
from lora_jax.inside.of_method import updates
from lora_jax.inside.update import Update, live_columns, placed
from lora_jax.methods import FullFineTuning
from lora_jax.methods.peft import PREFIX, lora_read, targets
from lora_jax.pretrained import hub, own_form, staging
from lora_jax.pretrained.folder import read_json
from lora_jax.pretrained.peft import CONFIG, TENSORS, arranged, read_files

_log = logging.getLogger(__name__)
_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
# The kernel that gives each label its score, in PEFT's names and in ours.
_HEAD = re.compile(r"(^|\.)(score|classifier(\.out_proj)?)(\.modules_to_save)?\.weight$")
_OWN_HEAD = ("head/kernel", "head/out/kernel")


def open_updates(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dense: bool = False,
    modules: str | None = None,
) -> list[Update]:
    """The updates of every matrix; see `updates` for `dense` and `modules`.

    Args:
      path: the workdir of a finished run, whose base is loaded too; an adapter's folder or hub
        name (PEFT's, or of `save_adapter`); or a model of which all of it was trained, beside
        its base.
      base: where the base lies, as for `load_pretrained`. A PEFT LoRA is also read without: its
        modules then have the names of the file, and nothing is known of the weights themselves.

    Raises:
      UserError: nothing of that kind there, or what `load_adapter` and `updates` raise.
    """
    folder = _folder(path)
    if is_run(folder) and base is None:
        bench, method, trainable = runs.load_run(folder)
        return updates(method, trainable, bench.params, dense=dense, modules=modules)
    if (folder / "adapter" / CONFIG).is_file():
        folder = folder / "adapter"
    if not (folder / CONFIG).is_file():
        return _of_model(folder, base, dense, modules)
    if base is None:
        return _of_file(folder, modules)
    model, params = pretrained.load_pretrained(base, **_model_options(folder))
    params = arranged(folder, model, params)
    method, trainable = pretrained.load_adapter(folder, model, params)
    return updates(method, trainable, params, dense=dense, modules=modules)


def base_of(path: str | os.PathLike[str]) -> str | None:
    """The files that a run's base was read from; None where its weights were drawn at random, and
    for what is no run."""
    model = _run_model(path)
    if model is None or model.get("shape") is not None or model.get("init_seed") is not None:
        return None
    return str(model["source"])


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether it is the workdir of a run, which knows its own base."""
    return _run_model(path) is not None


def _run_model(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The `model` of a run's config."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return None
    content = read_json(config)
    model = content.get("model")
    return model if "method" in content and isinstance(model, dict) else None


def _folder(path: str | os.PathLike[str]) -> Path:
    return Path(path) if staging.is_there(Path(path)) else hub.resolve(path)


def _of_model(
    folder: Path, base: str | os.PathLike[str] | None, dense: bool, modules: str | None
) -> list[Update]:
    """What was trained of a whole model, as the difference to its base. Heads are left out."""
    if base is None or not dense:
        raise UserError(
            f"{folder} holds no adapter and no finished run. If it is a model that was trained "
            "whole, give its base and ask for differences of whole matrices: --base and --dense"
        )
    model, tuned = pretrained.load_pretrained(folder)
    head = getattr(model.config, "head", "lm")
    labels = {} if head in ("lm", "pooling", None) else {"num_labels": model.config.num_labels}
    _, params = pretrained.load_pretrained(base, head=head, **labels)
    trained = partition.flatten(tuned)
    if head != "lm":
        trained = {path: x for path, x in trained.items() if not path.startswith("head/")}
    return updates(FullFineTuning(), trained, params, dense=True, modules=modules)


def _model_options(folder: Path) -> dict[str, Any]:
    """The head that an adapter was trained with, so that its names and sizes are the base's."""
    config = read_json(folder / CONFIG)
    if config.get("task_type") == "FEATURE_EXTRACTION":
        return {"head": None}
    if config.get("task_type") != "SEQ_CLS":
        return {}
    files, _ = staging.read_whole(folder, read_files)
    for name, x in files.tensors.items():
        if name in _OWN_HEAD:
            return {"head": "classification", "num_labels": x.shape[-1]}
        if _HEAD.search(name.removeprefix(PREFIX)):
            return {"head": "classification", "num_labels": x.shape[0]}
    return {"head": "classification"}


def _of_file(folder: Path, modules: str | None) -> list[Update]:
    """A PEFT LoRA from its two files alone."""
    files, _ = staging.read_whole(folder, read_files)
    config, tensors = files.config, files.tensors
    kind = config.get("peft_type")
    if kind == own_form.PEFT_TYPE:
        kind = f"{config.get('method')}, in lora_jax's own form,"
    elif kind == "LORA" and config.get("use_dora"):
        kind = "DoRA"
    if kind != "LORA":
        raise UserError(f"{folder}: {kind} cannot be understood without its base: give --base")
    lora_read.check_supported(config, str(folder))
    stored: dict[str, dict[str, np.ndarray]] = {}
    whole = []
    for name, value in tensors.items():
        if match := _FACTOR.fullmatch(name.removeprefix(PREFIX)):
            stored.setdefault(match[1], {})[match[2]] = value.astype(np.float32)
        elif not name.endswith(".base_layer.weight") and ".original_module." not in name:
            whole.append(name)  # PEFT's copies of frozen weights aside
    if whole:
        _log.warning("left out, since trained whole: %s", ", ".join(whole))
    found = [x for name, ab in stored.items() if (x := _update(folder, config, name, ab))]
    if not found:
        raise UserError(f"{folder / TENSORS} holds no factors")
    return placed(found, modules)


def _update(
    folder: Path, config: dict[str, Any], name: str, ab: dict[str, np.ndarray]
) -> Update | None:
    if set(ab) != {"A", "B"}:
        raise UserError(f"{folder}: {name} has only lora_{''.join(ab)}")
    # (r, in, height, width) and (out, r, 1, 1) where it is a convolution.
    a, b = ab["A"].reshape(len(ab["A"]), -1).T, ab["B"].reshape(len(ab["B"]), -1).T
    r = a.shape[1]
    if b.shape[0] != r:
        raise UserError(f"{folder}: the factors of {name} are of ranks {r} and {b.shape[0]}")
    told = targets.lookup(config.get("rank_pattern"), name, config.get("r", 8))
    if told != r:
        raise UserError(f"{folder}: {name} should have rank {told}, its factors have {r}")
    alpha = targets.lookup(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    scale = np.float32(alpha / (r**0.5 if config.get("use_rslora") else r))
    factors = live_columns(a, scale * b)
    if factors is None:
        return None
    return Update(name, None, "", (a.shape[0], b.shape[1]), factors)
