"""Which base an adapter belongs to: the SHA-256 of the files that the model was loaded from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError
from lora_jax.pretrained import hub
from lora_jax.pretrained.load import base_sha256

KEY = "lora_jax.base_sha256"  # in the adapter's safetensors header
_SHOWN = 12  # digits of a SHA-256 in messages


def model_sha256(model: Any) -> str | None:
    """SHA-256 of the files that `load_pretrained` made the model from.

    None for a model made otherwise; None with a warning where the files are gone: what was
    trained can still be saved then.
    """
    source = _source(model)
    if source is None:
        return None
    try:
        return base_sha256(source)
    except (UserError, OSError) as error:
        warnings.warn(
            f"the base cannot be read any more, so its SHA-256 is neither written nor checked: "
            f"{error}",
            stacklevel=3,
        )
        return None


def base_name(model: Any) -> str:
    """What PEFT calls base_model_name_or_path; "" for a model that was not loaded."""
    source = _source(model)
    return hub.public_name(source) if source is not None else ""


def _source(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "source", None)


def check(folder: Path, metadata: Mapping[str, str], here: str | None) -> None:
    """UserError where the adapter's header names another base; nothing if either is unknown."""
    saved = metadata.get(KEY)
    if saved and here and saved != here:
        raise UserError(
            f"{folder} was trained on a base whose files have SHA-256 {saved[:_SHOWN]}…, those "
            f"of this base have {here[:_SHOWN]}…; load that base, or pass force=True if the "
            "weights are equal"
        )
