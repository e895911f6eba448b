"""Sources: where records come from. `open()` gives a sequence of dicts with random access."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.data.files import Files
from lora_jax.data.joined import joined
from lora_jax.errors import UserError

__all__ = ["TFDS", "Files"]

# Data sets that TFDS knows only once a module is imported (by the name before any "/").
_MODULES = {
    "cmudict_g2p": "lora_jax.data.g2p",
    "glue": "tensorflow_datasets.text.glue",
    "super_glue": "tensorflow_datasets.text.super_glue",
}
# Data sets that TFDS itself can only prepare with TensorFlow: our module and builder of the same.
_PREPARERS = {"mnist": ("lora_jax.data.mnist", "Mnist")}
# Records read at once when all are read: four times as fast as one by one.
_BLOCK = 1024
# In every prepared data set.
_INFO = "dataset_info.json"


@dataclasses.dataclass(frozen=True)
class TFDS:
    """A TensorFlow Datasets data set, read as random access without TensorFlow.

    Attributes:
      name: e.g. "glue/cola".
      split: e.g. "train", "train[:100]", "train[10%:20%]"; "a+b" joins two, whose records then
        tell theirs in a field `split`.
      data_dir: folder of prepared data sets; None: TFDS's own. A missing one is prepared there
        (under a lock, so that several processes may start at once).
    """

    name: str
    split: str = "train"
    data_dir: str | None = None

    def open(self) -> Sequence[dict[str, Any]]:
        """Records; bytes come as str, numpy scalars as Python numbers."""
        if "+" in self.split:
            return joined(self)
        builder = self._prepared()
        if builder.info.file_format.value != "array_record":
            raise UserError(
                f"{self.name} in {builder.data_path} is stored as {builder.info.file_format.value};"
                " random access needs array_record. Prepare it anew in another data_dir."
            )
        name = self.split.split("[")[0]
        if name not in ("all", *builder.info.splits):
            raise UserError(
                f"{self.name} has no split {name!r}; it has {', '.join(builder.info.splits)}."
            )
        try:
            return _opened(builder, self.split)
        except ValueError as error:
            raise UserError(f"Cannot read split {self.split!r} of {self.name}: {error}") from error

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        module = _MODULES.get(self.name.split("/")[0].split(":")[0])
        if module is not None:
            importlib.import_module(module)
        try:
            return tfds.builder(self.name, data_dir=self.data_dir)
        except tfds.core.DatasetNotFoundError as error:
            raise UserError(
                f"TFDS knows no data set {self.name!r}, and none is prepared in data_dir="
                f"{self.data_dir!r}. Names are those of tfds.list_builders()."
            ) from error
        except ValueError as error:
            configs = tfds.builder_cls(self.name.split("/")[0]).builder_configs
            raise UserError(
                f"Cannot open TFDS data set {self.name!r}: {str(error).splitlines()[0]}"
                f" Its configurations: {', '.join(configs) or '(none)'}."
            ) from error

    def _prepared(self) -> Any:
        builder = self._builder()
        if builder.is_prepared():
            return builder
        root = Path(os.fspath(builder.data_dir)).parents[len(self.name.split("/"))]
        root.mkdir(parents=True, exist_ok=True)
        with open(root / f".{re.sub(r'[^A-Za-z0-9]+', '_', self.name)}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            builder = self._builder()  # another process may have prepared it meanwhile
            if not builder.is_prepared():
                self._prepare(self._preparer(builder))
                builder = self._builder()  # what is prepared is TFDS's to read
        return builder

    def _preparer(self, builder: Any) -> Any:
        if self.name not in _PREPARERS:
            return builder
        module, name = _PREPARERS[self.name]
        return getattr(importlib.import_module(module), name)(data_dir=self.data_dir)

    def _prepare(self, builder: Any) -> None:
        import tensorflow_datasets as tfds

        ours = type(builder).__module__.startswith("lora_jax.")
        if ours:  # nothing is downloaded, so there is nothing to watch
            tfds.disable_progress_bar()
        try:
            builder.download_and_prepare(file_format="array_record")
        except (UserError, OSError):
            raise
        except Exception as error:
            if ours:
                raise
            # TFDS's errors of download and checksum have no class in common, nor a public one.
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"Cannot download and prepare {self.name}: {why}") from error
        finally:
            if ours:
                tfds.enable_progress_bar()


class _Decoded(Sequence[dict[str, Any]]):
    """A TFDS data source with plain Python values."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._read(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return _plain(self._source[int(index) % len(self)])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _BLOCK):
            yield from self._read(range(start, min(start + _BLOCK, len(self))))

    def _read(self, places: range) -> list[dict[str, Any]]:
        return [_plain(record) for record in self._source.__getitems__(list(places))]


class _Images(_Decoded):
    """The same of images: to decode them all takes longer than a short run on them, so what was
    read whole is held for the next run in this process."""

    def __init__(self, source: Any, place: str, split: str) -> None:
        super().__init__(source)
        info = Path(place) / _INFO  # no file where the data lie in a bucket
        self._where = place, split, info.stat().st_mtime_ns if info.exists() else 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(_held(*self._where))


@functools.lru_cache(maxsize=2)  # training and test data
def _held(place: str, split: str, written: int) -> list[dict[str, Any]]:
    """All records of a prepared data set; `written` tells it from a later one in the same place."""
    import tensorflow_datasets as tfds

    return list(_Decoded(tfds.builder_from_directory(place).as_data_source(split=split)))


def _opened(builder: Any, split: str) -> Sequence[dict[str, Any]]:
    import tensorflow_datasets as tfds

    source, features = builder.as_data_source(split=split), builder.info.features
    own = features.values() if isinstance(features, tfds.features.FeaturesDict) else ()
    if any(isinstance(feature, tfds.features.Image) for feature in own):
        return _Images(source, str(builder.data_path), split)
    return _Decoded(source)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value  # encoded images and the like
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(item) for item in value]
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
