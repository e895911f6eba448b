"""SmolLM2-135M (extra `quickstart`) on the first pairs of E2E: what small scales of tables share.

Three epochs, packed; 48 restaurants are decoded greedily. `E2E_DIR`: see given_folders.py. The
metrics need the extra `metrics`; METEOR needs Java.
"""

from collections.abc import Mapping, Sequence

from given_folders import e2e, e2e_split

from lora_jax.tables import Row, Trained

# Metric of a run, and what its unit is to the papers' (BLEU, METEOR and ROUGE-L are x100 there).
METRICS = {"BLEU": ("bleu", 0.01), "NIST": ("nist", 1.0), "MET": ("meteor", 0.01),
           "ROUGE-L": ("rouge_l", 0.01), "CIDEr": ("cider", 1.0)}  # fmt: skip
SHORT = {
    "data.packing": True, "data.length": 128, "data.batch_size": 4, "optimizer.warmup_steps": 10,
    "training.chunk": 128, "training.save_every": 60, "evaluation.num_beams": 1,
    "evaluation.no_repeat_ngram_size": 4, "evaluation.batch_size": 16, "evaluation.show": 0,
}  # fmt: skip
NOTE = "Another model and far less data than the paper's: no number is beside it."


def rows(
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
    found = []
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
            found.append(Row(f"SmolLM2 {name}", column, work, None))
    return found
