"""Sources: where records come from. `open()` gives a sequence of dicts with random access."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import gzip
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from lora_jax.errors import UserError

# Data sets that TFDS knows only once a module is imported (by the name before any "/").
_MODULES = {
    "cmudict_g2p": "lora_jax.data.g2p",
    "glue": "tensorflow_datasets.text.glue",
    "super_glue": "tensorflow_datasets.text.super_glue",
}
# Records read at once when all are read: four times as fast as one by one.
_BLOCK = 1024
_SPLIT = re.compile(r"(?P<name>[\w.-]*)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclasses.dataclass(frozen=True)
class TFDS:
    """A TensorFlow Datasets data set, read as random access without TensorFlow.

    Attributes:
      name: e.g. "glue/cola".
      split: e.g. "train", "train[:100]", "train[10%:20%]".
      data_dir: folder of prepared data sets; None: TFDS's own. A missing one is prepared there
        (under a lock, so that several processes may start at once).
    """

    name: str
    split: str = "train"
    data_dir: str | None = None

    def open(self) -> Sequence[dict[str, Any]]:
        """Records; bytes come as str, numpy scalars as Python numbers."""
        builder = self._prepared()
        if builder.info.file_format.value != "array_record":
            raise UserError(
                f"{self.name} in {builder.data_path} is stored as {builder.info.file_format.value};"
                " random access needs array_record. Prepare it anew in another data_dir."
            )
        name = self.split.split("[")[0]
        if name not in ("all", *builder.info.splits) and "+" not in self.split:
            raise UserError(
                f"{self.name} has no split {name!r}; it has {', '.join(builder.info.splits)}."
            )
        try:
            return _Decoded(builder.as_data_source(split=self.split))
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
                builder.download_and_prepare(file_format="array_record")
        return builder


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


@dataclasses.dataclass(frozen=True)
class Files:
    """One file of records: .jsonl, .csv, .tsv (each also with .gz) or .parquet.

    Attributes:
      path: the file; "{split}" in it is replaced by the name in `split`.
      fields: {our name: the file's name}; None keeps all fields under their own names.
      split: e.g. "train[:100]" or, for a path without {split}, "[:100]" or "[10%:20%]".
    """

    path: str
    fields: Mapping[str, str] | None = None
    split: str = ""

    def open(self) -> Sequence[dict[str, Any]]:
        """All records, in the file's order."""
        match = _SPLIT.fullmatch(self.split)
        if match is None:
            raise UserError(
                f"Cannot read split {self.split!r}; write e.g. 'train', '[:100]', '[5%:]'."
            )
        if match["name"] and "{split}" not in self.path:
            raise UserError(
                f"split={self.split!r} names a split, but the path {self.path} has no '{{split}}':"
                " write only the slice, e.g. split='[:100]'."
            )
        path = Path(self.path.replace("{split}", match["name"])).expanduser()
        if not path.is_file():
            raise UserError(f"No file at {path} (current folder: {Path.cwd()}).")
        suffixes = [s for s in path.suffixes if s != ".gz"]
        read = _READERS.get(suffixes[-1] if suffixes else "")
        if read is None:
            raise UserError(
                f"{path}: unknown kind of file. Known: {', '.join(_READERS)} (and .gz)."
            )
        records = [self._mapped(record, where) for where, record in read(path)]
        start, stop = (_offset(match[key], len(records)) for key in ("start", "stop"))
        return records[start:stop]

    def _mapped(self, record: dict[str, Any], where: str) -> dict[str, Any]:
        if self.fields is None:
            return record
        missing = [theirs for theirs in self.fields.values() if theirs not in record]
        if missing:
            raise UserError(f"{where}: no field {missing[0]!r}. Its fields: {', '.join(record)}.")
        return {ours: record[theirs] for ours, theirs in self.fields.items()}


def _offset(text: str | None, total: int) -> int | None:
    """An end of a slice: a count, or a share of `total` written with %."""
    if text is None:
        return None
    return round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)


def _text(path: Path) -> IO[str]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8", newline="")  # type: ignore[no-any-return]


Located = Iterator[tuple[str, dict[str, Any]]]  # (where, record)


def _jsonl(path: Path) -> Located:
    with _text(path) as lines:
        for number, line in _guarded(path, enumerate(lines, 1)):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON ({error}).") from error
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}.")
            yield where, record


def _separated(delimiter: str) -> Callable[[Path], Located]:
    def read(path: Path) -> Located:
        with _text(path) as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            names: list[str] = []
            for row in _guarded(path, reader, lambda: reader.line_num):
                where = f"{path}, line {reader.line_num}"
                if not names:
                    names = [name.removeprefix("\ufeff") for name in row]
                elif row and len(row) != len(names):
                    raise UserError(
                        f"{where}: {len(row)} values for {len(names)} columns ({', '.join(names)})."
                    )
                elif row:
                    yield where, dict(zip(names, row, strict=True))

    return read


def _guarded(path: Path, items: Any, line: Callable[[], int] | None = None) -> Iterator[Any]:
    """`items`, with a reader's errors told as errors of the file."""
    try:
        yield from items
    except (csv.Error, UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        place = f", line {line()}" if line else ""
        raise UserError(f"{path}{place}: cannot be read ({error}).") from error


def _parquet(path: Path) -> Located:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}).") from error
    for index, record in enumerate(table.to_pylist()):
        yield f"{path}, row {index}", record


_READERS: dict[str, Callable[[Path], Located]] = {
    ".jsonl": _jsonl,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
