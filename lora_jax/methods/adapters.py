"""Adapters: small bottleneck networks inside the layers, which the LoRA paper compares with.

x + up(f(down(x))), with a bias in each, r units between (Houlsby et al. 2019, arXiv:1902.00751).
They differ in where they stand and whether a LayerNorm comes first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax import partition
from lora_jax.errors import UserError, nearest
from lora_jax.methods import activations, base
from lora_jax.methods.activations import SITES
from lora_jax.tensors.base import wide

# All map 0 to 0: units that only pad a smaller adapter stay 0 and get no gradient.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
_STARTS = ("zero", "normal")
_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """The function at a site: x + up(f(down(x))), or down of LayerNorm(x) where there is one."""

    activation: str

    def __call__(self, params: Any, x_BTD: jax.Array, **context: Any) -> jax.Array:
        """params: down [D, r], down_bias [r], up [r, D], up_bias [D], maybe norm {scale, bias}
        [D]; x [B, T, D] -> [B, T, D]. Products in x's dtype, summed in float32 or wider."""
        dtype = wide(x_BTD.dtype)
        inner = _layer_norm(params["norm"], x_BTD) if "norm" in params else x_BTD

        def affine(x: jax.Array, name: str) -> jax.Array:
            kernel = params[name].astype(x_BTD.dtype)
            product = jnp.einsum("bti,io->bto", x, kernel, preferred_element_type=dtype)
            return product + params[f"{name}_bias"].astype(dtype)[None, None]

        hidden_BTR = ACTIVATIONS[self.activation](affine(inner, "down")).astype(x_BTD.dtype)
        return x_BTD + affine(hidden_BTR, "up").astype(x_BTD.dtype)


def _layer_norm(norm: Any, x: jax.Array) -> jax.Array:
    y = x.astype(wide(x.dtype))
    mean = jnp.mean(y, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(y - mean), axis=-1, keepdims=True)
    scale, bias = (norm[n].astype(y.dtype)[None, None] for n in ("scale", "bias"))
    return ((y - mean) * jax.lax.rsqrt(variance + _EPSILON) * scale + bias).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Adapter(activations.ActivationMethod):
    """Base of the adapters; a subclass says where they stand (`places`) and if there is a norm.

    Args:
      size: r, the units of the bottleneck.
      activation: f, one of relu, gelu, gelu_new (the tanh form), silu, tanh.
      start: "zero": up is 0, so the model is unchanged at the start; "normal": up is as small as
        down, so it is nearly unchanged (Houlsby et al., 3.6).
      init_std: down (and up) start as N(0, init_std²), cut at two deviations.
      drop: the lowest so many layers have no adapters (AdapterDrop); the stack is cut there.
      train: further leaves trained whole, such as "^head/".
    """

    inference: ClassVar[str] = "two small products and a function a place"

    # Padding: a zero column of down, with a zero bias, gives f(0) = 0 beside a zero row of up.
    numeric: ClassVar[tuple[str, ...]] = ("size", "start", "init_std")
    places: ClassVar[tuple[str, ...]] = ()
    norm: ClassVar[bool] = False
    size_field: ClassVar[str | None] = "size"

    size: int = 64
    activation: str = "relu"
    start: str = "zero"
    init_std: float = 1e-2
    drop: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"activation={self.activation!r}; {nearest(self.activation, ACTIVATIONS)}"
            )
        if self.start not in _STARTS:
            raise UserError(f"start must be one of {_STARTS}, not {self.start!r}")
        if self.size < 1 or self.drop < 0:
            raise UserError(f"size={self.size} must be at least 1, and drop={self.drop} at least 0")

    def arrange(self, params: Any) -> Any:
        """Cuts the stack above the layers without adapters."""
        params = super().arrange(params)
        if not self.drop:
            return params
        names = {partition.stack_name(s) for s in activations.stacks(params)}
        return partition.split_stacks(params, {name: [self.drop] for name in names})

    def _stacks(self, params: Any) -> list[str]:
        found = activations.layer_stacks(params, self.name)
        for stack, (first, stop) in found.items():
            if first < self.drop < stop:
                raise UserError(
                    f"drop={self.drop} is inside of {stack!r}; cut it first: "
                    "params = method.arrange(params)"
                )
        kept = [stack for stack, (first, _) in found.items() if first >= self.drop]
        if not kept:
            raise UserError(f"drop={self.drop} leaves no layer of {list(found)} an adapter")
        return kept

    def fresh(self, key: jax.Array, params: Any) -> base.Trainable:
        found = {}
        for stack in self._stacks(params):
            for at in self.places:
                leaf = "mlp/down/kernel" if at == "mlp/out" else "attention/out/kernel"
                d = activations.width(params, f"{stack}/{leaf}", self.name)
                found[f"{SITES}{stack}/{at}"] = self._bottleneck(key, f"{SITES}{stack}/{at}", d)
        return found

    def _bottleneck(self, key: jax.Array, path: str, d: int) -> dict[str, Any]:
        """The parameters of one site in all layers L of a stack, each with a leading axis."""
        sample = activations.Draw("truncated", self.init_std)
        down_LRD = activations.draw(key, f"{path}/down", (self.size, d), sample)
        up_LRD = jnp.zeros_like(down_LRD)
        if self.start == "normal":
            up_LRD = activations.draw(key, f"{path}/up", (self.size, d), sample)
        layers = down_LRD.shape[0]
        found: dict[str, Any] = {
            "down": jnp.swapaxes(down_LRD, 1, 2),
            "down_bias": jnp.zeros((layers, self.size)),
            "up": up_LRD,
            "up_bias": jnp.zeros((layers, d)),
        }
        if self.norm:
            found["norm"] = {"scale": jnp.ones((layers, d)), "bias": jnp.zeros((layers, d))}
        return found

    def sites(self, trained: base.Trainable, params: Any) -> activations.Sites:
        fn = Bottleneck(self.activation)
        return {path.removeprefix(SITES): (values, fn, 0) for path, values in trained.items()}


