"""(IA)³: inner activations rescaled by learned vectors (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base, peft
from lora_jax.methods.lora import Layout, LoRA, rule_names
from lora_jax.methods.peft import parts
from lora_jax.methods.peft.patterns import module_paths, regexes
from lora_jax.methods.peft.protocol import hf_module
from lora_jax.methods.peft.targets import short_names
from lora_jax.tensors.base import densify
from lora_jax.tensors.rescaled import Rescaled

_PART = "ia3_l"
_CONVOLUTION = "iiio"


@base.register("ia3", peft={"peft_type": "IA3"})
@dataclasses.dataclass(frozen=True)
class IA3(base.Method):
    """l_k ∘ K, l_v ∘ V and l_ff ∘ γ(x·W1): keys, values and hidden units, rescaled (section 3.3).

    l is one at the start, so the model is unchanged. Regexes as in LoRA.

    Args:
      targets: regex(es) of the modules whose outputs are rescaled, their biases with them, as in
        PEFT; or, where `feedforward` matches too, whose inputs are.
      feedforward: regex(es) of the targets whose inputs are rescaled: the layer after the hidden
        units.
      train: regexes of further leaves trained whole.
      layouts: see LoRA.
    """

    trains: ClassVar[str] = "a factor a key, value and hidden unit"
    numeric: ClassVar[tuple[str, ...]] = ("targets",)
    # A module that a member of a pack does not target has live = 0, and a gain of one.
    padding_exact: ClassVar[bool] = True

    targets: str | tuple[str, ...] = (r"attention/(key|value)$", r"mlp/down$")
    feedforward: str | tuple[str, ...] = r"mlp/down$"
    train: tuple[str, ...] = ()
    layouts: tuple[tuple[str, str], ...] = ()

    def _finder(self) -> LoRA:
        """The LoRA of the same targets: it knows which leaves they are."""
        return LoRA(rank=1, targets=self.targets, train=self.train, layouts=self.layouts)

    def _feedforward(self) -> tuple[str, ...]:
        return tuple(p for p in partition.listed(self.feedforward) if p)

    def _inner(self, path: str) -> bool:
        """Whether it is the leaf's inputs that are rescaled."""
        patterns = self._feedforward()
        hits = {any(partition.matches(p, e) for p in patterns) for e in partition.expand(path)}
        if len(hits) > 1:
            raise UserError(
                f"feedforward: {path!r} is one stack, so all its layers or none rescale inputs"
            )
        return hits.pop()

    def _axes(self, path: str, leaf: Any) -> tuple[int, ...]:
        """The leaf's axes, as negative positions, that l runs along besides the batch's: its
        outputs, or its inputs; of a convolution's inputs the channels."""
        layout = self._finder().layout(path, leaf)
        axes = layout.axes("i" if self._inner(path) else "o")
        return axes[-1:] if self._inner(path) and layout.letters == _CONVOLUTION else axes

    def _sizes(self, path: str, leaf: Any) -> tuple[Layout, tuple[int, ...]]:
        """(layout, l's shape [*batch, *in or *out])."""
        layout, shape = self._finder().layout(path, leaf), tuple(leaf.shape)
        own = tuple(shape[i] for i in self._axes(path, leaf))
        return layout, layout.sizes(shape, "b") + own

    def live(self, params: Any) -> dict[str, np.ndarray]:
        """1 for the layers that are rescaled, else 0, by leaf path."""
        if self.feedforward != IA3.feedforward:  # the default is for models that have an mlp/down
            every = [e for p in partition.flatten(params) for e in partition.expand(p)]
            partition.check_patterns(self._feedforward(), every, "feedforward")
        found = {}
        chosen = self._finder().ranks(params)
        self._check_feedforward(params, chosen)
        for path, ranks in chosen.items():
            on = np.asarray(ranks, np.float32)
            found[path] = on if partition.stack_of(path) is not None else on[0]
        return found

    def _check_feedforward(self, params: Any, chosen: Mapping[str, list[int]]) -> None:
        """As in PEFT, `feedforward` tells which of the targets it is about, and adds none."""
        if self.feedforward == IA3.feedforward:
            return
        hit = {e for p, r in chosen.items() for e, n in zip(partition.expand(p), r) if n}  # noqa: B905
        for e in rule_names(params):
            inner = any(partition.matches(p, e) for p in self._feedforward())
            if inner and e not in hit:
                raise UserError(f"feedforward matches {e!r}, which is none of the targets: add it")

    def init(self, key: jax.Array, params: Any) -> base.Trainable:
        flat = partition.flatten(params)
        trainable: base.Trainable = {}
        for path, on in self.live(params).items():
            _, shape = self._sizes(path, flat[path])
            trainable[path] = {"l": jnp.ones(shape) * _like(jnp.asarray(on), len(shape))}
        return {**trainable, **base.copies(params, base.whole_leaves(params, self.train))}

    def numbers(self, params: Any) -> dict[str, Any]:
        """{"live": which layers are rescaled, by leaf path}."""
        return {"live": self.live(params)}

    def combine(
        self,
        params: Any,
        trainable: base.Trainable,
        *,
        key: jax.Array | None = None,
        numbers: Mapping[str, Any] | None = None,
    ) -> Any:
        live = (self.numbers(params) if numbers is None else numbers)["live"]
        flat = partition.flatten(params)
        new = {p: v for p, v in trainable.items() if p not in live}
        for path, on in live.items():
            l = trainable[path]["l"]  # noqa: E741 - the paper's letter
            gain = jnp.where(_like(jnp.asarray(on), l.ndim) > 0, l, 1.0)
            layout, _ = self._sizes(path, flat[path])
            inner = self._inner(path)
            bias = partition.sibling(path, "bias")
            if not inner and bias in flat:
                old = new.get(bias, flat[bias])
                new[bias] = (old * gain).astype(old.dtype)
            kept = {*layout.axes("b"), *self._axes(path, flat[path])}
            unit = [i for i in range(flat[path].ndim) if i - flat[path].ndim not in kept]
            g = jnp.expand_dims(gain, unit)
            new[path] = Rescaled(flat[path], g, path)
        return {"params": partition.combine(params, new)}

    def merge(self, params: Any, trainable: base.Trainable) -> Any:
        """W ∘ l, rounded once to W's dtype."""
        return densify(self.combine(params, trainable)["params"])

    def count(self, params: Any) -> base.Counts:
        flat = partition.flatten(params)
        own = [
            (
                base.target_name(path),
                math.prod(self._sizes(path, flat[path])[1]) // np.size(on) * int(np.sum(on)),
            )
            for path, on in self.live(params).items()
        ]
        whole = base.count_whole(params, base.whole_leaves(params, self.train))
        return base.Counts.of(own, whole.items())

    def frozen(self, params: Any) -> Any:
        return base.holes(params, base.whole_leaves(params, self.train))

    def to_peft(
        self, trainable: base.Trainable, names: peft.ModelNames, params: Any
    ) -> peft.AdapterFiles:
        live = self.live(params)
        held, inner = {}, []
        for path in live:
            l = trainable[path]["l"]  # noqa: E741
            letters = self._finder().layout(path, partition.flatten(params)[path]).letters
            if letters != "b" * (partition.stack_of(path) is not None) + "io":
                raise peft.NoPeftForm(f"{path!r} has more than an input and an output axis")
            l = parts.layers_of(path, l)  # noqa: E741
            held[path] = {_PART: l[:, None, :] if self._inner(path) else l[:, :, None]}
            if self._inner(path):
                inner += [hf_module(names, e) for e in partition.expand(path)]
        on = {p: (np.atleast_1d(x) > 0).tolist() for p, x in live.items()}
        whole = {p: v for p, v in trainable.items() if p not in live}
        config = {
            "peft_type": "IA3", "fan_in_fan_out": False,
            "feedforward_modules": short_names(inner, list(names.modules)),
        }  # fmt: skip
        return parts.write(names, held, on, whole, params, config, gain=_PART)

    @classmethod
    def from_peft(
        cls,
        files: peft.AdapterFiles,
        names: peft.ModelNames,
        params: Any,
        saved: base.Method | None = None,
    ) -> tuple[IA3, base.Trainable]:
        stored = parts.read(
            files, names, (_PART,), known={"feedforward_modules", "init_ia3_weights"}
        )
        inner = [p for p, v in stored.parts.items() if v[_PART].shape[0] == 1 < v[_PART].shape[1]]
        method = saved if isinstance(saved, IA3) else cls(
            targets=stored.targets, train=stored.train,
            feedforward=tuple(regexes(module_paths(inner), module_paths(names.theirs))),
        )  # fmt: skip
        like = jax.eval_shape(lambda: method.init(jax.random.key(0), params))
        trainable: base.Trainable = {}
        for path, wanted in like.items():
            if not isinstance(wanted, dict):
                trainable[path] = parts.whole_of(stored, path, wanted)
                continue
            axis = -2 if method._inner(path) else -1
            size = jnp.expand_dims(jnp.zeros(wanted["l"].shape), axis)
            found = parts.gather(stored, path, _PART, size, files.where)
            trainable[path] = {"l": jnp.squeeze(found, axis)}
        return method, trainable


def _like(on: jax.Array, ndim: int) -> jax.Array:
    """A number per layer, with `ndim` axes."""
    return on.reshape(on.shape + (1,) * (ndim - on.ndim))
