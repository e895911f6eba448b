"""The five metrics of the E2E NLG Challenge, as its official scorer computes them.

BLEU and NIST see the raw text, cut and lower-cased by mteval's rules; METEOR, ROUGE-L and CIDEr see
Penn Treebank tokens without punctuation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lora_jax.data.metrics import captions, meteor, mteval

_log = logging.getLogger(__name__)


def scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """bleu, nist, meteor, rouge_l and cider on the scorer's own scales.

    bleu, meteor and rouge_l are 0 to 1 (tables print them times 100), cider 0 to 10. `meteor` is
    left out where it cannot be had, see `left_out`.
    """
    found = {
        "bleu": mteval.bleu(predictions, references),
        "nist": mteval.nist(predictions, references),
        "rouge_l": captions.rouge_l(predictions, references),
        "cider": captions.cider(predictions, references),
    }
    for name, reason in left_out().items():
        _log.warning("no %s: %s", name, reason)
    if "meteor" not in left_out():
        found["meteor"] = meteor.meteor(predictions, references)
    return {n: found[n] for n in ("bleu", "nist", "meteor", "rouge_l", "cider") if n in found}


def left_out() -> dict[str, str]:
    """Metric -> why it cannot be had on this machine."""
    reason = meteor.lacking()
    return {"meteor": reason} if reason else {}
