"""Aghajanyan et al. 2020, Table 1: the intrinsic dimension of fine-tuning a language model.

    lora-jax table experiments/aghajanyan_table1.py --scale small --workdir runs/agh
    lora-jax table experiments/aghajanyan_table1.py --scale small --workdir runs/agh --rows SAID

d90 is the smallest d that reaches 0.9 of full fine-tuning's metric, as published. Raw accuracy is
degenerate where chance is high, so there is also the d that reaches 0.9 of the *gain* of full
fine-tuning over the head alone, and r90, LoRA's rank, by the same. The head lies in the subspace
and is none of the d; LoRA's head trains whole beside its factors, and counts in its parameters.

`paper`: RoBERTa base and large on MRPC and QQP, for a GPU and the hub. `small`: MiniLM-L6 (extra
`minilm`) on 1,000 sentences of SST-2, pretrained, and by SAID the same shape with random weights;
embeddings are left out of the subspace there, and the four values of d stand far apart: most of an
update is Fastfood's transforms. `GLUE_DIR` names a folder with TFDS's glue, if it is not in the
usual place. `smoke`: a few steps.

Measured so, `small`, 2 seeds: d90 = 161 [96, 795] by SAID and 215 [97, inf] by DID for the
pretrained model; from random weights no d up to 10,000 reaches it: all runs stay at the majority
class, where full fine-tuning reaches 0.69, which says more of the optimisation than of the
dimension. Of the gain over the head alone, 1,194 [163, inf] and 3,156 [164, inf]: the head alone
has 0.70 there, full fine-tuning 0.80. LoRA of rank 1 gains as much, 0.789 in the mean, but one of
its two runs does not: r90 < 1 [0, inf]. The best rate of SAID is the greatest of its three.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from given_folders import CONFIGS, glue

from lora_jax.sweeps import smallest
from lora_jax.sweeps.ladder import Ladder
from lora_jax.sweeps.smallest_plots import compare
from lora_jax.tables import Baseline, Published, Row, Searched, Table
from lora_jax.tables.table import Filled

CONFIG = CONFIGS / "aghajanyan.py"
RATES = {
    "did": (1e-3, 3e-3, 1e-2), "said": (1e-3, 3e-3, 1e-2), "lora": (1e-3, 4e-3),
    "full": (5e-5, 2e-4), "head": (2e-3, 1e-2),
}  # fmt: skip
SEEDED = ("data.seed", "model.head_seed")
METRICS = {"CoLA": "matthews", "SST-2": "accuracy", "MRPC": "accuracy", "QQP": "accuracy"}
NOTES = (
    "Published numbers are of d90, and of other models than MiniLM-L6. Here a d is met by the mean "
    "of its runs over seeds, each at its best epoch.",
)


def table(scale: str) -> Table:
    return {"smoke": _smoke, "small": _small, "paper": _paper}[scale]()


def _rates(method: str) -> list[dict[str, Any]]:
    return [{"optimizer.learning_rate": rate} for rate in RATES[method]]


def _search(
    method: str,
    task: str,
    ladder: Ladder,
    *,
    gain: bool,
    random: bool = False,
    short: Mapping[str, Any] = MappingProxyType({}),
    **arg: object,
) -> Searched:
    """Of d, or of LoRA's rank; `short` overrides the runs of the search and of its baselines."""
    seeded = (*SEEDED, "model.init_seed") if random else SEEDED

    def config(method: str) -> str:
        own = {"method": method, "task": task.lower().replace("-", ""), "random": random}
        return glue(CONFIG, **own, **arg)

    def baseline(name: str) -> Baseline:
        return Baseline(short, _rates(name), seeded, config(name))

    of_rank = method == "lora"
    return Searched(
        config(method), ladder,
        full=baseline("full"),
        head_only=baseline("head") if gain else None,
        overrides={**short, "method.alpha": 8.0} if of_rank else short,
        size="method.rank" if of_rank else "method.dimension",
        name="r90" if of_rank else "d90",
        metric=METRICS[task],
        vary=seeded if of_rank else (*seeded, "method.projection_seed"),
        grid=_rates(method),
        diverged=0.0,
    )  # fmt: skip


def _small() -> Table:
    rows = []
    arg: dict[str, Any] = {"model": "minilm-l6", "examples": 1000, "epochs": 6, "patience": 2,
                           "embeddings": False}  # fmt: skip
    subspace = Ladder(30, 10_000, points=4, ratio=7.0)
    for start, method in (("pretrained", "said"), ("pretrained", "did"), ("random", "said")):
        for gain in (False, True):
            work = _search(method, "SST-2", subspace, gain=gain, random=start == "random", **arg)
            rows.append(Row(f"{start} {method.upper()}, SST-2", _metric(gain), work))
    lora = _search("lora", "SST-2", Ladder(1, 16, points=3, ratio=5.0), gain=True, **arg)
    rows.append(Row("pretrained LoRA, SST-2", "r90 of the gain", lora))
    return Table(
        "Aghajanyan et al. 2020, Table 1, small: MiniLM-L6", tuple(rows), seeds=2, notes=NOTES,
        cost="about 2 hours on 2 CPU cores", figures=_figures,
    )  # fmt: skip


def _metric(gain: bool) -> str:
    return "d90 of the gain" if gain else "d90"


def _paper() -> Table:
    rows = []
    for model, name in (("roberta-base", "RoBERTa-Base"), ("roberta-large", "RoBERTa-Large")):
        for task in ("MRPC", "QQP"):
            for method in ("said", "did"):
                ladder = Ladder(100, 10_000, points=7, parts=4)
                cited = Published("agh_t1_d90", {"model": name}, f"{method.upper()}_{task}")
                for gain in (False, True):
                    work = _search(method, task, ladder, gain=gain, model=f"FacebookAI/{model}")
                    row = f"{name} {method.upper()}, {task}"
                    rows.append(Row(row, _metric(gain), work, None if gain else cited))
    return Table(
        "Aghajanyan et al. 2020, Table 1", tuple(rows), seeds=3, notes=NOTES,
        cost="weeks on one GPU, most of it QQP", figures=_figures,
    )  # fmt: skip


def _smoke() -> Table:
    short = {"training.steps": 2, "training.eval_every": 1, "data.source.split": "train[:64]",
             "data.validation": "validation[:32]"}  # fmt: skip
    work = _search("said", "CoLA", Ladder(50, 100, points=2, ratio=9.0), gain=False,
                   short=short, model="minilm-l6", embeddings=False)  # fmt: skip
    row = Row("pretrained SAID, CoLA", "d90", work)
    return Table("Aghajanyan et al. 2020, Table 1, smoke", (row,), seeds=1, figures=_figures)


def _figures(filled: Filled, folder: Path) -> Sequence[Path]:
    """d90 and r90 side by side, a figure for each task and target."""
    paths = []
    for task, metric in METRICS.items():
        for gain in (False, True):
            found = {
                line.row.row.partition(",")[0]: smallest.load(Path(line.measured.place))
                for line in filled.lines
                if line.measured.place
                and line.row.row.endswith(task)
                and line.row.metric.endswith("gain") == gain
            }
            if found:
                name = f"aghajanyan_{task}{'_gain' if gain else ''}.png"
                paths.append(compare(found, folder / name, metric))
    return paths
