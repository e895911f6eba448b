"""Sources: files of each kind, TFDS, slices, errors."""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_jax.data.sources import TFDS, Files
from lora_jax.errors import UserError

ROWS = [{"mr": f"name[{i}]", "ref": f'It is, "{i}"\né'} for i in range(10)]


def write(folder: Path, kind: str) -> str:
    path = folder / f"d.{kind}"
    lines = [json.dumps(r) for r in ROWS]
    separator = "\t" if ".tsv" in f".{kind}" else ","
    table = [separator.join(("mr", "ref"))]
    table += [separator.join((r["mr"], '"' + r["ref"].replace('"', '""') + '"')) for r in ROWS]
    text = "\n".join(lines if "jsonl" in kind else table)
    if kind == "parquet":
        import pandas

        pandas.DataFrame(ROWS).to_parquet(path)
    elif kind.endswith("gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    assert Files(path).open() == ROWS
    renamed = Files(path, {"text": "ref"}).open()
    assert renamed == [{"text": r["ref"]} for r in ROWS]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("[:3]", ROWS[:3]), ("[-2:]", ROWS[-2:]), ("[10%:50%]", ROWS[1:5]), ("", ROWS)],
)
def test_slices_of_files(tmp_path: Path, split: str, expected: list[Any]) -> None:
    assert Files(write(tmp_path, "jsonl"), split=split).open() == expected


def test_split_named_in_the_path(tmp_path: Path) -> None:
    Path(write(tmp_path, "jsonl")).rename(tmp_path / "train.jsonl")
    pattern = str(tmp_path / "{split}.jsonl")
    assert Files(pattern, split="train[:2]").open() == ROWS[:2]
    with pytest.raises(UserError, match=r"test\.jsonl"):
        Files(pattern, split="test").open()
    with pytest.raises(UserError, match=r"\{split\}"):
        Files(str(tmp_path / "train.jsonl"), split="train[:2]").open()


def test_file_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No file at"):
        Files(str(tmp_path / "no.csv")).open()
    with pytest.raises(UserError, match="no field 'text'.*mr, ref"):
        Files(write(tmp_path, "csv"), {"text": "text"}).open()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 3"):
        Files(str(bad)).open()
    bad.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(UserError, match="line 2: expected a JSON object"):
        Files(str(bad)).open()
    table = tmp_path / "bad.csv"
    table.write_text("a,b\n1,2\n3\n")
    with pytest.raises(UserError, match="line 3: 1 values for 2 columns"):
        Files(str(table)).open()
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-12])
    with pytest.raises(UserError, match="cannot be read"):
        Files(str(cut)).open()
    with pytest.raises(UserError, match=r"\.parquet"):
        (tmp_path / "x.xml").write_text("x")
        Files(str(tmp_path / "x.xml")).open()


def test_original_e2e(shared: Path) -> None:
    path = str(shared / "data" / "e2e_nlg" / "devset.csv")
    assert len(Files(path).open()) == 4672  # as its SOURCE.md says


def test_tfds_without_tensorflow(shared: Path) -> None:
    data = TFDS("glue/cola", "validation[:20]", str(shared / "tfds")).open()
    assert len(data) == 20 and len(data[2:5]) == 3
    assert data[0] == {
        "idx": 878,
        "label": 1,
        "sentence": "That picture of Susan offended her.",
    }
    assert data[-1] == data[19]
    everything = TFDS("glue/cola", "validation", str(shared / "tfds")).open()
    assert list(everything)[1042] == everything[1042]  # read in blocks, and one by one
    assert len(list(everything)) == len(everything) == 1043
    assert data[5:2:-1] == [data[5], data[4], data[3]] and data[7:7] == []
    with pytest.raises(IndexError):
        data[20]
    assert "tensorflow" not in sys.modules
    nested = TFDS("e2e_cleaned", "train[:1]", str(shared / "tfds")).open()[0]
    assert nested["input_text"]["table"]["content"][-1] == "Café Rouge"


