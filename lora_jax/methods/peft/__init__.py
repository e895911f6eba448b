"""PEFT's file format, for methods that have a form in it: see `Method.to_peft` and `from_peft`."""

from lora_jax.methods.peft.protocol import PREFIX, AdapterFiles, ModelNames, NoPeftForm

__all__ = ["PREFIX", "AdapterFiles", "ModelNames", "NoPeftForm"]
