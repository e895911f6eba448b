"""The config.json of a model, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError
from lora_jax.pretrained import hub
from lora_jax.pretrained.folder import read_json
from lora_jax.pretrained.load import open_source


def hf_config(source: str, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`shape` if it is given, else the config.json of `source`, which may be all of it that is had.

    A folder need hold nothing but config.json; of a model on the hub only that file is fetched.
    """
    if shape is not None:
        return dict(shape)
    path = Path(source).expanduser()
    if path.is_dir():
        return read_json(path / "config.json")
    if hub.is_name(source) and not path.exists():
        return _from_hub(source)
    return dict(open_source(source).config)


def _from_hub(name: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return read_json(Path(hf_hub_download(name, "config.json")))
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"cannot get config.json of {name!r} from the Hugging Face hub "
            f"({str(error).splitlines()[0]}); give a folder that holds it, or its content as "
            "model.shape"
        ) from None
