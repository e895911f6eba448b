"""Models from pretrained weights, and back into a folder that transformers loads."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax import partition
from lora_jax.errors import UserError, nearest
from lora_jax.models import FAMILIES, Family, TensorSpec, family_for
from lora_jax.pretrained import hub, view
from lora_jax.pretrained.assemble import assemble
from lora_jax.pretrained.bitsandbytes import Dequantized
from lora_jax.pretrained.folder import WHOLE, Folder
from lora_jax.pretrained.gguf_file import GGUFFile, read_header
from lora_jax.pretrained.source import TensorSource, files_sha256
from lora_jax.pretrained.staging import staged, write_sorted_json, write_tensors

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip

_HEAD = "lm_head.weight"
_ROWS = 4096  # of a head that are compared with the embedding's at one time


def open_source(source: str | os.PathLike[str]) -> TensorSource:
    """Opens an alias, folder, .gguf or hub name; reads headers only."""
    path = hub.resolve(source)
    if not path.is_dir():
        return GGUFFile(path)
    folder = Folder(path)
    family = FAMILIES.get(folder.config.get("model_type", ""))
    return Dequantized(folder, inputs_first=family is not None and family.inputs_first)


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    dtype: Any = "float32",
    compute_dtype: Any = None,
    mesh: Mesh | None = None,
    shardings: Any = None,
    head_seed: int = 0,
    new_head: bool = False,
    **model_options: Any,
) -> tuple[Any, dict[str, Any]]:
    """(model, params) from an alias, a Hugging Face folder, a .gguf file, or a hub name.

    Args:
      source: what to load; see `lora_jax.pretrained.hub.resolve`. Matrices that bitsandbytes has
        quantised to NF4 come out dense: `quantize(params, "nf4")` makes them so again.
      dtype: of the parameters, whatever the file's is.
      compute_dtype: of the computations; None: the same as `dtype`.
      mesh, shardings: where each leaf goes; every tensor is read straight into its shards. See
        `lora_jax.pretrained.assemble.sharding_of` for the forms.
      head_seed: of a scoring head that the file lacks; it is drawn, and a log line says so.
      new_head: draw the scoring head also where the file holds one.
      **model_options: fields of the family's config to override. `head` ("lm", "classification",
        "regression", "pooling", None: see `models.text_config.TextConfig`) is by default what
        config.json's architecture says; `num_labels`, `remat`, `unroll`, ….

    Returns:
      The Linen module, and its parameters: stacked leaves `layers[0:L]/…` are [L, …].

    Raises:
      UserError: nothing there, an unknown family, or tensors that do not fit the config.
    """
    recorded = hub.recorded(source)
    opened = open_source(recorded)
    stored = _float_dtype(dtype)
    computed = stored if compute_dtype is None else _float_dtype(compute_dtype)
    # Every family's config has a field `source`, so that an adapter can tell its base.
    options = {"dtype": computed.name, "source": recorded, **model_options}
    model = build_model(opened.config, options)
    family = family_of(model)
    specs = family.tensors(model.config)
    prepared = view.under_our_names(opened, family, model.config)
    _check_tied(prepared, model.config, specs)
    prepared = view.with_new_head(prepared, specs, seed=head_seed, replace=new_head)
    params = assemble(
        prepared,
        specs,
        dtype=stored,
        mesh=mesh,
        shardings=shardings,
        ignored=family.ignored(model.config),
    )
    return model, params


def _check_tied(source: TensorSource, config: Any, specs: Sequence[TensorSpec]) -> None:
    """UserError where a head that should be the embedding is stored, and is another matrix."""
    stored = source.shapes
    if config.head != "lm" or not config.tied or _HEAD not in stored:
        return
    embedding = next(s.name for s in specs if s.path == "embed/embedding")
    same, size = stored[_HEAD] == stored.get(embedding), stored[_HEAD][0]
    for start in range(0, size if same else 0, _ROWS):
        rows = (slice(start, min(start + _ROWS, size)),)
        same = same and np.array_equal(source.read(_HEAD, rows), source.read(embedding, rows))
    if not same:
        raise UserError(
            f"{source.describe()}: config.json says that {_HEAD} is the embedding "
            "(tie_word_embeddings), but the file holds another matrix: load it with tied=False, or "
            "mend the config"
        )


def draw(
    hf_config: Mapping[str, Any],
    seed: int,
    *,
    dtype: Any = "float32",
    compute_dtype: Any = None,
    **model_options: Any,
) -> tuple[Any, dict[str, Any]]:
    """(model, params) of the shape that a config.json describes, with weights drawn at random.

    Args:
      seed: of the weights, which are distributed as the family's module says.
      dtype, compute_dtype, **model_options: as of `load_pretrained`.
    """
    stored = _float_dtype(dtype)
    computed = stored if compute_dtype is None else _float_dtype(compute_dtype)
    model = build_model(hf_config, {"dtype": computed.name, **model_options})
    key = jax.random.key(seed, impl="threefry2x32")  # whatever JAX's default is
    params = jax.jit(model.init)(key, family_of(model).example(model.config))["params"]
    return model, jax.tree.map(lambda x: x.astype(stored), params)


def build_model(hf_config: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Any:
    """The model that a config.json describes, with fields of our config overridden."""
    if "model_type" not in hf_config:
        raise UserError(f"config.json has no model_type; supported: {', '.join(sorted(FAMILIES))}")
    family = family_for(hf_config["model_type"])
    config = family.config_from_hf(dict(hf_config))
    names = [f.name for f in dataclasses.fields(config)]
    for name in options or {}:
        if name not in names:
            raise UserError(f"{family.name} models have no option {name!r}; {nearest(name, names)}")
    changes = dict(options or {})
    if changes.get("head", config.head) != config.head:
        changes.setdefault("num_labels", None)  # the file's belongs to the file's head
    return family.module(dataclasses.replace(config, **changes))


def family_of(model: Any) -> Family:
    """The family whose module `model` is."""
    for family in FAMILIES.values():
        if type(model) is family.module:
            return family
    raise UserError(
        f"{type(model).__name__} is no family of lora_jax, so its Hugging Face names are unknown; "
        f"known: {', '.join(sorted({f.name for f in FAMILIES.values()}))}"
    )


def _float_dtype(dtype: Any) -> np.dtype:
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or not jnp.issubdtype(resolved, jnp.floating):
        raise UserError(f"dtype {dtype!r} is not a floating dtype such as 'float32' or 'bfloat16'")
    return resolved


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The `lora_jax.data.tokenizer.Tokenizer` that belongs to a source of weights."""
    from lora_jax.data.tokenizer import Tokenizer

    path = hub.resolve(source)
    if path.is_dir():
        return Tokenizer.from_folder(path)
    return Tokenizer.from_gguf(path, reader=read_header(path))


