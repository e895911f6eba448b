"""PEFT's file format, for methods that have a form in it: see `Method.to_peft` and `from_peft`."""

from lora_jax.methods.peft.protocol import (
    PREFIX,
    UNWRAPPED,
    AdapterFiles,
    ModelNames,
    NoPeftForm,
)

__all__ = ["PREFIX", "UNWRAPPED", "AdapterFiles", "ModelNames", "NoPeftForm"]
