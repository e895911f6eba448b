"""LoRA paper, Table 3: the E2E NLG Challenge.

    lora-jax table experiments/lora_table3.py --scale small --workdir runs/lora_table3

`E2E_DIR` names a folder with the original challenge's trainset.csv and testset_w_refs.csv; without
it, the cleaned data of TFDS is used. `paper`: GPT-2 medium and large from the hub with Table 11's
settings, for a GPU. `small`: SmolLM2-135M (extra `quickstart`) on 500 pairs, three epochs, packed,
48 restaurants decoded greedily; about 25 minutes a row on 2 CPU cores (8 minutes a seed). The
metrics need the extra `metrics`; METEOR needs Java.
"""

from collections.abc import Mapping, Sequence

from given_folders import e2e, e2e_split

from lora_jax.tables import Claim, Published, Row, Table, Trained

PUBLISHED = "lora_t03_e2e"
# Metric of a run, and what its unit is to the paper's (BLEU, METEOR and ROUGE-L are x100 there).
METRICS = {"BLEU": ("bleu", 0.01), "NIST": ("nist", 1.0), "MET": ("meteor", 0.01),
           "ROUGE-L": ("rouge_l", 0.01), "CIDEr": ("cider", 1.0)}  # fmt: skip
# Rows of the paper, and the method of ours with the published number of parameters on GPT-2 medium.
METHODS = {
    ("FT", 354.92): {"method.kind": "full"},
    ("AdapterL", 0.37): {"method.kind": "adapter_l", "method.size": 6},
    ("AdapterL", 11.09): {"method.kind": "adapter_l", "method.size": 224},
    ("AdapterH", 11.09): {"method.kind": "adapter_h", "method.size": 112},
    ("FT-Top2", 25.19): {"method.kind": "ft_top", "method.layers": 2},
    ("PreLayer", 0.35): {"method.kind": "prefix_tuning", "method.length": 5},
    ("LoRA", 0.35): {},
}
SMALL = {
    ("FT", 354.92): 5e-5, ("AdapterH", 11.09): 1e-3, ("FT-Top2", 25.19): 2e-4,
    ("PreLayer", 0.35): 3e-3, ("LoRA", 0.35): 2e-3,
}  # fmt: skip
SHORT = {
    "data.packing": True, "data.length": 128, "data.batch_size": 4, "optimizer.warmup_steps": 10,
    "training.chunk": 128, "training.save_every": 60, "evaluation.num_beams": 1,
    "evaluation.no_repeat_ngram_size": 4, "evaluation.batch_size": 16, "evaluation.show": 0,
}  # fmt: skip
NOTES = (
    "Length penalty of the beams: 0.9 in the paper's Table 11, 0.8 in the authors' README.",
    "GPT-2 medium with LoRA has 393,216 trainable parameters by the formula; 0.35M is printed.",
    "FT and prefix rows are prefix-tuning's first arXiv version (68.2, 69.7), not the ACL one.",
)


def table(scale: str) -> Table:
    if scale == "paper":
        return _paper()
    pairs = 500 if scale == "small" else 16
    chosen = SMALL if scale == "small" else {("LoRA", 0.35): 2e-3}
    arms = {method: (METHODS[method, size], rate) for (method, size), rate in chosen.items()}
    rows = small_rows(arms, scale, pairs, [column for column in METRICS if column != "MET"])
    claims = [Claim("SmolLM2 LoRA", f"SmolLM2 {m}", "BLEU") for m, _ in chosen if m != "LoRA"]
    return Table(
        f"LoRA paper, Table 3 (E2E), {scale}: SmolLM2-135M on {pairs} pairs", tuple(rows),
        seeds=3 if scale == "small" else 1, claims=tuple(claims),
        notes=(*NOTES, "Another model and far less data than the paper's: no number is beside it."),
        cost="about 2 hours on 2 CPU cores",
    )  # fmt: skip


def small_rows(
    arms: Mapping[str, tuple[Mapping[str, object], float]],
    scale: str,
    pairs: int,
    columns: Sequence[str],
) -> list[Row]:
    """SmolLM2-135M on the first pairs, three epochs: arms are (overrides, learning rate) by name.

    `smoke` takes one step.
    """
    records = 2 if scale == "smoke" else 48
    config = e2e("smollm2-135m", steps=3 * pairs // 8)
    rows = []
    for name, (fields, rate) in arms.items():
        overrides = {
            **SHORT, **fields, "optimizer.learning_rate": rate,
            "data.source.split": f"{e2e_split('train')}[:{pairs}]",
            "data.validation": f"{e2e_split('test')}[:{records}]",
        }  # fmt: skip
        if scale == "smoke":
            overrides |= {"training.steps": 1, "optimizer.warmup_steps": 0,
                          "evaluation.max_new_tokens": 4}  # fmt: skip
        for column in columns:
            work = Trained(config, METRICS[column][0], overrides)
            rows.append(Row(f"SmolLM2 {name}", column, work, None))
    return rows


def _paper() -> Table:
    rows = []
    for (method, size), overrides in METHODS.items():
        where = {"model": "GPT-2 M", "method": method, "trainable_params_M": size}
        config = e2e("openai-community/gpt2-medium")
        for column, (metric, times) in METRICS.items():
            work = Trained(config, metric, overrides)
            rows.append(
                Row(f"GPT-2 M {method} {size}M", column, work,
                    Published(PUBLISHED, where, column, times))
            )  # fmt: skip
    return Table(
        "LoRA paper, Table 3 (E2E): GPT-2 medium", tuple(rows), seeds=3, notes=NOTES,
        cost="about 8 hours a row on one GPU",
    )  # fmt: skip
