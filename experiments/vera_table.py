"""VeRA (Kopiczko et al. 2024): Table 2 (GLUE).

    lora-jax table experiments/vera_table.py --scale small --workdir runs/vera_table

`paper`: parameters on RoBERTa's shapes; the accuracies stand as not run, since VeRA's learning
rates and epochs are not among the published settings here. LoRA's are run by lora_table2.py.
`small`: VeRA, LoRA and full fine-tuning, MiniLM-L6 (extra `minilm`) on SST-2.
"""

import minilm

from lora_jax.tables import Counted, Published, Row, Table
from lora_jax.tables.quoted import quoted

TASKS = ("SST-2", "MRPC", "CoLA", "QNLI", "RTE", "STS-B", "Avg")
REASON = "its learning rates and epochs are not among the published settings here"
SMALL: dict[str, minilm.Method] = {
    "VeRA r=256": ("vera", {"rank": 256}, minilm.VERA_RATES),
    "LoRA r=8": ("lora", {"rank": 8, "alpha": 8.0}, minilm.LORA_RATES),
    "LoRA r=1": ("lora", {"rank": 1, "alpha": 1.0}, minilm.LORA_RATES),
    "full FT": ("full", {}, minilm.FULL_RATES),
}
# Width, layers, heads, and the rank that the published count tells.
SIZES = {"RoBERTa-base": (768, 12, 12, 1024), "RoBERTa-large": (1024, 24, 16, 256)}


def shape(width: int, layers: int, heads: int) -> dict[str, object]:
    """RoBERTa's config.json."""
    return {
        "model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "vocab_size": 50265,
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "hidden_act": "gelu", "max_position_embeddings": 514,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1,
    }  # fmt: skip


def table(scale: str) -> Table:
    if scale != "paper":
        return Table(
            f"VeRA, Table 2, {scale}", minilm.rows(SMALL, scale), seeds=minilm.seeds(scale),
            claims=minilm.claims(scale, *[("VeRA r=256", x) for x in SMALL if x != "VeRA r=256"]),
            notes=(minilm.NOTE,), cost=minilm.cost(SMALL),
        )  # fmt: skip
    rows = []
    for model, (width, layers, heads, rank) in SIZES.items():
        for method, fields in (("VeRA", {"rank": rank}), ("LoRA", {"rank": 8})):
            overrides = {
                "model.shape": shape(width, layers, heads),
                "method.kind": method.lower(),
                **{f"method.{k}": v for k, v in fields.items()},
                "method.train": (),
            }
            where = {"model": model, "method": method}
            cited = Published("vera_t2_glue", where, "params_M")
            work = Counted(str(minilm.CONFIG), overrides)
            rows.append(Row(f"{model} {method}", "parameters (M)", work, cited))
    rows += quoted("vera_t2_glue", ("model", "method"), TASKS, REASON)
    return Table("VeRA, Table 2: RoBERTa on GLUE", tuple(rows), seeds=1)
