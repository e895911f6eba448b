"""Every method at one budget of trained parameters: CoLA, MiniLM-L6.

    lora-jax table experiments/methods_on_cola.py --scale small --workdir runs/methods_on_cola

`small`: 2,000 sentences of CoLA, three epochs of 250 updates (of 62, all that is learnt is the
majority class), each method at the size whose number of trained parameters is closest to that of
LoRA r=8 (`lora_jax.match_budget`; the new head trains whole in all, and counts), its learning rate
the better of two on seed 0, then 3 seeds, each after its last update; paired intervals against head
only and against LoRA. At the rates that prompts, prefixes of keys and values, VeRA and AdaLoRA
need, a head gets lost: beside them it keeps to its own. Methods that have no size stand at the one
they have. No paper prints this table. `GLUE_DIR` names a folder with TFDS's glue.
"""

from collections.abc import Mapping
from typing import Any

import minilm

from lora_jax import match_budget
from lora_jax.plan.sketch import Sketch
from lora_jax.sweeps import grid
from lora_jax.tables import Row, Table, Trained

# Learning rates by what is trained: products of factors, small vectors, activations, weights.
FACTORS, VECTORS, ACTIVATIONS, WEIGHTS = (5e-4, 1.5e-3), (2e-3, 8e-3), (2e-3, 6e-3), (3e-5, 1e-4)
METHODS: dict[str, minilm.Method] = {
    "LoRA": ("lora", {"rank": 8, "alpha": 8.0}, FACTORS),
    "head only": ("head_only", {}, (minilm.HEAD_RATE, 5e-3)),
    "full fine-tuning": ("full", {}, WEIGHTS),
    "BitFit": ("bitfit", {"train": ("(^|/)bias$", *minilm.HEAD)}, (1e-3, 4e-3)),
    "FT-Top1": ("ft_top", {"layers": 1}, (1e-4, 4e-4)),
    "Adapter H": ("adapter_h", {}, FACTORS),
    "Adapter L": ("adapter_l", {}, FACTORS),
    "Adapter P": ("adapter_p", {}, FACTORS),
    "AdapterDrop": ("adapter_d", {"drop": 3}, FACTORS),
    "PrefixEmbed": ("prefix_embedding", {"prefix": 20}, ACTIVATIONS),
    "PrefixLayer": ("prefix_layer", {}, ACTIVATIONS),
    "LoRA+PrefixEmbed": ("lora_prefix_embedding", {"prefix": 2}, FACTORS),
    "LoRA+PrefixLayer": ("lora_prefix_layer", {}, FACTORS),
    "Prefix-Tuning": ("prefix_tuning", {"hidden": 12}, (3e-3, 1e-2)),
    "Prompt Tuning": ("prompt_tuning", {"length": 20}, (2e-2, 1e-1)),
    "P-tuning v2": ("p_tuning_v2", {}, (1e-2, 3e-2)),
    "LoRA+": ("lora_plus", {}, (3e-4, 1e-3)),
    "DoRA": ("dora", {}, FACTORS),
    "PiSSA": ("pissa", {}, (1e-4, 4e-4)),
    "OLoRA": ("olora", {}, (1e-3, 3e-3)),
    "VeRA": ("vera", {"rank": 256}, minilm.VERA_RATES),
    "IA3": ("ia3", {}, VECTORS),
    "LoHa": ("loha", {}, FACTORS),
    "LoKr": ("lokr", {}, FACTORS),
    "AdaLoRA": ("adalora", {"target_rank": 5}, minilm.ADALORA_RATES),
    "LoRA-FA": ("lora_fa", {}, FACTORS),
    "LoRA-XS": ("lora_xs", {}, FACTORS),
    "EVA": ("eva", {}, FACTORS),
    "LoRA-GA": ("lora_ga", {}, FACTORS),
    "ReLoRA": ("relora", {"every": 250, "warmup": 10}, FACTORS),
    "GaLore": ("galore", {"train": (".*",), "rank": 32, "every": 50}, (1e-4, 4e-4)),
    "subspace": ("subspace", {"targets": "^layers/"}, (1e-3, 5e-3)),
}
COLUMN = "CoLA"
EXAMPLES, EPOCHS, BATCH = 2000, 3, 8
# Half of the sentences have at most 11 tokens, the longest 40.
LENGTH, BUCKETS = 48, (12, 16, 24)
# Sizes that stand above. VeRA would need a rank many times its matrices' sides; the prompts 192
# tokens, at ten times the time of a step (Lester et al. 2021, 3.2: little is gained beyond 20).
FIXED = ("LoRA", "FT-Top1", "VeRA", "PrefixEmbed", "Prompt Tuning")
NOTE = (
    "trained parameters: as many as LoRA r=8 has, head included, as nearly as a method's size "
    "allows; full fine-tuning, GaLore, FT-Top1, BitFit, IA3, VeRA and head only have what they "
    "have, Prompt Tuning and PrefixEmbed 20 tokens: the 192 of the budget take ten times as long"
)


def table(scale: str) -> Table:
    names = ["LoRA", "Prompt Tuning"] if scale == "smoke" else list(METHODS)
    others = [name for name in names if name not in ("LoRA", "head only")]
    return Table(
        f"Every method at one budget, MiniLM-L6 on 2,000 sentences of CoLA, {scale}",
        tuple(_row(name, scale) for name in names), seeds=minilm.seeds(scale),
        claims=minilm.claims(
            scale, ("LoRA", "head only"), *((name, "head only") for name in others),
            *((name, "LoRA") for name in others), column=COLUMN,
        ),
        notes=(NOTE,), cost="about 4 hours on 2 CPU cores",
    )  # fmt: skip


def _row(name: str, scale: str) -> Row:
    kind, fields, rates = METHODS[name]
    method = (kind, _at_budget(name, kind, fields, rates), rates)
    return Row(f"MiniLM-L6 {name}", COLUMN, _work(method, scale))


def _work(method: minilm.Method, scale: str) -> Trained:
    return minilm.trained(
        method, scale, task="cola", examples=EXAMPLES, epochs=EPOCHS, batch=BATCH,
        length=LENGTH,
        more={"data.buckets": BUCKETS, "training.eval_every": 0, "training.keep": "last"},
    )  # fmt: skip


def _bench(method: minilm.Method) -> Sketch:
    work = _work(method, "small")
    return Sketch(grid.configured(work.config, {**work.overrides, "model.shape": minilm.SHAPE}))


def _at_budget(name: str, kind: str, fields: Mapping[str, Any], rates: Any) -> Mapping[str, Any]:
    """The fields, with the size that has LoRA's number of parameters and alpha = rank."""
    bench = _bench((kind, fields, rates))
    method = bench.experiment.method
    if name in FIXED or method.size_field is None:
        return fields
    reference = _bench(METHODS["LoRA"])
    wanted = reference.experiment.method.count(reference.params).total
    size = match_budget(method, bench.params, wanted)
    scaled = {"alpha": float(size)} if hasattr(method, "alpha") else {}
    return {**fields, method.size_field: size, **scaled}
