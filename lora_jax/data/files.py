"""Records from files of your own."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lora_jax.data.joined import joined
from lora_jax.errors import UserError

_SPLIT = re.compile(r"(?P<name>[\w.-]*)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
Located = Iterator[tuple[str, dict[str, Any]]]  # (where, record)
Reader = Callable[[Path, str], Located]  # of a file in an encoding


@dataclasses.dataclass(frozen=True)
class Files:
    """One file of records: .jsonl, .csv, .tsv, .txt (each also with .gz) or .parquet.

    A line of a .txt file is a record {"text": line with its end}.

    Attributes:
      path: the file; "{split}" in it is replaced by the name in `split`. Where there is no such
        file but one with .gz after its name, that is read.
      fields: {our name: the file's name}; None keeps all fields under their own names.
      split: e.g. "train[:100]" or, for a path without {split}, "[:100]" or "[10%:20%]"; "a+b" joins
        two, whose records then tell theirs in a field `split`.
      pattern: regular expression for files of another kind, of one record a line; its named groups
        are the fields. TREC's: r"(?P<label>\\w+):(?P<fine>\\w+) (?P<text>.*)".
      encoding: of text files.
    """

    path: str
    fields: Mapping[str, str] | None = None
    split: str = ""
    pattern: str | None = None
    encoding: str = "utf-8"

    def open(self) -> Sequence[dict[str, Any]]:
        """All records, in the file's order."""
        if "+" in self.split:
            return joined(self)
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
            if not path.with_name(path.name + ".gz").is_file():
                raise UserError(f"No file at {path} (current folder: {Path.cwd()}).")
            path = path.with_name(path.name + ".gz")
        records = [self._mapped(record, where) for where, record in self._read(path)]
        start, stop = (_offset(match[key], len(records)) for key in ("start", "stop"))
        return records[start:stop]

    def _read(self, path: Path) -> Located:
        if self.pattern is not None:
            return _matched(path, self.encoding, self.pattern)
        suffixes = [s for s in path.suffixes if s != ".gz"]
        read = _READERS.get(suffixes[-1] if suffixes else "")
        if read is None:
            raise UserError(
                f"{path}: unknown kind of file. Known: {', '.join(_READERS)} (and .gz); give a"
                " pattern for lines of another form."
            )
        return read(path, self.encoding)

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


def _text(path: Path, encoding: str) -> IO[str]:
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise UserError(f"{path}: unknown encoding {encoding!r}; write utf-8 or latin-1") from None
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding=encoding, newline="")  # type: ignore[no-any-return]


def _jsonl(path: Path, encoding: str) -> Located:
    with _text(path, encoding) as lines:
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


def _separated(delimiter: str) -> Reader:
    def read(path: Path, encoding: str) -> Located:
        with _text(path, encoding) as lines:
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
    except (csv.Error, UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        place = f", line {line()}" if line else ""
        raise UserError(f"{path}{place}: cannot be read ({error}).") from error


def _lines(path: Path, encoding: str) -> Located:
    with _text(path, encoding) as lines:
        for number, line in _guarded(path, enumerate(lines, 1)):
            yield f"{path}, line {number}", {"text": line}


def _matched(path: Path, encoding: str, pattern: str) -> Located:
    try:
        form = re.compile(pattern)
    except re.error as error:
        raise UserError(f"pattern={pattern!r} is not a regular expression: {error}.") from error
    if not form.groupindex:
        raise UserError(f"pattern={pattern!r} names no group: write e.g. '(?P<text>.*)'.")
    for where, record in _lines(path, encoding):
        line = record["text"].rstrip("\r\n")
        match = form.fullmatch(line)
        if match is not None:
            yield where, match.groupdict()
        elif line:
            raise UserError(f"{where}: {line!r} is not of the pattern {pattern!r}.")


def _parquet(path: Path, encoding: str) -> Located:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}).") from error
    for index, record in enumerate(table.to_pylist()):
        yield f"{path}, row {index}", record


_READERS: dict[str, Reader] = {
    ".jsonl": _jsonl,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".txt": _lines,
    ".parquet": _parquet,
}
