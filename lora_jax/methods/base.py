"""The method protocol: a rule about a parameter tree, with hooks that are no-ops unless needed.

A new method is one file: a frozen dataclass that subclasses `Method`, registered by
`@register("name")`. The trainer, the sweeps and the tables know only this protocol.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods.peft.protocol import AdapterFiles, ModelNames, NoPeftForm
from lora_jax.tensors.base import is_weight

Trainable = dict[str, Any]
METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound="type[Method]")
S = TypeVar("S", bound="Method")


def register(name: str, peft: Mapping[str, Any] | None = None) -> Callable[[M], M]:
    """Class decorator: `method.kind = name` in a config then builds this class.

    `peft` are the entries by which an adapter_config.json is known to be of this method, such as
    `{"peft_type": "LORA", "use_dora": True}`; of several methods that fit, the one with most
    entries reads it. Such a class defines `to_peft` and `from_peft`.
    """

    def add(cls: M) -> M:
        METHODS[name] = cls
        cls.name = name
        cls.peft_entries = dict(peft or {})
        return cls

    return add


@dataclasses.dataclass(frozen=True)
class Counts:
    """Trainable parameters per target, with layers added up (`layers/*/attention/query`)."""

    per_target: dict[str, int]

    @classmethod
    def of(cls, *parts: Iterable[tuple[str, int]]) -> Counts:
        """Pairs of a target and a number; those of the same target are added up."""
        counts: dict[str, int] = {}
        for name, n in itertools.chain(*parts):
            counts[name] = counts.get(name, 0) + n
        return cls(counts)

    @property
    def total(self) -> int:
        return sum(self.per_target.values())

    def __str__(self) -> str:
        rows = [*self.per_target.items(), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {n:>14,}" for name, n in rows)


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods. `init`, `combine`, `merge` and `count` are required."""

    name: ClassVar[str] = ""
    # Sweeps: fields in which members of one program may differ (all they change are numbers and
    # the sizes of padded leaves), and whether padding with zeros is exact under training.
    numeric: ClassVar[tuple[str, ...]] = ()
    padding_exact: ClassVar[bool] = False
    peft_entries: ClassVar[Mapping[str, Any]] = {}
    # In a few words, for the table of methods (`methods.table`): what trains, whether `merge` can,
    # and what an adapter that cannot be merged costs at inference.
    trains: ClassVar[str] = ""
    mergeable: ClassVar[bool] = True
    inference: ClassVar[str] = "none"
    # The field that says how much trains, an int (rank, units, length, …); None: there is none.
    size_field: ClassVar[str | None] = None

    def arrange(self, params: Any) -> Any:
        """`params` as the method needs them cut (`partition.split_stacks`): called once, on load.

        All other methods of the protocol get what it returns. Here: between layers of which a leaf
        is trained whole (`train`) and others.
        """
        return cut_between(params, getattr(self, "train", ()))

    def placeholders(self, params: Any) -> tuple[int, ...]:
        """Token ids to put behind every prompt, in training and in evaluation; none counts as a
        target. Ids from the vocabulary's size on are free: the model has no rows for them."""
        return ()

    def init(self, key: jax.Array, params: Any) -> Trainable:
        """The trainable tree at the start: a flat dict keyed by leaf path. Never aliases params."""
        raise TypeError(f"{type(self).__name__} does not define init")

    def numbers(self, params: Any) -> dict[str, Any]:
        """What `combine` needs besides `trainable` and is not trained: nested dicts of arrays.

        Scales and rates, as arrays by leaf path, so that members of a sweep may differ in them.
        """
        return {}

    def combine(
        self,
        params: Any,
        trainable: Trainable,
        *,
        key: jax.Array | None = None,
        numbers: Mapping[str, Any] | None = None,
    ) -> Any:
        """Flax variables `{"params": …}` (and further collections) to apply the model to.

        Run the model through `lora_jax.adapt`. `key` switches dropout on. With `numbers` (those of
        a pack's member) nothing may be read from the fields that `numeric` names.
        """
        raise TypeError(f"{type(self).__name__} does not define combine")

    def merge(self, params: Any, trainable: Trainable) -> Any:
        """An ordinary parameter tree that computes the same; UserError if the method cannot."""
        raise TypeError(f"{type(self).__name__} does not define merge")

    def count(self, params: Any) -> Counts:
        """Trainable parameters per target; padding does not count."""
        raise TypeError(f"{type(self).__name__} does not define count")

    def frozen(self, params: Any) -> Any:
        """`params` with a hole where a leaf is trained whole: what the frozen side must hold."""
        return params

    def with_size(self: S, size: int) -> S:
        """The method with another number in `size_field`; UserError where it has none, or rules.

        `lora_jax.match_budget` finds the size for a number of trainable parameters.
        """
        if self.size_field is None:
            raise UserError(f"{self.name!r} has no size: what it trains is all or nothing")
        if not isinstance(old := getattr(self, self.size_field), int):
            raise UserError(
                f"{self.size_field}={old!r} is a set of rules: give {self.name!r} one number"
            )
        return dataclasses.replace(self, **{self.size_field: size})

    def scheduled(self, steps: int) -> Method:
        """The method for a run of so many updates, where it has a schedule of its own (AdaLoRA)."""
        return self

    def prepare(self, apply: Callable[..., Any], params: Any, batches: Iterable[Any]) -> Method:
        """Data-driven starts (EVA, LoRA-GA): the method to use after looking at some batches."""
        return self

    def penalty(self, trainable: Trainable) -> jax.Array | float:
        """Added to the loss."""
        return 0.0

    def wrap_optimizer(self, tx: Any) -> Any:
        """The optimizer to use in place of `tx` (LoRA+, GaLore)."""
        return tx

    def after_update(self, state: Any) -> Any:
        """Pure function of the training state, inside the step (AdaLoRA, ReLoRA)."""
        return state

    def settle(self, params: Any, trainable: Trainable) -> tuple[Method, Trainable]:
        """(method, trainable) to keep once training is done: what only training needed is gone.

        Both combine to the same variables.
        """
        return self, trainable

    def to_peft(self, trainable: Trainable, names: ModelNames, params: Any) -> AdapterFiles:
        """The method and what it trained, as PEFT's files hold them.

        `names` are the model's in Hugging Face's form; `params` the base, or only its shapes.
        Raises NoPeftForm where PEFT has no such thing: it is then saved in our own form.
        """
        raise NoPeftForm(f"PEFT has no method {self.name!r}")

    @classmethod
    def from_peft(
        cls,
        files: AdapterFiles,
        names: ModelNames,
        params: Any,
        saved: Method | None = None,
    ) -> tuple[Method, Trainable]:
        """(method, trainable) of PEFT's files; UserError for what is not implemented or fits ill.

        `saved` is the method that `to_peft` was called on, where the files tell it: the one to
        return, unless the files cannot give back its tree. Else the method is what PEFT's config
        says, and fields that the config does not hold take their defaults.
        """
        raise UserError(f"{files.where}: {cls.name!r} is not read from PEFT's files")