@base.register("adapter_h")
@dataclasses.dataclass(frozen=True)
class AdapterH(Adapter):
    """After the attention and after the MLP, before each is added (Houlsby et al. 2019, fig. 2).

    With `train=(r"^layers/.*_norm/",)` the layers' norms train too, as in that paper.
    """

    trains: ClassVar[str] = "bottlenecks after attention and MLP"
    places: ClassVar[tuple[str, ...]] = ("attention/out", "mlp/out")
    activation: str = "gelu"


@base.register("adapter_l")
@dataclasses.dataclass(frozen=True)
class AdapterL(Adapter):
    """On what each layer passes on, after a LayerNorm of its own (Lin et al. 2020,
    arXiv:2004.03829, eq. 1)."""

    trains: ClassVar[str] = "a norm and a bottleneck after each layer"
    places: ClassVar[tuple[str, ...]] = ("out",)
    norm: ClassVar[bool] = True


@base.register("adapter_p")
@dataclasses.dataclass(frozen=True)
class AdapterP(Adapter):
    """After the MLP alone, before it is added (Pfeiffer et al. 2021, arXiv:2005.00247).

    AdapterHub's form besides runs the layer's own norm once more in front of it; this one does not.
    """

    trains: ClassVar[str] = "a bottleneck after each MLP"
    places: ClassVar[tuple[str, ...]] = ("mlp/out",)


@base.register("adapter_d")
@dataclasses.dataclass(frozen=True)
class AdapterD(AdapterP):
    """AdapterDrop (Rücklé et al. 2021, arXiv:2010.11918): none in the lowest `drop` layers, whose
    forward pass then needs no backward pass."""

    trains: ClassVar[str] = "a bottleneck after each MLP of the upper layers"
    drop: int = 3