def base_sha256(source: str | os.PathLike[str]) -> str:
    """SHA-256 of the file(s) that hold a source's tensors; see `source.files_sha256`."""
    return files_sha256(open_source(source).files)


def per_layer(flat: Mapping[str, Any], spec: TensorSpec) -> Iterator[tuple[str, Any]]:
    """(Hugging Face name, our array) of each layer of `spec`, from flat params in any segments."""
    found = dict.fromkeys(hf for _, hf in spec.expand())
    names = dict(spec.expand())
    for path, leaf in flat.items():
        expanded = partition.expand(path)
        if expanded[0] not in names:
            continue
        stacked = partition.stack_of(path) is not None
        # To the host once for a whole stack, not once a layer.
        array = np.asarray(jax.device_get(leaf))
        for at, ours in enumerate(expanded):
            found[names[ours]] = array[at] if stacked else array
    lacking = [hf for hf, array in found.items() if array is None]
    if lacking:
        raise UserError(f"the parameters lack what becomes {', '.join(lacking[:4])}")
    yield from found.items()


def hf_tensors(model: Any, params: Any) -> dict[str, np.ndarray]:
    """The parameters on the host under Hugging Face's names, in its layout."""
    flat = partition.flatten(params)
    odd = [
        p
        for p, x in flat.items()
        if getattr(type(x), "is_weight", False) or isinstance(x, partition.Hole)
    ]
    if odd:
        raise UserError(
            f"{odd[0]!r} is not a plain array ({type(flat[odd[0]]).__name__}); merge first: "
            "params = method.merge(params, trainable)"
        )
    specs = family_of(model).tensors(model.config)
    known = {ours for spec in specs for ours, _ in spec.expand()}
    extra = [p for p in flat if not set(partition.expand(p)) <= known]
    if extra:
        raise UserError(f"the model has no parameters {', '.join(extra[:4])}")
    tensors: dict[str, np.ndarray] = {}
    for spec in specs:
        for name, array in per_layer(flat, spec):
            if tuple(array.shape) != spec.our_shape:
                raise UserError(
                    f"what becomes {name} is {list(array.shape)}, but the model's config says "
                    f"{list(spec.our_shape)}"
                )
            tensor = array.T if spec.op == "transpose" else array
            if spec.part is not None and spec.part[0]:  # parts come in order: append
                axis = 0 if spec.op == "transpose" else -1
                tensor = np.concatenate([tensors[name], tensor], axis=axis)
            tensors[name] = tensor
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def save_pretrained(
    path: str | os.PathLike[str],
    model: Any,
    params: Any,
    tokenizer_source: str | os.PathLike[str] | None = None,
) -> None:
    """Writes config.json and model.safetensors, a folder that transformers loads.

    `tokenizer_source` names where to copy the tokenizer's files from. Existing files of these
    names are replaced one by one and only once their successors are whole; others are left.
    """
    tensors = hf_tensors(model, params)
    config = dict(family_of(model).config_to_hf(model.config))
    config["torch_dtype"] = str(next(iter(tensors.values())).dtype)
    with staged(Path(path)) as stage:
        write_tensors(stage / WHOLE, tensors)
        write_sorted_json(stage / "config.json", config)
        if tokenizer_source is not None:
            _copy_tokenizer(hub.resolve(tokenizer_source), stage)


def _copy_tokenizer(origin: Path, stage: Path) -> None:
    if origin.is_dir():
        for name in TOKENIZER_FILES:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, stage / name)
        return
    tokenizer = load_tokenizer(origin)
    tokenizer.backend.save(str(stage / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    write_sorted_json(stage / "tokenizer_config.json", settings)
