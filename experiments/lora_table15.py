"""LoRA paper, Tables 4 and 15 and Figure 2: methods on GPT-3 175B, by size.

    lora-jax table experiments/lora_table15.py --scale paper --workdir runs/lora_table15

Counts are of our methods on GPT-3's shape; `paper` shows them all, `small` the sizes of Table 4,
`smoke` one. The accuracies need GPT-3's weights, which are not public: they stand as not run. What
a step would need: lora-jax plan configs/gpt3_175b.py --topology v5e:8x8
"""

import re

import missing
from given_folders import CONFIGS

from lora_jax.tables import Counted, NotRun, Published, Row, Table

CONFIG = str(CONFIGS / "gpt3_175b.py")
PUBLISHED = "lora_t15_gpt3_sweep"
WIDTH, LAYERS = 12288, 96
NAMES = {"q": "query", "k": "key", "v": "value", "o": "out"}
SIZES = {
    "Fine-Tune": ("-",),
    "PrefixEmbed": ("lp=32,li=8", "lp=64,li=8", "lp=128,li=8", "lp=256,li=8", "lp=512,li=8"),
    "PrefixLayer": ("lp=2,li=2", "lp=8,li=0", "lp=8,li=8", "lp=32,li=4", "lp=64,li=0"),
    "AdapterH": ("r=1", "r=4", "r=8", "r=16", "r=64"),
    "LoRA": ("rv=2", "rq=rv=1", "rq=rv=2", "rq=rk=rv=ro=1", "rq=rv=4", "rq=rk=rv=ro=2", "rq=rv=8",
             "rq=rk=rv=ro=4", "rq=rv=64", "rq=rk=rv=ro=64"),
    "LoRA+PE": ("rq=rv=8,lp=8,li=4", "rq=rv=32,lp=8,li=4", "rq=rv=64,lp=8,li=4"),
    "LoRA+PL": ("rq=rv=8,lp=8,li=4",),
}  # fmt: skip
KINDS = {
    "Fine-Tune": "full", "PrefixEmbed": "prefix_embedding", "PrefixLayer": "prefix_layer",
    "AdapterH": "adapter_h", "LoRA": "lora", "LoRA+PE": "lora_prefix_embedding",
    "LoRA+PL": "lora_prefix_layer",
}  # fmt: skip
TABLE4 = {
    ("Fine-Tune", "-"), ("PrefixEmbed", "lp=256,li=8"), ("PrefixLayer", "lp=8,li=8"),
    ("AdapterH", "r=1"), ("AdapterH", "r=8"), ("LoRA", "rv=2"), ("LoRA", "rq=rv=8"),
}  # fmt: skip
NOTES = {
    "PrefixLayer": "the paper's own formula, layers x width x (lp + li), does not give its count",
    "LoRA+PL": "the paper's own formula does not give its count",
    "Fine-Tune": "printed as 175B; Table 4 has 175,255.8M, the tree here 174,604M: the paper does "
    "not say which leaves the rest are",
}


def overrides(method: str, size: str) -> dict[str, object]:
    """The method of a row: `rq=rv=8` is rank 8 on query and value."""
    found: dict[str, object] = {"method.kind": KINDS[method]}
    if method == "AdapterH":
        found["method.size"] = int(size.removeprefix("r="))
    for name, field in (("lp", "prefix"), ("li", "infix")):
        if match := re.search(rf"{name}=(\d+)", size):
            found[f"method.{field}"] = int(match[1])
    if match := re.match(r"((?:r[qkvo]=)+)(\d+)", size):
        chosen = [NAMES[letter] for letter in re.findall(r"r([qkvo])=", match[1])]
        found["method.targets"] = f"attention/({'|'.join(chosen)})$"
        found["method.rank"] = int(match[2])
    return found


def formula(method: str, size: str) -> int | None:
    """The paper's: 2·L̂·d·r for LoRA, L̂·(2·d·r + r + d) for adapters, d·(lp + li) for prefixes."""
    o = overrides(method, size)
    special = int(o.get("method.prefix", 0)) + int(o.get("method.infix", 0))  # type: ignore[call-overload]
    total = WIDTH * special * (LAYERS if KINDS[method].endswith("layer") else 1)
    if "method.rank" in o:
        matrices = LAYERS * len(str(o["method.targets"]).split("|"))
        total += 2 * matrices * WIDTH * int(o["method.rank"])  # type: ignore[call-overload]
    if method == "AdapterH":
        r = int(size.removeprefix("r="))
        total = 2 * LAYERS * (2 * WIDTH * r + r + WIDTH)
    return total or None


def table(scale: str) -> Table:
    wanted = [
        (method, size) for method, sizes in SIZES.items() for size in sizes
        if scale == "paper" or (scale == "small" and (method, size) in TABLE4)
        or (method, size) == ("LoRA", "rq=rv=8")
    ]  # fmt: skip
    rows = []
    for method, size in wanted:
        name, where = f"GPT-3 {method} ({size})", {"method": method, "hyperparameters": size}
        notes = (NOTES[method],) if method in NOTES else ()
        rows.append(
            Row(name, "parameters (M)", Counted(CONFIG, overrides(method, size)),
                Published(PUBLISHED, where, "trainable_params"), formula(method, size), notes)
        )  # fmt: skip
        if scale != "smoke":
            for metric in ("WikiSQL_acc", "MNLI_m_acc"):
                work = NotRun(missing.GPT3)
                rows.append(Row(name, metric, work, Published(PUBLISHED, where, metric)))
    return Table("LoRA paper, Tables 4 and 15, Figure 2: GPT-3 175B", tuple(rows), seeds=1)
