"""LeNet (LeCun et al. 1998) as Li et al. have it (arXiv:1804.08838): ReLU and maximum pooling.

Two convolutions of 5 x 5 without padding (6 and 16 maps), each pooled by 2 x 2, then layers of 120
and 84 units and the head. Parameters: ``conv_0``, ``conv_1``, ``hidden_0``, ``hidden_1``, ``head``,
each a 2-D kernel (in, out) and a bias; a convolution's inputs are its window's, 5·5·C.

Axes: B batch, H, W, C of an image or of maps, D features, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lora_jax.errors import UserError
from lora_jax.models.family import Family, TensorSpec
from lora_jax.models.image_config import HE, ImageConfig, image_example, layer, reader, write

_WINDOW = 5
_MAPS = (6, 16)
_WIDTHS = (120, 84)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeNetConfig(ImageConfig):
    """Sizes and options: those of `ImageConfig`."""

    model_type: str = "lenet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.last_maps[:2]) < 1 or any(odd % 2 for odd in self._before_pooling()):
            raise UserError(
                f"image_shape={self.image_shape}: two convolutions of {_WINDOW} x {_WINDOW}, each "
                "pooled by 2 x 2, do not fit it; 28 x 28 and 32 x 32 do."
            )

    def _before_pooling(self) -> list[int]:
        sides = [n - _WINDOW + 1 for n in self.image_shape[:2]]
        return [*sides, *(n // 2 - _WINDOW + 1 for n in sides)]

    @property
    def last_maps(self) -> tuple[int, int, int]:
        """Height, width and number of the maps that the first layer of units reads."""
        height, width = (n // 2 for n in self._before_pooling()[2:])
        return height, width, _MAPS[-1]


class Convolution(nn.Module):
    """One of 5 x 5 without padding, as a product of strips of five rows with a banded matrix.

    The kernel meets nothing but a product, as in a Dense layer: so every kind of weight may stand
    for it, and the members of a pack each have their own at full speed (a convolution with a kernel
    a member is a grouped one, for which a CPU has no fast code). On a CPU it is faster than XLA's
    convolution for a single one too.
    """

    maps: int
    dtype: str

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H - 4, W - 4, maps]."""
        rows, height, width, inputs = x_BHWC.shape
        kernel = self.param("kernel", HE, (_WINDOW * _WINDOW * inputs, self.maps))
        bias = self.param("bias", nn.initializers.zeros, (self.maps,)).astype(self.dtype)
        high, wide = height - _WINDOW + 1, width - _WINDOW + 1
        bands = jnp.asarray(placed(width, inputs), self.dtype) @ kernel.astype(self.dtype)
        bands = bands.reshape(_WINDOW * width * inputs, wide * self.maps)
        lines = x_BHWC.reshape(rows, height, width * inputs)
        strips = jnp.concatenate([lines[:, i : i + high] for i in range(_WINDOW)], axis=-1)
        y_BHWC = (strips @ bands).reshape(rows, high, wide, self.maps)
        return y_BHWC + bias.reshape(1, 1, 1, -1)


@functools.cache
def placed(width: int, inputs: int) -> np.ndarray:
    """Where a strip's numbers meet the kernel's: [5·W·C·(W - 4), 5·5·C] of zeros and ones."""
    wide = width - _WINDOW + 1
    found = np.zeros((_WINDOW, width, inputs, wide, _WINDOW, _WINDOW, inputs), np.float32)
    place = np.arange(wide)
    for i, j, c in itertools.product(range(_WINDOW), range(_WINDOW), range(inputs)):
        found[i, place + j, c, place, i, j, c] = 1.0
    return found.reshape(_WINDOW * width * inputs * wide, -1)


class LeNet(nn.Module):
    """44,426 parameters for 28 x 28 x 1 and ten classes."""

    config: LeNetConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float [B, H, W, C] -> logits [B, K]."""
        c = self.config
        x_BHWC = images.astype(c.dtype)
        for number, maps in enumerate(_MAPS):
            convolution = Convolution(maps, c.dtype, name=f"conv_{number}")
            x_BHWC = pooled(nn.relu(convolution(x_BHWC)))
        x_BD = x_BHWC.reshape(len(images), -1)
        for number, width in enumerate(_WIDTHS):
            dense = nn.Dense(width, dtype=c.dtype, kernel_init=HE, name=f"hidden_{number}")
            x_BD = nn.relu(dense(x_BD))
        return nn.Dense(c.num_labels, dtype=c.dtype, kernel_init=HE, name="head")(x_BD)


def pooled(x_BHWC: jax.Array) -> jax.Array:
    """The maximum of each 2 x 2 places."""
    rows, height, width, maps = x_BHWC.shape
    return x_BHWC.reshape(rows, height // 2, 2, width // 2, 2, maps).max((2, 4))


def tensors(config: LeNetConfig) -> list[TensorSpec]:
    """The table of all tensors."""
    height, width, maps = config.last_maps
    area = _WINDOW * _WINDOW
    return [
        *layer("conv_0", area * config.image_shape[2], _MAPS[0]),
        *layer("conv_1", area * _MAPS[0], _MAPS[1]),
        *layer("hidden_0", height * width * maps, _WIDTHS[0]),
        *layer("hidden_1", *_WIDTHS),
        *layer("head", _WIDTHS[1], config.num_labels),
    ]


def config_from_hf(hf: dict[str, Any]) -> LeNetConfig:
    """config.json's dict -> `LeNetConfig`."""
    return reader(LeNetConfig)(hf)


FAMILIES = (
    Family(
        "lenet", ("lenet",), config_from_hf, write, LeNet, tensors,
        reads="images", example=image_example,
    ),
)  # fmt: skip
