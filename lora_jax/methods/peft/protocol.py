"""What passes between a method and the readers and writers of adapter folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from lora_jax.errors import UserError

PREFIX = "base_model.model."
"""What PEFT puts before the base's tensor names."""
UNWRAPPED = "base_model."
"""The same beside a prompt or prefix, for which PEFT does not wrap the base."""


class NoPeftForm(UserError):
    """A method, or the way it is used, has no form among PEFT's files. The message says why."""


@dataclasses.dataclass
class AdapterFiles:
    """The two files of an adapter.

    Attributes:
      config: adapter_config.json. `task_type`, `base_model_name_or_path` and `inference_mode` are
        filled in by the writer where a method does not say them.
      tensors: adapter_model.safetensors, by their full names (see PREFIX).
      where: the folder, for messages.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    where: str = ""


class ModelNames(Protocol):
    """A model's Hugging Face names beside our paths (`lora_jax.pretrained.names.Names`)."""

    @property
    def ours(self) -> Mapping[str, str]:
        """Hugging Face tensor -> our expanded leaf path (`layers/3/attention/query/kernel`)."""

    @property
    def theirs(self) -> Mapping[str, str]:
        """Our expanded leaf path -> Hugging Face tensor."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the Hugging Face tensors."""

    @property
    def transposed(self) -> Mapping[str, bool]:
        """Hugging Face tensor -> whether our leaf is its transpose."""

    @property
    def tied(self) -> bool:
        """Whether the language-model head is the embedding, transposed."""

    @property
    def modules(self) -> Mapping[str, list[str]]:
        """Hugging Face module -> its tensors' last names ("weight", "bias")."""

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Hugging Face module with a matrix -> (in, out); an embedding's in is its vocabulary."""

    @property
    def linear(self) -> set[str]:
        """The modules with a kernel."""

    @property
    def embeddings(self) -> set[str]:
        """The modules that are embeddings."""

    @property
    def tied_embedding(self) -> str:
        """The module of the embedding that is the head too; "" where there is none."""

    @property
    def head(self) -> str:
        """The language-model head's module; "" where it is tied to the embedding."""


def refuse(problems: list[str], what: str) -> None:
    """UserError that lists the first problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise UserError(f"{what}: {'; '.join(problems[:6])}{more}")


def hf_name(names: ModelNames, ours: str) -> str:
    """The Hugging Face tensor at one of our expanded leaf paths."""
    if ours not in names.theirs:
        raise NoPeftForm(f"{ours!r} has no Hugging Face name in this model's family")
    return names.theirs[ours]


def hf_module(names: ModelNames, ours: str) -> str:
    """The Hugging Face module that owns `hf_name`."""
    return hf_name(names, ours).rpartition(".")[0]
