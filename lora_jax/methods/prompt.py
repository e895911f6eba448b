"""Prompt Tuning: trained embeddings in front of the text (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import partition
from lora_jax.errors import UserError
from lora_jax.methods import activations, base, peft
from lora_jax.methods.activations import SITES
from lora_jax.methods.peft import prompts
from lora_jax.tensors.base import densify

EMBEDDING = "embed/embedding"
_STARTS = ("random", "vocabulary", "labels")
_PATH = f"{SITES}embed/out"


def rows_before_text(params: Any, x_BTD: jax.Array, **context: Any) -> jax.Array:
    """The function at embed/out: params {rows} [P, D] before x."""
    return activations.rows_in_front(params["rows"], x_BTD)


@base.register("prompt_tuning", peft={"peft_type": "PROMPT_TUNING"})
@dataclasses.dataclass(frozen=True)
class PromptTuning(activations.ActivationMethod):
    """`length` trained embeddings before every text; all texts of a packed row see them.

    A packed row has one copy, so packing is for decoders: there a prompt does not see the texts.

    Args:
      length: P.
      start: "random" U(±init_range); "vocabulary": embeddings of random tokens; "labels": those
        of the class labels, the mean where a label is several tokens, and random tokens' where
        there are fewer labels than rows (section 3.2).
      init_range: of "random".
      vocabulary: tokens are drawn among the first so many ids: the frequent ones, as vocabularies
        are ordered (5000 in the paper).
      labels: token ids of each label: `tuple(tokenizer.encode(" yes"))`.
      train: further leaves trained whole, such as "^head/".
    """

    trains: ClassVar[str] = "embeddings before the text"
    inference: ClassVar[str] = "`length` more positions"
    numeric: ClassVar[tuple[str, ...]] = ("start", "init_range", "vocabulary", "labels")
    size_field: ClassVar[str | None] = "length"

    length: int = 20
    start: str = "vocabulary"
    init_range: float = 0.5
    vocabulary: int = 5000
    labels: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.start not in _STARTS:
            raise UserError(f"start must be one of {_STARTS}, not {self.start!r}")
        if self.length < 1 or self.vocabulary < 1:
            raise UserError("length and vocabulary must be at least 1")
        if self.start == "labels" and (not self.labels or not all(self.labels)):
            raise UserError("start='labels' needs labels=: the token ids of each label")
        if len(self.labels) > self.length and self.start == "labels":
            raise UserError(f"{len(self.labels)} labels need length={len(self.labels)} or more")

    def fresh(self, key: jax.Array, params: Any) -> base.Trainable:
        """{sites/embed/out: {rows [P, D]}}."""
        d = activations.width(params, EMBEDDING, self.name)
        if self.start == "random":
            rows_PD = activations.draw(
                key, "prompt", (self.length, d), activations.Draw("uniform", self.init_range)
            )
        else:
            rows_PD = self._of_tokens(key, densify(partition.flatten(params)[EMBEDDING]))
        return {_PATH: {"rows": rows_PD}}

    def _of_tokens(self, key: jax.Array, table_VD: Any) -> jax.Array:
        labels = self.labels if self.start == "labels" else ()
        size = int(table_VD.shape[0])
        if any(not 0 <= i < size for ids in labels for i in ids):
            raise UserError(f"labels {labels} hold ids outside of the vocabulary of {size}")
        token = activations.Draw("integers", min(self.vocabulary, size))
        drawn_P = activations.draw(key, "prompt", (self.length,), token)
        named = [jnp.mean(table_VD[jnp.array(ids)], axis=0) for ids in labels]
        random_PD = jnp.take(table_VD, drawn_P[len(labels) :], axis=0)
        return jnp.concatenate([*(x[None] for x in named), random_PD]).astype(jnp.float32)

    def sites(self, trained: base.Trainable, params: Any) -> activations.Sites:
        rows = trained[_PATH]
        return {_PATH.removeprefix(SITES): (rows, rows_before_text, rows["rows"].shape[0])}

    def to_peft(
        self, trainable: base.Trainable, names: peft.ModelNames, params: Any
    ) -> peft.AdapterFiles:
        if "head/out/kernel" in names.theirs:
            raise peft.NoPeftForm("there an encoder's head reads the prompt's first row, not [CLS]")
        trained, whole = activations.split(trainable)
        config = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
        return prompts.write(names, config, np.asarray(trained[_PATH]["rows"]), whole, params)

    @classmethod
    def from_peft(
        cls,
        files: peft.AdapterFiles,
        names: peft.ModelNames,
        params: Any,
        saved: base.Method | None = None,
    ) -> tuple[PromptTuning, base.Trainable]:
        if "head/out/kernel" in names.theirs:
            raise UserError(
                f"{files.where}: PEFT's prompts before an encoder with a head make it read the "
                "prompt's first row in place of [CLS], which is not implemented here"
            )
        stored = prompts.read(files, names, params)
        d = activations.width(params, EMBEDDING, cls.name)
        if stored.rows.shape[1] != d:
            raise UserError(
                f"{files.where} does not fit this model: its rows are {stored.rows.shape[1]} wide, "
                f"the model's {d}"
            )
        method = cls(length=stored.rows.shape[0], start="random", train=stored.train)
        if isinstance(saved, cls):
            method = saved
        return method, {_PATH: {"rows": jnp.asarray(stored.rows)}, **stored.whole}
