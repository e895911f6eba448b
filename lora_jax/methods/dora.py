"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353)."""

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
from lora_jax.methods.lora import LoRA
from lora_jax.methods.peft import fused
from lora_jax.methods.peft.protocol import hf_module
from lora_jax.methods.peft.whole import host
from lora_jax.tensors.dora import column_squares, dora

_MAGNITUDE = ".lora_magnitude_vector"


@base.register("dora", peft={"peft_type": "LORA", "use_dora": True})
@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """W' = m ∘ (W + s·A·B) / ‖W + s·A·B‖, norms over each output's inputs (eq. 5).

    m starts as the norms of W, so the model is unchanged at the start; the norm takes no gradient
    (section 4.3). Fields as in LoRA. Each target trains, besides A and B, one number an output.
    """

    trains: ClassVar[str] = "A, B and a magnitude an output"

    # A padded or untargeted module's columns have no norm, and a gain of one whatever m is there.
    padding_exact: ClassVar[bool] = True

    def squares(self, params: Any) -> dict[str, jax.Array]:
        """|W|² of every output, by leaf path: [*batch, *out]; zeros for layers of rank 0."""
        flat = partition.flatten(params)
        found = {}
        for path, ranks in self.ranks(params).items():
            squares = column_squares(flat[path], self.layout(path, flat[path]).axes("i"))
            if partition.stack_of(path) is not None:
                live = np.asarray(ranks).reshape(-1, *[1] * (squares.ndim - 1)) > 0
                squares = jnp.where(live, squares, 0.0)
            found[path] = squares
        return found

    def init(self, key: jax.Array, params: Any) -> base.Trainable:
        trainable = super().init(key, params)
        for path, squares in self.squares(params).items():
            trainable[path] = {**trainable[path], "m": jnp.sqrt(squares)}
        return trainable

    def numbers(self, params: Any) -> dict[str, Any]:
        """LoRA's, and {"square": |W|² of every output by leaf path}."""
        return {**super().numbers(params), "square": self.squares(params)}

    def _weights(
        self, params: Any, trainable: base.Trainable, key: Any, numbers: Mapping[str, Any]
    ) -> Any:
        tree = super()._weights(params, trainable, key, numbers)
        flat = partition.flatten(tree)
        new = {p: dora(flat[p], trainable[p]["m"], x) for p, x in numbers["square"].items()}
        return partition.replace(tree, new)

    def unmerge(self, merged: Any, trainable: base.Trainable) -> Any:
        """UserError: the norms of W cannot be had back from W'."""
        raise UserError("DoRA cannot be unmerged: keep the base's parameters")

    def _parameters(self, path: str, leaf: Any, ranks: list[int]) -> int:
        layout, shape = self.layout(path, leaf), tuple(leaf.shape)
        outs = layout.sizes(shape, "o") + layout.sizes(shape, "b")
        magnitudes = math.prod(outs) // len(ranks) * sum(r > 0 for r in ranks)
        return super()._parameters(path, leaf, ranks) + magnitudes

    # PEFT's files: LoRA's, and a vector of magnitudes for each module.

    def to_peft(
        self, trainable: base.Trainable, names: peft.ModelNames, params: Any
    ) -> peft.AdapterFiles:
        files = super().to_peft(trainable, names, params)
        magnitudes: dict[str, np.ndarray] = {}
        for leaf, ranks in self.ranks(params).items():
            m = host(trainable[leaf]["m"])
            layers = m if partition.stack_of(leaf) is not None else m[None]
            for ours, rank, row in zip(partition.expand(leaf), ranks, layers, strict=True):
                if rank:
                    module = hf_module(names, ours)
                    magnitudes[module] = row
        if names.tied and names.tied_embedding in magnitudes:
            raise peft.NoPeftForm("PEFT's DoRA of a head has magnitudes of its own, also if tied")
        for module, members in fused.parts(names.modules).items():
            there = [p for p in members if p in magnitudes]
            if there and len(there) < len(members):
                raise peft.NoPeftForm(f"{module} is one module in PEFT, and only adapted in part")
            if there:
                magnitudes[module] = np.concatenate([magnitudes.pop(p) for p in members])
        for module, m in magnitudes.items():
            files.tensors[f"{peft.PREFIX}{module}{_MAGNITUDE}"] = np.ascontiguousarray(m)
        return dataclasses.replace(files, config={**files.config, "use_dora": True})

    @classmethod
    def from_peft(
        cls,
        files: peft.AdapterFiles,
        names: peft.ModelNames,
        params: Any,
        saved: base.Method | None = None,
    ) -> tuple[LoRA, base.Trainable]:
        of = {k: v for k, v in files.tensors.items() if k.endswith(_MAGNITUDE)}
        plain = peft.AdapterFiles(
            {k: v for k, v in files.config.items() if k != "use_dora"},
            {k: v for k, v in files.tensors.items() if k not in of},
            files.where,
        )
        method, trainable = super().from_peft(plain, names, params, saved)
        found: dict[str, np.ndarray] = {}
        whole = fused.parts(names.modules)
        for key, value in of.items():
            module = key.removeprefix(peft.PREFIX).removesuffix(_MAGNITUDE)
            members = whole.get(module, [module])
            found |= dict(zip(members, np.split(value.reshape(-1), len(members)), strict=True))
        like = jax.eval_shape(lambda: method.init(jax.random.key(0), params))
        unused = set(found)
        for leaf, ranks in method.ranks(params).items():
            wanted, rows = like[leaf]["m"], []
            stacked = partition.stack_of(leaf) is not None
            for ours, rank in zip(partition.expand(leaf), ranks, strict=True):
                module = hf_module(names, ours)
                size = wanted.shape[stacked:]
                if rank and (module not in found or found[module].shape != size):
                    raise UserError(
                        f"{files.where}: {module} should have {size} magnitudes "
                        f"({module}{_MAGNITUDE})"
                    )
                rows.append(found[module] if rank else np.zeros(size, np.float32))
                unused.discard(module)
            m = jnp.asarray(np.stack(rows) if stacked else rows[0], wanted.dtype)
            trainable[leaf] = {**trainable[leaf], "m": m}
        if unused:
            raise UserError(
                f"{files.where} has magnitudes of {', '.join(sorted(unused)[:4])}, which it does "
                "not adapt otherwise in this model: merge it with PEFT (merge_and_unload, "
                "save_pretrained) and load the merged model"
            )
        return method, trainable
