"""E2E's five metrics, against fixtures by hand and the programs of others."""

from __future__ import annotations

import csv
import importlib.util
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_jax.data.metrics import captions, e2e, meteor, mteval, ptb
from lora_jax.errors import UserError

needs_bleu = pytest.mark.skipif(
    importlib.util.find_spec("sacrebleu") is None, reason="sacrebleu (extra metrics) is missing"
)
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")
GUESSES = ["The Cat sat on the mat.", "a dog, it barks loudly at night"]
REFERENCES = [
    ["the cat sat on a mat", "There is a cat on the mat."],
    ["A dog barks at night.", "dogs bark loudly at night", "it's a dog"],
]


def pycocoevalcap() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pycocoevalcap (extra metrics) is missing")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's £20-25, isn't it?", "it 's # 20-25 is n't it"),
        ("it 's n't (kid-friendly)...", "it 's n't -lrb- kid-friendly -rrb-"),
        ('"Café Brazil" -- 3.50, 1,000; 10:30!', "café brazil 3.50 1,000 10:30"),
        ("near St. John's. 5of5 5-star cannot", "near st. john 's 5of5 5-star can not"),
        ("in the center., near; he’ll", "in the center. near he 'll"),
        ("", ""),
    ],
)
def test_penn_treebank_words(text: str, tokens: str) -> None:
    # Checked with Stanford's tokenizer 3.4.1 by test_words_are_those_of_stanfords_program.
    assert ptb.words(text) == tokens.split()


@needs_java
def test_words_are_those_of_stanfords_program(shared: Path, tmp_path: Path) -> None:
    folder = pycocoevalcap() / "tokenizer"
    with (shared / "data" / "e2e_nlg" / "testset_w_refs.csv").open(encoding="utf-8") as lines:
        texts = [row["ref"].replace("\n", " ") for row in csv.DictReader(lines)]
    (tmp_path / "in.txt").write_text("\n".join(texts), encoding="utf-8")
    command = ["java", "-cp", "stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer",
               "-preserveLines", "-lowerCase", str(tmp_path / "in.txt")]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, check=True)
    brackets = {"-LRB-", "-RRB-", "-LCB-", "-RCB-"}
    dropped = {"''", "'", "``", "`", "--", "...", *".?!,:-;", *brackets}
    theirs = [
        [token for token in line.split() if token not in dropped]
        for line in done.stdout.decode("utf-8").split("\n")
    ]
    different = [t for t, tokens in zip(texts, theirs, strict=False) if ptb.words(t) != tokens]
    assert not different


def test_longest_common() -> None:
    assert captions.longest_common("abcbdab", "bdcaba") == 4
    assert captions.longest_common("", "abc") == captions.longest_common("abc", "") == 0
    assert captions.longest_common("abcd" * 30, "abcd" * 20) == 80


def test_rouge_l_by_hand() -> None:
    # Precision 5/6 (first reference or second), recall max(5/6, 4/7) = 5/6.
    assert captions.rouge_l(GUESSES[:1], REFERENCES[:1]) == pytest.approx(5 / 6)
    # "a b" against "a" and "a b c d": precision 2/2, recall 1/1, of different references.
    assert captions.rouge_l(["a b"], [["a", "a b c d"]]) == pytest.approx(1)
    precision, recall = 1 / 2, 1 / 4
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert captions.rouge_l(["x b"], [["b c d e"]]) == pytest.approx(expected)
    assert captions.rouge_l(["x"], [["y"]]) == captions.rouge_l([""], [["y"]]) == 0


def test_cider_by_hand() -> None:
    # Two documents: a word of one has weight log 2, a word of both 0. Equal texts of four words:
    # cosine 1 for each n. A text of two words: cosine 1 for n = 1, 2, none for 3, 4.
    assert captions.cider(["a b c d", "e f"], [["a b c d"], ["e f"]]) == pytest.approx(
        10 * (1 + 0.5) / 2
    )
    # Three words for two: bigrams differ by one; clipped unigrams 2/sqrt(2*3), bigrams 1/sqrt(2).
    penalty = math.exp(-1 / 72)
    first = penalty * (2 / math.sqrt(6) + 1 / math.sqrt(2)) / 4
    found = captions.cider(["a b c", "z"], [["a b"], ["e f"]])
    assert found == pytest.approx(10 * first / 2)


def test_rouge_and_cider_equal_pycocoevalcap() -> None:
    pycocoevalcap()
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    guesses = {i: [" ".join(ptb.words(g))] for i, g in enumerate(GUESSES)}
    references = {i: [" ".join(ptb.words(r)) for r in o] for i, o in enumerate(REFERENCES)}
    for scorer, ours in ((Rouge(), captions.rouge_l), (Cider(), captions.cider)):
        theirs, _ = scorer.compute_score(references, guesses)
        assert ours(GUESSES, REFERENCES) == pytest.approx(theirs)


