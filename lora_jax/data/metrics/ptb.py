"""Penn Treebank tokens, as COCO's caption scorers cut text (Stanford's tokenizer 3.4.1 there).

COCO's METEOR, ROUGE-L and CIDEr see lower case words without punctuation. Stanford's program needs
Java; this is a tokenizer of our own for English prose, compared with it in the tests.
"""

from __future__ import annotations

import re

# What COCO's wrapper throws away. Brackets stay: it looks for -LRB-, the program prints -lrb-.
_DROPPED = frozenset(["''", '"', "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_SIGNS = {"£": "#", "€": "$", "¢": "cents", "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-"}
_SPLIT = re.compile(r"(?P<word>.+?)(?P<end>n't|'(?:s|m|d|re|ve|ll))|(?P<can>can)(?P<not>not)")
# Short words that keep their period. Any word does before a comma: "in the city center., near".
_SHORT = "st|rd|ave|blvd|mr|mrs|ms|dr|prof|etc|vs|inc|ltd|co|corp|jr|sr"
_WORD = r"[^\W_]+(?:['&/-][^\W_]+)*"
_TOKEN = re.compile(
    rf"""
      [a-z](?:\.[a-z])+\.?                  # p.m., e.g.
    | (?:(?<![\w.])-)?\d+(?:[.,:/]\d+)+(?![\w-])  # 3.50, 1,000, 10:30, 3/5
    | (?:(?<![\w.])-)?\d+(?![\w&/'-])
    | (?:{_SHORT})\.(?!\.)
    | (?<![^\W_])'(?:s|m|d|re|ve|ll)\b        # cut off already: it 's
    | {_WORD}\.(?=,)
    | {_WORD}
    | \.\.+ | --+ | [–—]+
    | \S
    """,
    re.VERBOSE,
)


def words(text: str) -> list[str]:
    """Lower case tokens of `text` less punctuation."""
    found: list[str] = []
    for token in _TOKEN.findall(text.lower().replace("’", "'")):
        found += _parts(_SIGNS.get(token, token))
    return [token for token in found if token not in _DROPPED and not token.startswith("..")]


def _parts(token: str) -> list[str]:
    match = _SPLIT.fullmatch(token)
    return [part for part in match.groups() if part] if match else [token]
