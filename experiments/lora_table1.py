"""LoRA paper, Table 1: latency of a forward pass, adapters beside merged LoRA.

    lora-jax table experiments/lora_table1.py --scale small --workdir runs/lora_table1

GPT-2 medium's shape with random weights, float32: the time does not depend on their values. The
arms take turns in one process; a cell is the median over rounds, and a seed is a repetition of all
rounds. Adapters have the paper's number of parameters. `paper`: its three settings, 100 rounds, for
a GPU. `small`: settings that a CPU can do, one of them the paper's. `smoke`: two layers.

Measured so on 2 CPU cores (experiments/results/lora_table1_small.csv): merged LoRA, the base's own
program, reads 3 % below to 3 % above it, which is the noise. No adapter is decided above it: the
most is Houlsby's at 4 x 128, 4.7 % [-0.2, 9.7]; the paper's GPU takes 30 % longer at 1 x 128. LoRA
beside reads 8 % [1, 15] faster at 1 x 16, which nothing in it explains.
"""

import functools
from pathlib import Path
from typing import Any

from lora_jax.tables import Computed, Published, Row, Table

PUBLISHED = "lora_t01_latency"
GPT2_MEDIUM = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257,
    "n_positions": 1024, "n_embd": 1024, "n_layer": 24, "n_head": 16,
    "activation_function": "gelu_new",
}  # fmt: skip
TINY = {**GPT2_MEDIUM, "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
# Batch, length, and the parameters of its adapters in millions.
PAPER = ((32, 512, 0.5), (16, 256, 11.0), (1, 128, 11.0))
SMALL = ((1, 16, 11.0), (1, 128, 11.0), (4, 128, 11.0))
ARMS = ("FT", "LoRA merged", "LoRA beside", "AdapterL", "AdapterH")
# The paper's row of each arm; LoRA that is not merged has none.
PRINTED = {"FT": "FT/LoRA", "LoRA merged": "FT/LoRA", "AdapterL": "AdapterL",
           "AdapterH": "AdapterH"}  # fmt: skip
NOTES = (
    "published on a Quadro RTX8000, mean of 100 trials: milliseconds of another machine are not "
    "comparable, overheads are the point",
    "a seed is a repetition: its cell is the median over rounds in which the arms take turns",
    "LoRA beside: r=8 on query and value, not merged; the paper has no such row",
)


@functools.cache
def model_of(tiny: bool) -> tuple[Any, Any]:
    """(model, random parameters)."""
    import jax
    import jax.numpy as jnp

    from lora_jax.pretrained.load import build_model

    model = build_model(TINY if tiny else GPT2_MEDIUM)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def measure(setting: tuple[int, int, float], rounds: int, tiny: bool, folder: Path, seed: int):
    """All cells of one batch and length."""
    from latency import cells

    import lora_jax as lj

    rows, length, millions = setting
    model, params = model_of(tiny)

    def adapter(kind: str) -> Any:
        method = lj.METHODS[kind](start="normal")
        return method.with_size(lj.match_budget(method, params, int(millions * 1e6)))

    methods = {
        "LoRA merged": (lj.LoRA(rank=8), True), "LoRA beside": (lj.LoRA(rank=8), False),
        "AdapterL": (adapter("adapter_l"), False), "AdapterH": (adapter("adapter_h"), False),
    }  # fmt: skip
    return cells(model, params, methods, rows, length, rounds=rounds, seed=seed)


def table(scale: str) -> Table:
    settings = {"paper": PAPER, "small": SMALL, "smoke": ((2, 8, 0.001),)}[scale]
    rounds = {"paper": 100, "small": 9, "smoke": 2}[scale]
    rows = []
    for setting in settings:
        function = functools.partial(measure, setting, rounds, scale == "smoke")
        for arm in ARMS:
            for unit, column in (("(ms)", "latency_ms"), ("overhead (%)", "overhead_pct")):
                if arm == "FT" and unit != "(ms)":
                    continue
                metric = f"{arm} {unit}"
                work = Computed(function, seeded=True, name="latency", metric=metric)
                shape = "two layers" if scale == "smoke" else "GPT-2 M"
                label = f"{shape}, {setting[0]} x {setting[1]}"
                rows.append(Row(label, metric, work, _published(setting, arm, column)))
    return Table(
        f"LoRA paper, Table 1 (latency of a forward pass), {scale}", tuple(rows),
        seeds=1 if scale == "smoke" else 3, notes=NOTES,
        cost="minutes on one GPU" if scale == "paper" else "about 30 minutes on 2 CPU cores",
    )  # fmt: skip


def _published(setting: tuple[int, int, float], arm: str, column: str) -> Published | None:
    """None where the paper has no such row; its merged LoRA has no overhead by definition."""
    if (arm, column) == ("LoRA merged", "overhead_pct"):
        return None
    if setting not in PAPER or arm not in PRINTED:
        return None
    where = {"method": PRINTED[arm], "batch_size": setting[0], "seq_len": setting[1]}
    return Published(PUBLISHED, where, column)