@needs_bleu
def test_bleu_by_hand() -> None:
    # "the cat sat on the mat ." against "the cat sat on a mat" and "there is a cat on the mat .":
    # 6 of 7 words ("the" twice, but once in each reference), 6 of 6 pairs, 4 of 5 triples (not
    # "sat on the"), 2 of 4 fours ("the cat sat on", "on the mat .").
    product = 6 / 7 * 6 / 6 * 4 / 5 * 2 / 4
    # 7 tokens; the references have 6 and 8, equally near: the shorter, so no penalty.
    assert mteval.bleu(GUESSES[:1], REFERENCES[:1]) == pytest.approx(product**0.25)
    assert mteval.bleu(["a"], [["a"]]) == 0  # no smoothing: there is no bigram


@needs_bleu
def test_nist_by_hand() -> None:
    # References "a b" and "a c": 4 tokens. Information of a: log2(4/2) = 1, b: log2(4/1) = 2,
    # "a b" after a: log2(2/1) = 1. Guess "A b": (1 + 2)/2 + 1/1.
    assert mteval.nist(["A b"], [["a b", "a c"]]) == pytest.approx(2.5)
    # Half the length: penalty exp(log(.5)/log(1.5)^2 * log(.5)^2).
    penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(0.5) ** 2)
    assert mteval.nist(["b"], [["a b", "a c"]]) == pytest.approx(2 * penalty)
    # Two thirds: a half, which is how the penalty is defined.
    assert mteval.nist(["b d"], [["b d e"]]) == pytest.approx(0.5 * (math.log2(3) + 0))
    # Clipped: the second "b" counts nothing, but its place in the mean does.
    assert mteval.nist(["b b"], [["a b", "a c"]]) == pytest.approx(2 / 2)
    assert mteval.nist([""], [["a"]]) == 0


@needs_bleu
@needs_java
def test_official_scorers_example(shared: Path) -> None:
    """The ten outputs that come with the official scorer, and what it prints for them."""
    folder = shared / "data" / "e2e_nlg" / "e2e-metrics-examples"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: example-inputs of github.com/tuetschek/e2e-metrics")
    guesses = (folder / "baseline-output.txt").read_text(encoding="utf-8").strip().split("\n")
    blocks = (folder / "devel-conc.txt").read_text(encoding="utf-8").strip().split("\n\n")
    pycocoevalcap()
    found = e2e.scores(guesses, [block.split("\n") for block in blocks])
    assert found == pytest.approx(
        {"bleu": 0.720293, "nist": 7.788888, "meteor": 0.480072, "rouge_l": 0.790953,
         "cider": 2.303943}, abs=1e-6,
    )  # fmt: skip


@needs_java
def test_meteor() -> None:
    pycocoevalcap()
    # Golden: pycocoevalcap.meteor.Meteor().compute_score on the tokens of `ptb.words`.
    assert meteor.meteor(GUESSES, REFERENCES) == pytest.approx(0.4452852781564051, abs=1e-6)


@needs_bleu
def test_without_java_meteor_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = e2e.scores(GUESSES, REFERENCES)
    assert list(found) == ["bleu", "nist", "rouge_l", "cider"]
    assert "no Java" in e2e.left_out()["meteor"] and "no meteor" in caplog.text
    with pytest.raises(UserError, match="no Java"):
        meteor.meteor(GUESSES, REFERENCES)


def test_missing_packages_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    for metric in (mteval.bleu, mteval.nist):
        with pytest.raises(UserError, match=r"lora-jax\[metrics\]"):
            metric(GUESSES, REFERENCES)
    monkeypatch.setattr(shutil, "which", lambda name: "java")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lora-jax\[metrics\]"):
        meteor.meteor(GUESSES, REFERENCES)


def test_references_are_lists() -> None:
    with pytest.raises(UserError, match="Prediction 0 needs a list"):
        captions.rouge_l(["a"], ["a"])
    with pytest.raises(UserError, match="Prediction 1 needs a list"):
        captions.cider(["a", "b"], [["a"], []])
    with pytest.raises(UserError, match="1 predictions for 2"):
        captions.rouge_l(["a"], [["a"], ["b"]])
    with pytest.raises(UserError, match="no predictions"):
        captions.rouge_l([], [])


@needs_bleu
def test_the_test_set_takes_seconds(shared: Path) -> None:
    with (shared / "data" / "e2e_nlg" / "testset_w_refs.csv").open(encoding="utf-8") as lines:
        groups: dict[str, list[str]] = {}
        for row in csv.DictReader(lines):
            groups.setdefault(row["mr"], []).append(row["ref"])
    references = list(groups.values())[::5]  # a fifth, in a fifth of the 10 s that all may take
    began = time.process_time()
    for metric in (mteval.bleu, mteval.nist, captions.rouge_l, captions.cider):
        metric([r[0] for r in references], references)
    assert time.process_time() - began < 2


@needs_bleu
def test_order_and_scale_of_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor, "lacking", lambda: None)
    monkeypatch.setattr(meteor, "meteor", lambda guesses, references: 0.5)  # Java takes seconds
    found = e2e.scores(["a b c d e"] * 2, [["a b c d e"], ["f"]])
    assert list(found) == ["bleu", "nist", "meteor", "rouge_l", "cider"]
    assert found["rouge_l"] == pytest.approx(0.5) and found["meteor"] == 0.5
    assert 0.4 < found["bleu"] < 0.6 and found["cider"] == pytest.approx(5)
