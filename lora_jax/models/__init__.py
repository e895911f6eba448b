"""Model families, found by looking: a module here that defines ``FAMILIES`` adds its own."""

from __future__ import annotations

import importlib
import pkgutil

from lora_jax.errors import UserError, nearest
from lora_jax.models.family import Family, TensorSpec
from lora_jax.models.sites import Site, prompt_length

__all__ = ["FAMILIES", "Family", "Site", "TensorSpec", "family_for", "prompt_length"]


def _discover() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for family in getattr(module, "FAMILIES", ()):
            for model_type in family.model_types:
                if model_type in found:
                    raise RuntimeError(f"two families claim the model type {model_type!r}")
                found[model_type] = family
    return found


FAMILIES: dict[str, Family] = _discover()
"""Hugging Face ``model_type`` -> `Family`."""


def family_for(model_type: str) -> Family:
    """The family of a Hugging Face ``model_type``.

    Raises:
      UserError: no family reads it; the message names the nearest that one does.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise UserError(
        f"no model family reads model_type {model_type!r}; {nearest(str(model_type), FAMILIES)}"
    )
