"""LoRA paper, Table 3: the E2E NLG Challenge.

    lora-jax table experiments/lora_table3.py --scale small --workdir runs/lora_table3

`E2E_DIR` names a folder with the original challenge's trainset.csv and testset_w_refs.csv; without
it, the cleaned data of TFDS is used. `paper`: GPT-2 medium and large from the hub, for a GPU; LoRA
with Table 11's settings and with those of the authors' README, the other methods with
Prefix-Tuning's, as the paper has it (appendix D.3). `small`: SmolLM2-135M (extra `quickstart`) on
500 pairs, three epochs, packed, 48 restaurants decoded greedily; about 25 minutes a row on 2 CPU
cores (8 minutes a seed). The metrics need the extra `metrics`; METEOR needs Java.
"""

import prefix_e2e
import smollm2_e2e
from given_folders import e2e, e2e_notes
from smollm2_e2e import METRICS

from lora_jax.tables import Claim, Published, Row, Table, Trained
from lora_jax.tables.published import counted

PUBLISHED = "lora_t03_e2e"
MEDIUM, LARGE = "GPT-2 M", "GPT-2 L"
# The paper's rows: model, method, millions of parameters (they give adapters' sizes); ours; and
# whose settings: a row of Prefix-Tuning's Table 5, or LoRA's own.
PAPER = (
    (MEDIUM, "FT", "354.92", {"method.kind": "full"}, "FT"),
    (MEDIUM, "AdapterL", "0.37", {"method.kind": "adapter_l", "method.size": 6}, "Adapter(0.1%)"),
    (MEDIUM, "AdapterL", "11.09", {"method.kind": "adapter_l", "method.size": 224}, "Adapter(3%)"),
    (MEDIUM, "AdapterH", "11.09", {"method.kind": "adapter_h", "method.size": 112}, "Adapter(3%)"),
    (MEDIUM, "FT-Top2", "25.19", {"method.kind": "ft_top", "method.layers": 2}, "FT-top2"),
    (MEDIUM, "PreLayer", "0.35", {"method.kind": "prefix_tuning"}, "Prefix"),
    (MEDIUM, "LoRA", "0.35", {}, ""),
    (LARGE, "FT", "774.03", {"method.kind": "full"}, "FT"),
    (LARGE, "AdapterL", "0.88", {"method.kind": "adapter_l", "method.size": 8}, "Adapter(0.1%)"),
    (LARGE, "AdapterL", "23.0", {"method.kind": "adapter_l", "method.size": 248}, "Adapter(3%)"),
    (LARGE, "PreLayer", "0.77", {"method.kind": "prefix_tuning"}, "Prefix"),
    (LARGE, "LoRA", "0.77", {}, ""),
)
# Which row of param_counts.csv each is: the paper's formula, and where it prints something else.
COUNTED = {
    (MEDIUM, "FT", "354.92"): "GPT-2 M FT (all)",
    (LARGE, "FT", "774.03"): "GPT-2 L FT (all)",
    (MEDIUM, "AdapterL", "0.37"): "GPT-2 M AdapterL r=6",
    (MEDIUM, "AdapterL", "11.09"): "GPT-2 M AdapterL r=224",
    (MEDIUM, "AdapterH", "11.09"): "GPT-2 M AdapterH r=112",
    (MEDIUM, "FT-Top2", "25.19"): "GPT-2 M FT-Top2",
    (MEDIUM, "LoRA", "0.35"): "GPT-2 M LoRA rq=rv=4",
    (LARGE, "AdapterL", "0.88"): "GPT-2 L AdapterL r=8",
    (LARGE, "AdapterL", "23.0"): "GPT-2 L AdapterL r=248",
    (LARGE, "LoRA", "0.77"): "GPT-2 L LoRA rq=rv=4",
}
# Where the authors' README differs from Table 11, or says what that does not print.
README = {"evaluation.length_penalty": 0.8, "optimizer.eps": 1e-6}
# Overrides and learning rate at small scale: the best of those tried, for which see the README of
# experiments/results.
SMALL = {
    "FT": ({"method.kind": "full"}, 5e-5),
    "AdapterH": ({"method.kind": "adapter_h", "method.size": 112}, 1e-3),
    "FT-Top2": ({"method.kind": "ft_top", "method.layers": 2}, 3e-3),
    "PreLayer": ({"method.kind": "prefix_tuning", "method.length": 5}, 1e-3),
    "LoRA": ({}, 2e-3),
}
NOTES = (
    "Length penalty of the beams: 0.9 in the paper's Table 11, 0.8 in the authors' README.",
    "FT and prefix rows are prefix-tuning's first arXiv version (68.2, 69.7), not the ACL one.",
)


def table(scale: str) -> Table:
    if scale == "paper":
        return _paper()
    pairs = 500 if scale == "small" else 16
    arms = SMALL if scale == "small" else {"LoRA": SMALL["LoRA"]}
    columns = [column for column in METRICS if column != "MET"]
    return Table(
        f"LoRA paper, Table 3 (E2E), {scale}: SmolLM2-135M on {pairs} pairs",
        tuple(smollm2_e2e.rows(arms, scale, pairs, columns)),
        seeds=3 if scale == "small" else 1,
        claims=tuple(Claim("SmolLM2 LoRA", f"SmolLM2 {m}", "BLEU") for m in arms if m != "LoRA"),
        notes=(*NOTES, smollm2_e2e.NOTE), cost="about 2 hours on 2 CPU cores",
    )  # fmt: skip


def _paper() -> Table:
    rows = []
    for model, method, size, overrides, named in PAPER:
        where = {"model": model, "method": method, "trainable_params_M": size}
        source = prefix_e2e.MODELS[model]
        if named:
            config = prefix_e2e.config(source, named)
            variants = {"": {**overrides, **prefix_e2e.settings(named)}}
        else:
            config = e2e(source)
            variants = {"": overrides, ", README": {**overrides, **README}}
        for variant, chosen in variants.items():
            for column, (metric, times) in METRICS.items():
                work = Trained(config, metric, chosen)
                cited = Published(PUBLISHED, where, column, times)
                name = f"{model} {method} {size}M{variant}"
                counts = counted(COUNTED.get((model, method, size), ""))
                rows.append(Row(name, column, work, cited, *counts))
    return Table(
        "LoRA paper, Table 3 (E2E): GPT-2 medium and large", tuple(rows), seeds=3,
        notes=(
            *NOTES, *e2e_notes(),
            "The paper reports the best epoch of each run, here it is the last.",
        ),
        cost="about 8 hours a row on one GPU",
    )  # fmt: skip
