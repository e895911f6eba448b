"""Prefix-Tuning (Li and Liang 2021): table-to-text on E2E, GPT-2 medium and large.

    lora-jax table experiments/prefix_e2e.py --scale small --workdir runs/prefix_e2e

`paper`: the settings of its Table 5 and, where they differ, the defaults of the authors' scripts
(XiangLi1999/PrefixTuning: `published/prefix_script_hparams.csv`), which also say what the paper
does not print; for a GPU and the hub, on `E2E_DIR` as in lora_table3.py. WebNLG and DART are not in
the project. `small`: what the prefix's length does, SmolLM2-135M (extra `quickstart`) on 250 pairs,
three epochs. The metrics need the extra `metrics`; METEOR needs Java.
"""

from typing import Any

import smollm2_e2e
from given_folders import CONFIGS, e2e, e2e_notes
from smollm2_e2e import METRICS

from lora_jax.config import load_module
from lora_jax.tables import Claim, Published, Row, Table, Trained
from lora_jax.tables.presets import row
from lora_jax.tables.quoted import quoted

PUBLISHED = "prefix_table_to_text"
COLUMNS = {"BLEU": "E2E_BLEU", "NIST": "E2E_NIST", "MET": "E2E_MET", "ROUGE-L": "E2E_RL",
           "CIDEr": "E2E_CIDEr"}  # fmt: skip
SCRIPTS = "gpt2/train_e2e.py and gen.py"
# Method of Table 2, its settings' name in Table 5, and ours; sizes give the shares on GPT-2 medium.
METHODS = {
    "FT-full": ("FT", {"method.kind": "full"}),
    "FT-top2": ("FT-top2", {"method.kind": "ft_top", "method.layers": 2}),
    "Adapter(3%)": ("Adapter(3%)", {"method.kind": "adapter_l", "method.size": 224}),
    "Adapter(0.1%)": ("Adapter(0.1%)", {"method.kind": "adapter_l", "method.size": 6}),
    "Prefix(0.1%)": ("Prefix", {"method.kind": "prefix_tuning"}),
    "Prefix, scripts": (SCRIPTS, {"method.kind": "prefix_tuning"}),
}
MODELS = {"GPT-2 M": "openai-community/gpt2-medium", "GPT-2 L": "openai-community/gpt2-large"}
PAIRS = load_module(str(CONFIGS / "e2e.py")).TRAINING_PAIRS
LENGTHS = (1, 5, 20)
NOTES = (
    "the ACL version's numbers; arXiv's first version has others for FT (68.2), Prefix (69.7) and "
    "both adapters' WebNLG, and these are the ones that the LoRA paper quotes",
    "Table 5 does not print weight decay, warm-up, clipping or the beams: 0, 0, 1 and 5 in the "
    "authors' scripts, without label smoothing",
    "for E2E, Table 5 has a rate of 8e-5 and a prefix of 5, the scripts' defaults are 5e-5 and 10",
    "the scripts add a prefix run's loss up over a text's tokens and bar newlines in decoding; "
    "here it is the mean over tokens, and nothing is barred",
)


def table(scale: str) -> Table:
    return _paper() if scale == "paper" else _small(scale)


def _paper() -> Table:
    rows = []
    for model, source in MODELS.items():
        for method, (named, overrides) in METHODS.items():
            if model == "GPT-2 L" and method != "FT-full" and not method.startswith("Prefix"):
                continue
            large = model == "GPT-2 L" and method != "FT-full"
            printed = "Prefix" if large else method.replace(", scripts", "(0.1%)")
            label = f"{model} {method if named == SCRIPTS else printed}"
            where = {"version": "ACL2021 Table 2", "model": model, "method": printed}
            for column, (metric, times) in METRICS.items():
                cited = Published(PUBLISHED, where, COLUMNS[column], times)
                work = Trained(config(source, named), metric, {**overrides, **settings(named)})
                rows.append(Row(label, column, work, cited))
    others = [c for c in row(PUBLISHED, version="ACL2021 Table 2", model="GPT-2 L", method="Prefix")
              if c.startswith(("WebNLG", "DART"))]  # fmt: skip
    reason = "WebNLG and DART are not in the project"
    rows += quoted(PUBLISHED, ("version", "model", "method"), others, reason)
    return Table(
        "Prefix-Tuning, Table 2: table-to-text", tuple(rows), seeds=3,
        notes=(*NOTES, *e2e_notes()), cost="about 8 hours a row on one GPU",
    )  # fmt: skip


def _printed(named: str) -> dict[str, Any]:
    """The authors' scripts, with Table 5's cells for E2E in place of theirs."""
    scripts = row("prefix_script_hparams", script=SCRIPTS)
    return (
        scripts if named == SCRIPTS else scripts | row("prefix_hparams", method=named, task="E2E")
    )


def config(model: str, named: str) -> str:
    """Of a row of Table 5, or of the scripts: epochs and batch give the steps."""
    printed = _printed(named)
    return e2e(model, steps=printed["epochs"] * PAIRS // printed["batch_size"])


def settings(named: str) -> dict[str, object]:
    """Overrides of configs/e2e.py, which has the LoRA paper's."""
    printed = _printed(named)
    prefix = {"method.length": printed["prefix_length"], "method.hidden": printed["mid_dim"]}
    return {
        "optimizer.learning_rate": printed["lr"],
        "optimizer.weight_decay": printed["weight_decay"],
        "optimizer.warmup_steps": printed["warmup_steps"],
        "optimizer.clip_norm": printed["clip_norm"], "training.label_smoothing": 0.0,
        "data.batch_size": printed["batch_size"],
        "evaluation.num_beams": printed["num_beams"],
        "evaluation.max_new_tokens": printed["max_new_tokens"],
        "evaluation.length_penalty": 1.0, "evaluation.no_repeat_ngram_size": 0,
        **(prefix if named in ("Prefix", SCRIPTS) else {}),
    }  # fmt: skip


def _small(scale: str) -> Table:
    pairs = 250 if scale == "small" else 16
    arms: dict[str, tuple[dict[str, object], float]] = {
        f"Prefix, length {n}": ({"method.kind": "prefix_tuning", "method.length": n}, 3e-3)
        for n in LENGTHS
    } | {"FT": ({"method.kind": "full"}, 5e-5)}
    rows = smollm2_e2e.rows(arms, scale, pairs, ("BLEU", "ROUGE-L"))
    claims = [Claim(f"SmolLM2 Prefix, length {n}", "SmolLM2 FT", "BLEU") for n in LENGTHS]
    if scale == "smoke":
        rows, claims = rows[:2], []
    return Table(
        f"Prefix-Tuning on E2E, {scale}: SmolLM2-135M on {pairs} pairs", tuple(rows),
        seeds=3 if scale == "small" else 1, claims=tuple(claims),
        notes=(smollm2_e2e.NOTE,),
        cost="about 50 minutes on 2 CPU cores",
    )  # fmt: skip
