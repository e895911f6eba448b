"""Fine-tuning of a part: the biases, the last layers, or the head. Baselines of the LoRA paper."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import base
from lora_jax.methods.full import FullFineTuning

HEAD = "^head/"


@base.register("bitfit")
@dataclasses.dataclass(frozen=True)
class BitFit(FullFineTuning):
    """Trains the biases alone (Zaken et al. 2021, arXiv:2106.10199).

    For a new task's head, `train=(r"(^|/)bias$", "^head/")`. Models without biases (Llama) have
    nothing to train: a UserError.
    """

    trains: ClassVar[str] = "the biases"
    train: tuple[str, ...] = (r"(^|/)bias$",)

    def patterns(self, params: Any) -> tuple[str, ...]:
        names = [e for p in partition.flatten(params) for e in partition.expand(p)]
        if not any(n.removesuffix("/value").endswith("bias") for n in names):
            raise UserError("bitfit trains biases, and this model has none: choose another method")
        return self.train


@base.register("head_only")
@dataclasses.dataclass(frozen=True)
class HeadOnly(FullFineTuning):
    """Trains the head alone, on frozen features: linear probing where the head is one kernel.

    A language-model head that is tied to the embedding is not a head of its own: a UserError.
    """

    trains: ClassVar[str] = "the head"
    train: tuple[str, ...] = (HEAD,)

    def patterns(self, params: Any) -> tuple[str, ...]:
        if not any(p.startswith("head/") for p in partition.flatten(params)):
            raise UserError(
                "head_only: this model has no head of its own (tied to the embedding, or none); "
                "name what to train with method.kind='full' and method.train"
            )
        return self.train


@base.register("ft_top")
@dataclasses.dataclass(frozen=True)
class TopLayers(FullFineTuning):
    """Trains the last layers: FT-Top2 of Li and Liang (2021, arXiv:2101.00190) and the LoRA paper.

    The stack is cut there, so that the layers below stay frozen arrays of their own.

    Args:
      layers: how many, counted from the output.
      train: further leaves, such as "^head/" or "^final_norm/".
    """

    trains: ClassVar[str] = "the last layers"
    size_field: ClassVar[str | None] = "layers"

    layers: int = 2
    train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise UserError(f"layers={self.layers} must be at least 1")

    def _layers(self, params: Any) -> dict[str, int]:
        """Number of layers of each stack, by its name (`layers`).

        Raises UserError where there are fewer than are to train, or none are stacked.
        """
        ends: dict[str, int] = {}
        for path in partition.flatten(params):
            if (span := partition.stack_of(path)) is not None:
                name = partition.stack_name(path)
                ends[name] = max(ends.get(name, 0), span[1])
        if not ends:
            raise UserError("ft_top needs layers in a stack (`layers[0:12]`); this tree has none")
        for name, count in ends.items():
            if count < self.layers:
                raise UserError(f"layers={self.layers}, but the model's {name!r} are {count}")
        return ends

    def arrange(self, params: Any) -> Any:
        """Cuts every stack below its last `layers`."""
        cuts = {name: [count - self.layers] for name, count in self._layers(params).items()}
        return super().arrange(partition.split_stacks(params, cuts))

    def patterns(self, params: Any) -> tuple[str, ...]:
        found = []
        for name, count in self._layers(params).items():
            numbers = "|".join(map(str, range(count - self.layers, count)))
            found.append(rf"(^|/){name}/({numbers})/")
        return (*found, *self.train)
