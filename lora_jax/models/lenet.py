"""LeNet (LeCun et al. 1998) as Li et al. have it (arXiv:1804.08838): ReLU and maximum pooling.

Two convolutions of 5 x 5 without padding (6 and 16 maps), each pooled by 2 x 2, then layers of 120
and 84 units and the head. Parameters: ``conv_0``, ``conv_1``, ``hidden_0``, ``hidden_1``, ``head``,
each a 2-D kernel (in, out) and a bias; a convolution's inputs are its window's, 5·5·C.

Axes: B batch, H, W, C of an image or of maps, D features, K classes.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
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
    """One of 5 x 5 without padding, and the maximum of each 2 x 2 of its places.

    Four neighbouring places read a window of 6 x 6, so both together are one product with the
    kernel placed four ways into such windows, and a maximum over the four. The kernel meets
    nothing but a product, as in a Dense layer: so every kind of weight may stand for it, and the
    members of a pack each have their own at full speed (a convolution with a kernel a member is a
    grouped one, for which a CPU has no fast code). The batch is the last axis, so that all else
    copies or compares long runs.
    """

    maps: int
    dtype: str

    @nn.compact
    def __call__(self, x_CHWB: jax.Array) -> jax.Array:
        """[C, H, W, B] -> [maps, (H - 4) / 2, (W - 4) / 2, B]."""
        inputs, height, width, rows = x_CHWB.shape
        kernel = self.param("kernel", HE, (_WINDOW * _WINDOW * inputs, self.maps))
        bias = self.param("bias", nn.initializers.zeros, (self.maps,)).astype(self.dtype)
        high, wide = (height - _WINDOW + 1) // 2, (width - _WINDOW + 1) // 2
        # An array, whatever kind of weight the kernel is.
        taps = jnp.eye(_WINDOW * _WINDOW * inputs, dtype=self.dtype) @ kernel.astype(self.dtype)
        windows = _windows(x_CHWB, high, wide).reshape(-1, high * wide * rows)
        y = placed(taps.reshape(_WINDOW, _WINDOW, inputs, self.maps)) @ windows
        four = y.reshape(4, self.maps, high, wide, rows)
        highest = jnp.maximum(jnp.maximum(four[0], four[1]), jnp.maximum(four[2], four[3]))
        return highest + bias.reshape(-1, 1, 1, 1)


def placed(taps: jax.Array) -> jax.Array:
    """[5, 5, C, maps] -> [4·maps, 9·C·4]: the kernel at each corner of 6 x 6, for `_windows`."""
    inputs, maps = taps.shape[2:]
    corners = itertools.product((0, 1), (0, 1))
    pads = (((a, 1 - a), (b, 1 - b), (0, 0), (0, 0)) for a, b in corners)
    six = jnp.stack([jnp.pad(taps, pad) for pad in pads])
    # Rows and columns of a window count by pairs first, then within.
    paired = six.reshape(4, 3, 2, 3, 2, inputs, maps)
    return paired.transpose(0, 6, 1, 3, 5, 2, 4).reshape(4 * maps, -1)


def _windows(x_CHWB: jax.Array, high: int, wide: int) -> jax.Array:
    """[9·C·4, high, wide, B]: the window of 6 x 6 of every other place, as 3 x 3 pairs of pairs."""
    inputs, height, width, rows = x_CHWB.shape
    pairs = x_CHWB.reshape(inputs, height // 2, 2, width // 2, 2, rows)
    pairs = pairs.transpose(0, 2, 4, 1, 3, 5).reshape(4 * inputs, height // 2, width // 2, rows)
    shifts = itertools.product(range(3), range(3))
    return jnp.concatenate([pairs[:, i : i + high, j : j + wide] for i, j in shifts])


class LeNet(nn.Module):
    """44,426 parameters for 28 x 28 x 1 and ten classes."""

    config: LeNetConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float [B, H, W, C] -> logits [B, K]."""
        c = self.config
        x_CHWB = images.astype(c.dtype).transpose(3, 1, 2, 0)
        for number, maps in enumerate(_MAPS):
            # The maximum is not changed by a ReLU before it or after it.
            x_CHWB = nn.relu(Convolution(maps, c.dtype, name=f"conv_{number}")(x_CHWB))
        x_BD = x_CHWB.transpose(3, 1, 2, 0).reshape(len(images), -1)
        for number, width in enumerate(_WIDTHS):
            dense = nn.Dense(width, dtype=c.dtype, kernel_init=HE, name=f"hidden_{number}")
            x_BD = nn.relu(dense(x_BD))
        return nn.Dense(c.num_labels, dtype=c.dtype, kernel_init=HE, name="head")(x_BD)


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
