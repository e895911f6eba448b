"""Reads a .gguf file of a Llama model (llama.cpp's format) as Hugging Face would hold it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package knows how
to undo the quantisation. The header is parsed here because that package builds one array for
every string of the vocabulary, which takes seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lora_jax.errors import UserError
from lora_jax.pretrained.source import Index

_STRING, _ARRAY = 8, 9
_JOINED_ROWS = 256
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}

# llama.cpp's names of a layer's tensors, and Hugging Face's.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. `shape` is outermost axis first (the file says it the other way)."""

    shape: tuple[int, ...]
    kind: int  # GGMLQuantizationType
    offset: int  # bytes from the start of the file


@dataclasses.dataclass(frozen=True)
class Field:
    """A metadata value, with the one method of `gguf.ReaderField` that readers use."""

    value: Any

    def contents(self) -> Any:
        return self.value


@dataclasses.dataclass(frozen=True)
class Header:
    """A GGUF file's metadata and the places of its tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def get_field(self, key: str) -> Field | None:
        """A metadata value the way `gguf.GGUFReader` hands it out; None where there is none."""
        return Field(self.metadata[key]) if key in self.metadata else None


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, buffer: Any):
        self.buffer, self.at = buffer, 0

    def take(self, format: str) -> Any:
        (value,) = struct.unpack_from("<" + format, self.buffer, self.at)
        self.at += struct.calcsize("<" + format)
        return value

    def string(self) -> str:
        length = self.take("Q")
        if self.at + length > len(self.buffer):
            raise struct.error("a string runs past the end")
        text = self.buffer[self.at : self.at + length].decode("utf-8", errors="replace")
        self.at += length
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, length = self.take("I"), self.take("Q")
            if inner in _SCALARS:
                format = f"<{length}{_SCALARS[inner]}"
                values = struct.unpack_from(format, self.buffer, self.at)
                self.at += struct.calcsize(format)
                return list(values)
            return [self.value(inner) for _ in range(length)]
        if kind not in _SCALARS:
            raise struct.error(f"unknown value type {kind}")
        return self.take(_SCALARS[kind])


@functools.lru_cache(maxsize=2)
def _read_header(path: str, mtime_ns: int, size: int) -> Header:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        cursor = _Cursor(buffer)
        if bytes(buffer[:4]) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file (it does not start with 'GGUF')")
        cursor.at = 4
        version = cursor.take("I")
        if version not in (2, 3):
            raise UserError(
                f"{path}: GGUF version {version} (or a big-endian file) is not read, only "
                "little-endian versions 2 and 3"
            )
        tensor_count, value_count = cursor.take("Q"), cursor.take("Q")
        metadata = {}
        for _ in range(value_count):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.take("I"))
        found = {}
        for _ in range(tensor_count):
            name, rank = cursor.string(), cursor.take("I")
            shape = tuple(cursor.take("Q") for _ in range(rank))[::-1]
            found[name] = (shape, cursor.take("I"), cursor.take("Q"))
        alignment = metadata.get("general.alignment", 32)
        start = -(-cursor.at // alignment) * alignment
    return Header(metadata, {n: StoredTensor(s, k, start + o) for n, (s, k, o) in found.items()})


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a .gguf file; vocabulary arrays come as plain lists. UserError if damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    stat = path.stat()
    try:
        return _read_header(str(path.resolve()), stat.st_mtime_ns, stat.st_size)
    except (struct.error, ValueError, MemoryError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: {error}; download it again") from None


def _gguf_package() -> ModuleType:
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(
            "reading a .gguf file needs the package gguf: pip install 'lora-jax[g2p]'"
        ) from None
    return gguf


def config_from_metadata(metadata: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The config.json that Hugging Face would have for these llama.* values."""
    prefix = "llama."

    def need(key: str) -> Any:
        if prefix + key not in metadata:
            raise UserError(f"the .gguf file lacks the metadata {prefix + key}")
        return metadata[prefix + key]

    heads = need("attention.head_count")
    width = need("embedding_length")
    vocabulary = metadata.get(prefix + "vocab_size") or len(
        metadata.get("tokenizer.ggml.tokens", ())
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(prefix + "attention.head_count_kv", heads),
        "head_dim": metadata.get(prefix + "attention.key_length", width // heads),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": round(need("attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": metadata.get(prefix + "rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    turned = metadata.get(prefix + "rope.dimension_count", config["head_dim"])
    if turned != config["head_dim"]:
        raise UserError(
            f"the .gguf file turns {turned} of a head's {config['head_dim']} dimensions by RoPE; "
            "only all of them are read"
        )
    # Without a type a factor is of the linear kind; older files have one key for both.
    old = metadata.get(prefix + "rope.scale_linear", 0.0)
    factor = metadata.get(prefix + "rope.scaling.factor", old)
    scaling = metadata.get(prefix + "rope.scaling.type", "linear" if factor else "none")
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor or 1.0}
    elif scaling != "none":
        raise UserError(
            f"the .gguf file uses {scaling!r} RoPE scaling, which is not read; "
            "load the model from its Hugging Face folder instead"
        )
    return config


class GGUFFile:
    """The tensors of a Llama .gguf under their Hugging Face names, dequantised to float32.

    llama.cpp stores the rows of q and k so that the pairs its rotary embedding turns are
    neighbours; here they come back in Hugging Face's order (first halves, then second halves).
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.header = read_header(self.path)
        architecture = self.header.metadata.get("general.architecture")
        if architecture != "llama":
            raise UserError(
                f"{self.path} is a {architecture!r} model; of .gguf files only 'llama' models "
                "are read. Load this one from its Hugging Face folder instead."
            )
        if "rope_freqs.weight" in self.header.tensors:
            raise UserError(
                f"{self.path} holds RoPE factors (Llama 3.1 and later) whose settings a .gguf "
                "does not keep; load the model from its Hugging Face folder instead"
            )
        self.files: Sequence[Path] = [self.path]
        self._names = {_hf_name(name): name for name in self.header.tensors}
        tied = "output.weight" not in self.header.tensors
        self.config: Mapping[str, Any] = config_from_metadata(self.header.metadata, tied)
        # Mapped, not read: only the pages of the rows that are asked for are touched.
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {hf: self.header.tensors[n].shape for hf, n in self._names.items()}

    @functools.cached_property
    def quantisation(self) -> str:
        """The name of the type most of the weights are stored in, such as Q4_1."""
        sizes: dict[int, int] = {}
        for tensor in self.header.tensors.values():
            sizes[tensor.kind] = sizes.get(tensor.kind, 0) + int(np.prod(tensor.shape))
        return _gguf_package().GGMLQuantizationType(max(sizes, key=sizes.__getitem__)).name

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        heads = self._permuted_heads(name)
        rows = index[0] if index and not heads else slice(None)
        values = self._dequantised(self._names[name], rows)
        if heads:
            out, *rest = values.shape
            values = values.reshape(heads, out // heads // 2, 2, *rest).swapaxes(1, 2)
            values = values.reshape(out, *rest)[index[0] if index else slice(None)]
        return values[(slice(None), *index[1:])] if len(index) > 1 else values

    def _permuted_heads(self, name: str) -> int:
        if ".q_proj." in name:
            return self.config["num_attention_heads"]
        return self.config["num_key_value_heads"] if ".k_proj." in name else 0

    def _dequantised(self, stored_name: str, rows: slice) -> np.ndarray:
        gguf = _gguf_package()
        tensor = self.header.tensors[stored_name]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = tensor.shape[-1] // block * block_bytes
        count = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        raw = self._bytes[tensor.offset : tensor.offset + count * row_bytes]
        if raw.size != count * row_bytes:
            raise UserError(f"{self.path} ends inside {stored_name}; download it again")
        raw = np.asarray(raw).reshape(count, row_bytes)
        if len(tensor.shape) == 1:
            return gguf.dequantize(raw[0], kind)[rows]
        raw = raw[rows]
        # The package works on 16 rows at a time; fewer and wider rows make fewer, larger steps.
        # Rows hold whole blocks, so joining them changes nothing but the speed.
        joined = math.gcd(len(raw), _JOINED_ROWS)
        if joined > 1:
            raw = np.ascontiguousarray(raw).reshape(len(raw) // joined, -1)
        return gguf.dequantize(raw, kind).reshape(-1, tensor.shape[-1])

    def describe(self) -> str:
        return str(self.path)


def _hf_name(name: str) -> str:
    """Hugging Face's name; one that is not known is kept, and reported by the loader."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, module, leaf = match.groups()
        return f"model.layers.{layer}.{_LAYER.get(module, module)}.{leaf}"
    return _OUTER.get(name, name)