def cut_between(params: Any, *groups: Sequence[str]) -> Any:
    """Cuts stacks between layers of which different groups of patterns match a leaf."""
    for pattern in itertools.chain(*groups):
        partition.compiled(pattern)  # told before anything is matched
    cuts: dict[str, list[int]] = {}
    for path in partition.flatten(params) if any(groups) else ():
        if (span := partition.stack_of(path)) is None:
            continue
        kinds = [
            tuple(any(partition.matches(p, e) for p in group) for group in groups)
            for e in partition.expand(path)
        ]
        edges = [span[0] + i for i, (a, b) in enumerate(itertools.pairwise(kinds), 1) if a != b]
        if edges:
            cuts.setdefault(partition.stack_name(path), []).extend(edges)
    return partition.split_stacks(params, cuts) if cuts else params


def whole_leaves(params: Any, patterns: tuple[str, ...]) -> list[str]:
    """Paths of the leaves trained whole: those whose expanded paths match a pattern.

    Without patterns there are none. Raises UserError where a pattern matches nothing, or only some
    layers of a stacked leaf: such a stack must first be cut in segments (`Method.arrange`), since a
    leaf either trains or does not.
    """
    if not patterns:
        return []
    flat = partition.flatten(params)
    every = [e for p in flat for e in partition.expand(p)]
    partition.check_patterns(patterns, every, "train")
    chosen = []
    for path in flat:
        layers = partition.expand(path)
        hits = [any(partition.matches(p, e) for p in patterns) for e in layers]
        if all(hits) and is_weight(flat[path]):
            raise UserError(
                f"train: {path!r} is a frozen {type(flat[path]).__name__} and cannot be trained "
                "whole: leave it out of `train`, or of what is quantised"
            )
        if all(hits):
            chosen.append(path)
        elif any(hits):
            raise UserError(
                f"train: {path!r} is stacked and only some of its layers match; cut it first: "
                "params = method.arrange(params)"
            )
    return chosen


def copy(x: Any) -> jax.Array:
    """A fresh buffer: trainable leaves are donated to the step, params never are."""
    return jnp.array(x, copy=True)


def copies(params: Any, paths: Iterable[str]) -> Trainable:
    """Fresh buffers of some leaves, by path."""
    flat = partition.flatten(params)
    return {path: copy(flat[path]) for path in paths}


def target_name(path: str) -> str:
    """`layers[0:30]/attention/query/kernel` as `layers/*/attention/query/kernel`."""
    return re.sub(r"\[\d+:\d+\]", "/*", path)


def count_whole(params: Any, paths: Iterable[str]) -> dict[str, int]:
    flat = partition.flatten(params)
    sizes = ((target_name(p), int(np.prod(flat[p].shape, dtype=np.int64))) for p in paths)
    return Counts.of(sizes).per_target


def holes(params: Any, paths: Iterable[str]) -> Any:
    """`params` with holes at some paths; itself without any."""
    if not (wanted := set(paths)):
        return params
    return partition.split(params, lambda path, _: path in wanted)[0]
