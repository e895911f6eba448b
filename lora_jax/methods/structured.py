"""Methods with LoRA's targets, ranks and scales, and another kind of update of a matrix."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base, peft
from lora_jax.methods.lora import LoRA
from lora_jax.methods.peft import parts
from lora_jax.methods.peft.lora_write import module_ranks_of
from lora_jax.methods.peft.patterns import module_paths, rules, seven_digits
from lora_jax.methods.peft.protocol import hf_module
from lora_jax.methods.peft.targets import lookup, pattern_of
from lora_jax.tensors.base import densify
from lora_jax.tensors.low_rank import LowRank

S = TypeVar("S", bound="Structured")


@dataclasses.dataclass(frozen=True)
class Part:
    """One of PEFT's arrays, which is the transpose of ours.

    Attributes:
      name: the end of its tensor's name.
      rank_axis: of ours (-1 or -2), along which a layer's rank runs; None: along neither.
    """

    name: str
    rank_axis: int | None = None


@dataclasses.dataclass(frozen=True)
class Structured(LoRA):
    """Base of such methods; a subclass defines `_drawn`, `_adapted` and `_parameters`.

    Targets are matrices (stacked or not); there is no choice of start. Dropout acts on the input
    of the update, which PEFT's forms of these methods do not have.
    """

    numeric: ClassVar[tuple[str, ...]] = ("rank", "alpha", "targets", "scaling", "dropout")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._left_out("start", "init_scale", why="has a start of its own")

    def ranks(self, params: Any) -> dict[str, list[int]]:
        flat, found = partition.flatten(params), super().ranks(params)
        for path in found:
            stacked = partition.stack_of(path) is not None
            if self.layout(path, flat[path]).letters != "b" * stacked + "io":
                raise UserError(
                    f"{type(self).__name__} adapts matrices, not {path!r} of shape "
                    f"{tuple(flat[path].shape)}: take it off targets"
                )
        return found

    def _drawn(self, key: jax.Array, layer: str, leaf: Any, r: int, widest: int) -> dict[str, Any]:
        """A layer's arrays at the start, by name: rank r, padded to `widest`."""
        raise TypeError(f"{type(self).__name__} does not define _drawn")

    def _factors(self, key: jax.Array, path: str, leaf: Any, ranks: list[int]) -> Any:
        layers = [
            self._drawn(key, layer, leaf, r, max(ranks))
            for layer, r in zip(partition.expand(path), ranks, strict=True)
        ]
        if partition.stack_of(path) is None:
            return layers[0]
        return jax.tree.map(lambda *x: jnp.stack(x), *layers)

    def _adapted(self, leaf: LowRank, value: Any, numbers: Mapping[str, Any]) -> Any:
        """The weight of one target. `leaf` has W, scale, key, rate and path; no factors."""
        raise TypeError(f"{type(self).__name__} does not define _adapted")

    def _weights(
        self, params: Any, trainable: base.Trainable, key: Any, numbers: Mapping[str, Any]
    ) -> Any:
        none = {"a": jnp.zeros((0, 0)), "b": jnp.zeros((0, 0))}
        adapted = numbers["scale"]
        bare = {p: none if p in adapted else v for p, v in trainable.items()}
        tree = super()._weights(params, bare, key, numbers)
        flat = partition.flatten(tree)
        new = {p: self._adapted(flat[p], trainable[p], numbers) for p in adapted}
        return partition.replace(tree, new)

    def unmerge(self, merged: Any, trainable: base.Trainable) -> Any:
        """Takes the update off again; leaves trained whole stay as they are in `merged`."""
        numbers = self.numbers(merged)
        minus = {**numbers, "scale": {p: -s for p, s in numbers["scale"].items()}}
        only = {p: trainable[p] for p in numbers["scale"]}
        return densify(self._weights(merged, only, None, minus))

    # PEFT's LoHa and LoKr: arrays by module, with ranks and alphas as of a LoRA.

    def _write(
        self,
        peft_type: str,
        held: Mapping[str, Part],
        trainable: base.Trainable,
        names: peft.ModelNames,
        params: Any,
        **config: Any,
    ) -> peft.AdapterFiles:
        if self.dropout or self.scaling != "standard":
            raise peft.NoPeftForm(f"PEFT's {peft_type} has no dropout of inputs and scales alpha/r")
        ranks, scales = self.ranks(params), self.scales(params)
        arrays: dict[str, dict[str, Any]] = {}
        for path, layers in ranks.items():
            arrays[path] = {
                held[k].name: [
                    _cut(x, held[k].rank_axis, r).T
                    for x, r in zip(parts.layers_of(path, value), layers, strict=True)
                ]
                for k, value in trainable[path].items()
            }
        module_ranks = module_ranks_of(names, ranks)
        alphas = {}
        for path, layers in ranks.items():
            one = {path: [int(r > 0) for r in layers]}
            pairs = [(s, r) for s, r in zip(np.atleast_1d(scales[path]), layers, strict=True) if r]
            for module, (s, r) in zip(module_ranks_of(names, one), pairs, strict=True):
                alphas[module] = seven_digits(float(s) * r)
        rank = Counter(module_ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        whole = {p: v for p, v in trainable.items() if p not in ranks}
        own = {
            "peft_type": peft_type, "r": rank, "alpha": alpha,
            "rank_pattern": pattern_of(module_ranks, rank),
            "alpha_pattern": pattern_of(alphas, alpha),
            **config,
        }  # fmt: skip
        return parts.write(names, arrays, ranks, whole, params, own)

    @classmethod
    def _read(
        cls: type[S],
        held: Mapping[str, Part],
        files: peft.AdapterFiles,
        names: peft.ModelNames,
        params: Any,
        saved: base.Method | None,
        **fields: Any,
    ) -> tuple[S, base.Trainable]:
        """(method, trainable); `fields` are of the method, from entries that only it knows."""
        config = files.config
        stored = parts.read(
            files, names, [p.name for p in held.values()],
            known={"r", "alpha", "rank_pattern", "alpha_pattern", "init_weights", *fields,
                   "use_effective_conv2d", "rank_dropout_scale"},
        )  # fmt: skip
        every = module_paths(names.theirs)
        ranks, alphas = {}, {}
        for ours in stored.parts:
            module = hf_module(names, ours)
            at = partition.module(ours)
            ranks[at] = int(lookup(config.get("rank_pattern"), module, config.get("r", 8)))
            alphas[at] = lookup(config.get("alpha_pattern"), module, config.get("alpha", 8))
        method = saved if isinstance(saved, cls) else cls(
            rank=rules(ranks, every), alpha=rules(alphas, every), targets=stored.targets,
            train=stored.train, **fields,
        )  # fmt: skip
        like = jax.eval_shape(lambda: method.init(jax.random.key(0), params))
        ours_first = {leaf: {n: x.T for n, x in of.items()} for leaf, of in stored.parts.items()}
        turned = dataclasses.replace(stored, parts=ours_first)
        part_names = {k: part.name for k, part in held.items()}
        return method, parts.fill(turned, like, part_names, files.where)


def _cut(x: np.ndarray, axis: int | None, rank: int) -> np.ndarray:
    """A layer's array without the padding of its rank."""
    if axis is None:
        return x
    return x[:, :rank] if axis == -1 else x[:rank]
