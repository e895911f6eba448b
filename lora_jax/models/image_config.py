"""What configurations of image classifiers share. They are this library's own: no Hugging Face
class reads their folders, whose config.json has the fields of the config as they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
from flax import linen as nn

from lora_jax.errors import UserError, nearest
from lora_jax.models.family import TensorSpec

C = TypeVar("C", bound="ImageConfig")
HE = nn.initializers.he_normal()
"""Kernels N(0, 2 / inputs), cut at two deviations (He et al. 2015, arXiv:1502.01852)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Sizes and options of a classifier of images of one size.

    Attributes:
      image_shape: height, width, channels.
      num_labels: classes.
      head: it classifies; there is no other.
      dtype: computations' dtype.
      remat, unroll: as of `TextConfig`; there is no stack of layers to which they apply.
      source: where the weights were loaded from; no part of equality, nor of config.json.
    """

    model_type: str
    image_shape: tuple[int, int, int] = (28, 28, 1)
    num_labels: int = 10
    head: Literal["classification"] = "classification"
    dtype: str = "float32"
    remat: Literal["none"] = "none"
    unroll: int | None = None
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise UserError(f"image_shape={self.image_shape} must be (height, width, channels).")
        if self.num_labels < 2:
            raise UserError(f"num_labels={self.num_labels} must be at least 2.")
        if self.head != "classification":
            raise UserError(f"head={self.head!r}: a model of images classifies them.")
        if self.remat != "none" or self.unroll is not None:
            raise UserError("remat and unroll are for stacks of layers: this model has none.")

    @property
    def pixels(self) -> int:
        """Numbers of an image."""
        return math.prod(self.image_shape)


def image_example(config: ImageConfig) -> Any:
    """A batch of one black image, [1, H, W, C]."""
    return jnp.zeros((1, *config.image_shape))


# What config.json does not hold: how a model is run, not what it is.
_OPTIONS = ("dtype", "remat", "unroll", "source")


def reader(cls: type[C]) -> Callable[[dict[str, Any]], C]:
    """config.json's dict -> the config, its fields by name; what is missing takes its default."""
    names = [f.name for f in dataclasses.fields(cls) if f.name not in _OPTIONS]

    def read(hf: Mapping[str, Any]) -> C:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in hf.items()}
        fields.pop("torch_dtype", None)  # that of the files
        for name in fields:
            if name not in names:
                raise UserError(f"{hf['model_type']} models have no {name!r}; "
                                f"{nearest(name, names)}")  # fmt: skip
        return cls(**fields)

    return read


def write(config: ImageConfig) -> dict[str, Any]:
    """The config -> config.json's dict."""
    found = dataclasses.asdict(config)
    return {k: v for k, v in found.items() if k not in _OPTIONS}


def layer(name: str, inputs: int, outputs: int) -> list[TensorSpec]:
    """Rows of a kernel (inputs, outputs) and a bias, stored under the names they have here."""
    return [
        TensorSpec(f"{name}/kernel", f"{name}.kernel", "keep", (inputs, outputs)),
        TensorSpec(f"{name}/bias", f"{name}.bias", "keep", (outputs,)),
    ]
