"""Fully connected classifiers of images, such as Li et al.'s 784-200-200-10 (arXiv:1804.08838).

Parameters: ``hidden_0``, ``hidden_1``, … and ``head``, each a kernel (in, out) and a bias.

Axes: B batch, H, W, C of an image, D features, K classes.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
from flax import linen as nn

from lora_jax.errors import UserError
from lora_jax.models.family import Family, TensorSpec
from lora_jax.models.image_config import HE, ImageConfig, image_example, layer, reader, write


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig(ImageConfig):
    """Sizes and options, besides those of `ImageConfig`.

    Attributes:
      widths: of the hidden layers; (): a linear classifier.
    """

    widths: tuple[int, ...] = (200, 200)
    model_type: str = "mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(width < 1 for width in self.widths):
            raise UserError(f"widths={self.widths} must be at least 1.")


class Mlp(nn.Module):
    """Pixels through hidden layers with ReLU to a head: 199,210 parameters by default."""

    config: MlpConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float [B, H, W, C] -> logits [B, K]."""
        c = self.config
        x_BD = images.reshape(len(images), c.pixels).astype(c.dtype)
        for number, width in enumerate(c.widths):
            dense = nn.Dense(width, dtype=c.dtype, kernel_init=HE, name=f"hidden_{number}")
            x_BD = nn.relu(dense(x_BD))
        return nn.Dense(c.num_labels, dtype=c.dtype, kernel_init=HE, name="head")(x_BD)


def tensors(config: MlpConfig) -> list[TensorSpec]:
    """The table of all tensors."""
    sizes = [config.pixels, *config.widths, config.num_labels]
    names = [*(f"hidden_{i}" for i in range(len(config.widths))), "head"]
    pairs = zip(names, itertools.pairwise(sizes), strict=True)
    return [spec for name, (inputs, outputs) in pairs for spec in layer(name, inputs, outputs)]


def config_from_hf(hf: dict[str, Any]) -> MlpConfig:
    """config.json's dict -> `MlpConfig`."""
    return reader(MlpConfig)(hf)


FAMILIES = (
    Family(
        "mlp", ("mlp",), config_from_hf, write, Mlp, tensors, reads="images", example=image_example
    ),
)