def test_tfds_errors(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no split 'dev'.*validation"):
        TFDS("glue/cola", "dev[:3]", str(shared / "tfds")).open()
    with pytest.raises(UserError, match="'no_such_set'"):
        TFDS("no_such_set", "train", str(tmp_path)).open()
    with pytest.raises(UserError, match="(?s)'glue/kola'.*cola"):
        TFDS("glue/kola", "train", str(tmp_path)).open()
    with pytest.raises(UserError, match="Cannot read split"):
        TFDS("glue/cola", "train[:x]", str(shared / "tfds")).open()


def test_a_download_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TFDS's own errors are of no class that is a user's; what we prepare raises its own."""
    import tensorflow_datasets as tfds

    class DownloadError(Exception):
        pass

    def fails(self: Any, **options: Any) -> None:
        raise DownloadError("Failed to get url: HTTP code 503\nand more")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fails)
    with pytest.raises(UserError, match="prepare glue/cola: Failed to get url: HTTP code 503$"):
        TFDS("glue/cola", "train", str(tmp_path)).open()
    with pytest.raises(DownloadError):
        TFDS("cmudict_g2p", "train", str(tmp_path)).open()


def test_two_at_once_prepare_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_jax.data import g2p

    words = tmp_path / "cmudict.dict"
    words.write_text("".join(f"{a}{b}x AH0 B\n" for a in "abcdefgh" for b in "abcdefghijkl"))
    monkeypatch.setattr(g2p, "dictionary_path", lambda: words)
    prepared: list[str] = []
    original = g2p.CmudictG2p.download_and_prepare

    def counted(self: Any, **options: Any) -> None:
        prepared.append(str(options["file_format"]))
        original(self, **options)

    monkeypatch.setattr(g2p.CmudictG2p, "download_and_prepare", counted)
    source = TFDS("cmudict_g2p", "train", str(tmp_path / "tfds"))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: source.open(), range(2))
    assert prepared == ["array_record"]
    assert list(first) == list(second) and len(first) > 60


def test_joined_splits_tell_theirs(tmp_path: Path) -> None:
    for name, numbers in (("a", [0, 1]), ("b", [2, 3, 4])):
        lines = "\n".join(json.dumps({"n": n}) for n in numbers)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    records = Files(str(tmp_path / "{split}.jsonl"), split="a+b[1:]").open()
    expected = [{"n": n, "split": s} for n, s in ((0, "a"), (1, "a"), (3, "b"), (4, "b"))]
    assert list(records) == expected and len(records) == 4
    assert [records[i] for i in range(4)] == expected == records[:]
    assert records[-1] == expected[-1]
    with pytest.raises(IndexError):
        records[4]


def test_joined_splits_of_tfds(shared: Path) -> None:
    records = TFDS("glue/cola", "validation[:2]+test[:1]", str(shared / "tfds")).open()
    assert [r["split"] for r in records] == ["validation", "validation", "test"]
    assert records[2]["label"] == -1 and records[0]["sentence"]


def test_lines_of_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "x.label"
    path.write_bytes("A:b caf\xe9\r\n\nC:d two words\n".encode("latin-1"))
    source = Files(str(path), pattern=r"(?P<label>\w):\w (?P<text>.*)", encoding="latin-1")
    assert source.open() == [
        {"label": "A", "text": "caf\xe9"},
        {"label": "C", "text": "two words"},
    ]
    path.write_text("no label\n")
    with pytest.raises(UserError, match="line 1: 'no label' is not of the pattern"):
        source.open()
    for pattern, message in (("(", "not a regular expression"), (".*", "names no group")):
        with pytest.raises(UserError, match=message):
            Files(str(path), pattern=pattern).open()


def test_a_gzipped_file_stands_in_for_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(b"a\n1\n"))
    assert Files(str(tmp_path / "{split}.csv"), split="train").open() == [{"a": "1"}]
