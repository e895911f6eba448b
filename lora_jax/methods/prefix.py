"""Trained keys and values in front of every layer's own: Prefix-Tuning and P-tuning v2.

Axes: L layers, P prefix positions, E embedding, M units of the reparameterisation, K key/value
heads, H head width, C = K·H.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError
from lora_jax.methods import activations, base, peft
from lora_jax.methods.activations import SITES
from lora_jax.methods.partial import HEAD
from lora_jax.methods.peft import prompts

_SHARED = f"{SITES}prefix"
_PARTS = ("key", "value")


def keys_and_values(
    params: Any, k_BSKH: jax.Array, v_BSKH: jax.Array, **context: Any
) -> tuple[jax.Array, jax.Array]:
    """The function at attention/kv: params {key, value} [P, K·H] in front of k and v."""
    heads = k_BSKH.shape[2:]
    rows = (params[part].reshape(-1, *heads) for part in _PARTS)
    key_PKH, value_PKH = rows
    front = activations.rows_in_front
    return front(key_PKH, k_BSKH), front(value_PKH, v_BSKH)


@base.register("prefix_tuning", peft={"peft_type": "PREFIX_TUNING"})
@dataclasses.dataclass(frozen=True)
class PrefixTuning(activations.ActivationMethod):
    """Every layer's attention also sees `length` trained keys and values (Li and Liang 2021,
    arXiv:2101.00190).

    They stand after rotary embedding and do not depend on the text; all texts of a packed row see
    the same ones, and each text's positions go on after the prefix. In training they are the
    outputs of an MLP, tanh between, on one trained row a position; once training is done they are
    kept and the MLP is dropped (section 4.3).

    Args:
      length: P.
      hidden: M; 0: keys and values are trained themselves.
      init_std: of the trained rows, or of the keys and values.
      train: further leaves trained whole, such as "^head/".
    """

    trains: ClassVar[str] = "keys and values before the text, through an MLP"
    inference: ClassVar[str] = "`length` more keys a query"
    numeric: ClassVar[tuple[str, ...]] = ("init_std",)
    size_field: ClassVar[str | None] = "length"

    length: int = 5
    hidden: int = 512
    init_std: float = 1.0

    def __post_init__(self) -> None:
        if self.length < 1 or self.hidden < 0:
            raise UserError(
                f"length={self.length} must be at least 1 and hidden={self.hidden} at least 0"
            )

    def fresh(self, key: jax.Array, params: Any) -> base.Trainable:
        """{sites/layers[i:j]/attention/kv: {key, value} [L, P, C]}; where there is an MLP, its
        last layer {key, value} {kernel [L, M, C], bias [L, C]}, and at sites/prefix what the
        layers share: embedding [P, E] (E = C as in Li and Liang's code), kernel [E, M], bias [M].
        """
        found: base.Trainable = {}
        for stack in activations.layer_stacks(params, self.name):
            path = f"{stack}/attention/kv"
            c = activations.width(params, f"{stack}/attention/key/kernel", self.name)
            found[SITES + path] = {part: self._part(key, f"{path}/{part}", c) for part in _PARTS}
        if self.hidden:
            found[_SHARED] = {
                "embedding": activations.draw(
                    key, "prefix/embedding", (self.length, c), self._normal
                ),
                **_linear(key, "prefix", c, self.hidden),
            }
        return found

    @property
    def _normal(self) -> activations.Draw:
        return activations.Draw("normal", self.init_std)

    def _part(self, key: jax.Array, path: str, c: int) -> Any:
        if self.hidden:
            return _linear(key, path, self.hidden, c)
        return activations.draw(key, path, (self.length, c), self._normal)

    def _settled(self, trained: base.Trainable) -> base.Trainable:
        """Keys and values themselves, whatever they are made of."""
        if _SHARED not in trained:
            return dict(trained)
        shared = trained[_SHARED]
        inner_PM = jnp.tanh(shared["embedding"] @ shared["kernel"] + shared["bias"][None])

        def last(part: Any) -> jax.Array:
            product = jnp.einsum("pm,lmc->lpc", inner_PM, part["kernel"])
            return product + part["bias"][:, None]

        return {
            path: {name: last(part) for name, part in parts.items()}
            for path, parts in trained.items()
            if path != _SHARED
        }

    def sites(self, trained: base.Trainable, params: Any) -> activations.Sites:
        return {
            path.removeprefix(SITES): (parts, keys_and_values, parts["key"].shape[1])
            for path, parts in self._settled(trained).items()
        }

    def settle(self, params: Any, trainable: base.Trainable) -> tuple[PrefixTuning, base.Trainable]:
        trained, whole = activations.split(trainable)
        return dataclasses.replace(self, hidden=0), {**self._settled(trained), **whole}

    # PEFT's file: one row a position, [P, layers · 2 · C], key before value in every layer.

    def to_peft(
        self, trainable: base.Trainable, names: peft.ModelNames, params: Any
    ) -> peft.AdapterFiles:
        trained, whole = activations.split(trainable)
        settled = self._settled(trained)
        layers = []
        for stack in activations.stacks(params):
            pair = [np.asarray(settled[f"{SITES}{stack}/attention/kv"][p]) for p in _PARTS]
            layers.append(np.stack(pair, axis=1))  # [layers, 2, P, C]
        rows = np.concatenate(layers)
        rows = np.moveaxis(rows, 2, 0).reshape(rows.shape[2], -1)
        config = {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
        return prompts.write(names, config, rows, whole, params)

    @classmethod
    def from_peft(
        cls,
        files: peft.AdapterFiles,
        names: peft.ModelNames,
        params: Any,
        saved: base.Method | None = None,
    ) -> tuple[PrefixTuning, base.Trainable]:
        stored = prompts.read(files, names, params)
        method = cls(length=stored.rows.shape[0], hidden=0, train=stored.train)
        if isinstance(saved, cls):
            method = dataclasses.replace(saved, hidden=0)
        count = max(stop for _, stop in activations.stacks(params).values())
        c = stored.rows.shape[1] // (2 * count)
        trainable: base.Trainable = {}
        for stack, (start, stop) in activations.layer_stacks(params, cls.name).items():
            wanted = activations.width(params, f"{stack}/attention/key/kernel", cls.name)
            if stored.rows.shape[1] != 2 * count * wanted:
                raise UserError(
                    f"{files.where} does not fit this model: prompt_embeddings have "
                    f"{stored.rows.shape[1]} columns, its {count} layers ask for "
                    f"2 x {wanted} each"
                )
            rows = stored.rows.reshape(-1, count, 2, c)[:, start:stop]
            parts = {p: jnp.asarray(rows[:, :, i].swapaxes(0, 1)) for i, p in enumerate(_PARTS)}
            trainable[f"{SITES}{stack}/attention/kv"] = parts
        return method, {**trainable, **stored.whole}


def _linear(key: jax.Array, path: str, d_in: int, d_out: int) -> dict[str, jax.Array]:
    """Kernel [.., in, out] and bias [.., out], both U(±1/sqrt(in)), torch's start of a Linear."""
    sample = activations.Draw("uniform", 1.0 / math.sqrt(d_in))
    kernel = activations.draw(key, f"{path}/kernel", (d_in, d_out), sample)
    bias = activations.draw(key, f"{path}/bias", (1, d_out), sample)
    return {"kernel": kernel, "bias": bias.squeeze(-2)}


@base.register("p_tuning_v2", peft={"peft_type": "PREFIX_TUNING"})
@dataclasses.dataclass(frozen=True)
class PTuningV2(PrefixTuning):
    """Deep prompts for understanding tasks (Liu et al. 2022, arXiv:2110.07602): Prefix-Tuning
    without the MLP by default, beside a classification head that trains.

    For a language model, whose head is not new, set `train=()`.
    """

    trains: ClassVar[str] = "keys and values before the text, and the head"
    length: int = 16
    hidden: int = 0
    train: tuple[str, ...] = dataclasses.field(default=(HEAD,), kw_only=True)
