"""Each config of configs/ with its own settings, on a model and data that are made here.

What a config names besides what it sets — a base, a data set, a mesh — is put in its place; method,
task, loss, optimizer and evaluation are the config's. A new config needs an entry in `PLACED`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "configs"
# One file of records with the fields of all tasks: of pronouncing, of SST-2 and MRPC, of E2E, and
# of SAMSum.
RECORDS = [
    {
        "word": word, "phonemes": " ".join(word), "references": [" ".join(word)],
        "sentence": word, "sentence1": word, "sentence2": word[::-1], "label": i % 2,
        "mr": f"name[{word}]", "ref": f"{word} is good.",
        "dialogue": word, "summary": word[0],
    }
    for i, word in enumerate(("cat", "tac", "act", "at", "ta", "ca", "tat", "cact"))
]  # fmt: skip
SHORT = {"training.steps": 2, "data.batch_size": 2, "data.validation": "[6:8]"}
DECODED = {**SHORT, "optimizer.warmup_steps": 0, "evaluation.max_new_tokens": 2,
           "evaluation.batch_size": 2}  # fmt: skip
PLACED: Mapping[str, Mapping[str, Any]] = {
    "aghajanyan": {**SHORT, "training.eval_every": 1, "method.dimension": 20},
    "e2e": {**DECODED, "data.length": 64, "evaluation.num_beams": 2},
    "glue": {**SHORT, "training.eval_every": 1},
    "gpt3_175b": {**DECODED, "data.length": 32, "training.accumulate": 1, "mesh": {}},
    "mnist": {"training.steps": 2, "training.eval_every": 1, "evaluation.batch_size": 20},
    "quickstart": {**DECODED, "data.length": 64, "training.chunk": 32,
                   "evaluation.base_shots": (0, 1)},
    "sweep": {**DECODED, "data.length": 64, "training.chunk": 32},
    "sweep_quick": SHORT,
}  # fmt: skip

TEXT = """
# {name}, on a tiny model.
from lora_jax import config
PATH, PLACED = {path!r}, {placed!r}
real = config.load_module(PATH)
globals().update((n, f) for n, f in vars(real).items() if n.startswith("sweep_"))
def get_config(arg=""):
    found = config.load_file(f"{{PATH}}:{{arg}}".removesuffix(":"))
    for name, value in PLACED.items():
        section, _, field = name.partition(".")
        if field:
            found.setdefault(section, {{}})[field] = value
        else:
            found[section] = value
    return found
"""


def write(folder: Path, base: Path, mnist: Path) -> None:
    """folder/configs/NAME.py for each of `CONFIGS`, over a base and TFDS's folder of an mnist."""
    records = folder / "records.jsonl"
    records.write_text("\n".join(map(json.dumps, RECORDS)))
    lines = {"kind": "files", "path": str(records), "split": "[:6]"}
    images = {"kind": "tfds", "name": "mnist", "data_dir": str(mnist)}
    (folder / "configs").mkdir()
    for path in CONFIGS.glob("*.py"):
        assert path.stem in PLACED, f"say in tests/stand_ins.py how {path.name} is run small"
        placed = {"data.source": images if path.stem == "mnist" else lines, **PLACED[path.stem]}
        if path.stem == "gpt3_175b":  # a shape alone has no tokenizer
            placed["model"] = {"source": str(base), "dtype": "bfloat16", "remat": "full"}
        elif path.stem != "mnist":
            placed["model.source"] = str(base)
        text = TEXT.format(name=path.name, path=str(path), placed=placed)
        (folder / "configs" / path.name).write_text(text)
