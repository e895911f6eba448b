"""Methods: rules about a parameter tree, a file each, or one for close kin.

The protocol: `base.Method`.

Found by looking: a module here whose classes carry `@register("name")` adds its methods. They are
all imported with the package, so a module imports what is heavy (Flax) where it needs it.
"""

from __future__ import annotations

import importlib
import pkgutil

from lora_jax.methods.base import METHODS, Counts, Method, register
from lora_jax.methods.full import FullFineTuning
from lora_jax.methods.lora import LoRA

__all__ = ["METHODS", "Counts", "FullFineTuning", "LoRA", "Method", "register"]

for _info in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_info.name}")
