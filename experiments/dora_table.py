"""DoRA (Liu et al. 2024): Table 1 (commonsense reasoning) and the curve over the rank.

    lora-jax table experiments/dora_table.py --scale small --workdir runs/dora_table

`paper`: parameters on LLaMA-7B's shape; the accuracies stand as not run. `small`: LoRA and DoRA by
rank, MiniLM-L6 (extra `minilm`) on SST-2, where the published curve is of LLaMA-7B.
"""

import minilm
from given_folders import CONFIGS

from lora_jax.tables import Counted, Published, Row, Table
from lora_jax.tables.quoted import quoted

SHAPED = str(CONFIGS / "gpt3_175b.py")
LLAMA_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
TARGETS = r"(attention/(query|key|value)|mlp/(up|down))$"
TASKS = ("BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA", "Avg")
REASON = "the commonsense data (commonsense_170k and its eight test sets) is not in the project"
RANKS = (4, 16, 64)
SMALL: dict[str, minilm.Method] = {
    f"{name} r={r}": (kind, {"rank": r, "alpha": 2.0 * r}, (5e-4, 2e-3))
    for r in RANKS
    for name, kind in (("DoRA", "dora"), ("LoRA", "lora"))
}


def table(scale: str) -> Table:
    if scale != "paper":
        return Table(
            f"DoRA, by rank, {scale}", minilm.rows(SMALL, scale), seeds=minilm.seeds(scale),
            claims=minilm.claims(scale, *[(f"DoRA r={r}", f"LoRA r={r}") for r in RANKS]),
            notes=(minilm.NOTE,), cost=minilm.cost(SMALL),
        )  # fmt: skip
    rows = []
    for kind, config in (
        ("lora", "DoRA paper LoRA r=32 LLaMA-7B q,k,v,up,down"), ("dora", "DoRA r=32 LLaMA-7B"),
    ):  # fmt: skip
        overrides = {"method.kind": kind, "method.rank": 32, "method.targets": TARGETS,
                     "model.shape": LLAMA_7B}  # fmt: skip
        cited = Published("param_counts", {"config": config}, "computed", times=1e-6)
        name = f"LLaMA-7B {kind} r=32"
        rows.append(Row(name, "parameters (M)", Counted(SHAPED, overrides), cited))
    rows += quoted("dora_t1_commonsense", ("model", "method"), TASKS, REASON)
    rows += quoted("dora_rank_sweep", ("method", "rank"), TASKS, REASON)
    return Table("DoRA, Table 1 and the curve over the rank", tuple(rows), seeds=1)
