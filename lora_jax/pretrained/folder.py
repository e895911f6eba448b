"""Reads a Hugging Face folder: config.json beside model.safetensors, whole or in shards."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.errors import UserError
from lora_jax.pretrained.source import Index

WHOLE = "model.safetensors"
SHARDED = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError where it is missing or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def tensor_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, sorted by name.

    Raises UserError where there are none. Pickled weights (.bin, .pt) are never opened:
    unpickling a file runs whatever code its author put in it.
    """
    if (path / WHOLE).is_file():
        return [path / WHOLE]
    if (path / SHARDED).is_file():
        names = set(read_json(path / SHARDED).get("weight_map", {}).values())
        files = [path / name for name in sorted(names)]
        outside = [
            f.name for f in files if f.resolve().parent != path.resolve() and not f.is_symlink()
        ]
        missing = [f.name for f in files if not f.is_file()]
        if not files or outside or missing:
            raise UserError(
                f"{path / SHARDED} names files that are not in the folder: "
                f"{', '.join(missing or outside) or 'none at all'}; download the model again"
            )
        return files
    pickled = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise UserError(
            f"{path} holds only pickled weights ({', '.join(pickled[:3])}), which are not read "
            "because a pickle can run code; convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(path).save_pretrained(path)"
        )
    raise UserError(f"{path} has no {WHOLE} and no {SHARDED}; is it a model's folder?")


def _pooling(path: Path) -> dict[str, Any]:
    """How a folder of sentence-transformers pools, from its modules.json; {} for other folders."""
    if not (path / "modules.json").is_file():
        return {}
    try:
        modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        kinds = {m["type"].rsplit(".", 1)[-1]: m["path"] for m in modules}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'modules.json'} is not sentence-transformers': {error}") from None
    known = ("Transformer", "Pooling", "Normalize")
    others = [kind for kind in kinds if kind not in known]
    found: dict[str, Any] = {"normalize": "Normalize" in kinds, "others": others}
    if "Pooling" in kinds:
        modes = read_json(path / kinds["Pooling"] / "config.json")
        if (mode := modes.get("pooling_mode")) is not None:  # from version 6 on
            on = [mode] if isinstance(mode, str) else list(mode)
        else:
            on = [k.removeprefix("pooling_mode_") for k, v in modes.items() if v is True]
        named = {"mean_tokens": "mean", "cls_token": "cls"}
        on = [named.get(mode, mode) for mode in on if mode != "include_prompt"]
        found["pooling"] = on[0] if len(on) == 1 else "+".join(on)
    return {"sentence_transformers": found}


class Folder:
    """The tensors of a Hugging Face folder. Opening reads headers only."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path} is not a folder")
        self.config: Mapping[str, Any] = read_json(self.path / "config.json") | _pooling(self.path)
        self.files: Sequence[Path] = tensor_files(self.path)
        self._open = contextlib.ExitStack()
        self._holder: dict[str, Any] = {}
        for file in self.files:
            try:
                handle = self._open.enter_context(safe_open(file, framework="numpy"))
            except SafetensorError as error:
                raise UserError(f"{file} is not a whole safetensors file: {error}") from None
            self._holder.update(dict.fromkeys(handle.keys(), handle))

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {n: tuple(h.get_slice(n).get_shape()) for n, h in self._holder.items()}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        handle = self._holder[name]
        if not index or not self.shapes[name]:
            return handle.get_tensor(name)
        return handle.get_slice(name)[index]

    def describe(self) -> str:
        return str(self.path)
