"""LoRA paper, Table 7, Figures 3, 4, 6, 7 and 8: what ΔW is beside W, and across ranks and seeds.

    lora-jax table experiments/lora_table7.py --scale small --workdir runs/lora_table7

The paper looks at query and value of GPT-3, whose weights are not public. `small`: SmolLM2-135M
(extra `quickstart`) learns to pronounce for 40 steps, at ranks 4, 8 and 64, with a second seed of
the last. Cells are of the middle layer, as the paper's. The figures, of four layers from the first
to the last and of seed 0, are PNGs in `SCALE/figures` of the workdir. `smoke`: a step of a row, and
the middle layer alone.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import missing
from given_folders import CONFIGS

from lora_jax.tables import Computed, NotRun, Published, Row, Table

CONFIG = str(CONFIGS / "quickstart.py")
SHORT = {"evaluation.base_shots": (), "data.validation": "validation[:16]",
         "training.save_every": 0, "evaluation.show": 0}  # fmt: skip
# On a busy machine it takes minutes to decode 16 words, and likewise to decompose all layers.
SMOKE = {**SHORT, "data.source.split": "train[:64]", "data.validation": "validation[:1]",
         "data.batch_size": 1, "evaluation.max_new_tokens": 1,
         "evaluation.batch_size": 1, "evaluation.spectra": 0}  # fmt: skip
STEPS = {"small": 40, "smoke": 1}
MODULES = {"Wq": "attention/query", "Wv": "attention/value"}
SECOND = 100  # added to a seed: of the run that is compared with it
RANDOM = "on average of random directions"
NOTES = (
    "published: the 48th of GPT-3's 96 layers; another model's norms are of another size, and only "
    "their order and the amplification can be compared",
    "U and V: the first r directions of ΔW, of W, or random ones; A's directions (right singular "
    "vectors in the paper's notation) are compared by φ, its eq. 4",
    "ranks are compared across seeds: a start of rank 8 is here the first columns of the rank-64 "
    "start of its seed",
    "the paper's appendix prints (1/p)(1 - d²); what its text describes is 1 - d²/p, which φ is",
    "no φ is printed in the paper, only heat maps",
)


def runs_of(scale: str, folder: Path, seed: int) -> dict[tuple[int, int], Path]:
    """Workdirs by (rank, seed): of ranks 4, 8 and 64, and of rank 64 a second; trained if missing.

    All are members of one packed program.
    """
    from lora_jax.experiment import to_dict
    from lora_jax.sweeps import grid
    from lora_jax.sweeps.sweep import Options, Sweep

    smoke, steps = scale == "smoke", STEPS[scale]
    wanted = [(4, seed), (8, seed), (64, seed), (64, seed + SECOND)]
    if smoke:
        wanted.remove((64, seed))  # none of its rows asks for it
    short = {
        **(SMOKE if smoke else SHORT), "training.steps": steps,
        "optimizer.warmup_steps": steps // 15, "method.targets": "attention/(query|value)$",
    }  # fmt: skip
    base = to_dict(grid.configured(CONFIG, short))
    overrides = [
        {"method.rank": r, "method.alpha": 2.0 * r, "seed": s, "data.seed": s,
         "training.dropout_seed": s} for r, s in wanted
    ]  # fmt: skip
    # A probe of what is faster takes longer than a step.
    options = Options(mode="packed" if smoke else "auto")
    sweep = Sweep(base, {"runs": overrides}, folder / f"seed{seed}", options, progress=False)
    if sweep.waiting:
        sweep.run()
    return {key: sweep.folder / m.name for key, m in zip(wanted, sweep.grid, strict=True)}


def middle(found: list[Any]) -> list[Any]:
    """The updates of the middle layer."""
    layers = sorted({x.layer for x in found})
    return [x for x in found if x.layer == layers[len(layers) // 2]]


def opened(scale: str, run: Path, modules: str | None = None) -> list[Any]:
    """The updates of a run; at smoke scale the middle layer's alone: a layer takes a second or more
    where others use the cores too."""
    from lora_jax import inside

    found = inside.open_updates(run, modules=modules)
    return middle(found) if scale == "smoke" else found


def beside_weights(scale: str, rank: int, folder: Path, seed: int) -> Mapping[str, Any]:
    """Table 7 of one rank: norms of Wq and ΔWq, and of Wq projected, in the middle layer."""
    from lora_jax import inside

    run = runs_of(scale, folder.parent / "runs", seed)[rank, seed]
    every = inside.matrices(opened(scale, run, MODULES["Wq"]))
    (one,) = middle(list(every.itertuples()))
    return {
        "of ΔWq": {"value": one.w_along_delta}, "of Wq": {"value": one.w_along_w},
        "of random": {"value": one.w_along_random}, "‖Wq‖": {"value": one.norm_w},
        "‖ΔWq‖": {"value": one.norm}, "amplification": {"value": one.amplification},
        "amplification, median of layers": {"value": float(every["amplification"].median())},
    }  # fmt: skip


def across(scale: str, one: int, other: int, folder: Path, seed: int) -> Mapping[str, Any]:
    """Figures 3 (ranks) and 4 (seeds): φ of the first direction of both, and of all, by module."""
    from lora_jax import inside

    runs = runs_of(scale, folder.parent / "runs", seed)
    mine = opened(scale, runs[one, seed])
    theirs = opened(scale, runs[other, seed + SECOND])
    if seed == 0:
        draw(folder.parent / "figures", one, mine, theirs)
    frame = inside.compare(middle(mine), middle(theirs))
    cells = {}
    for name, module in MODULES.items():
        (row,) = frame[frame["module"] == module].to_dict("records")
        cells |= {
            f"{name}: φ(1, 1)": {"value": row["a_first"]},
            f"{name}: φ({one}, {other})": {"value": row["a_all"]},
            f"{name}: φ({one}, {other}) {RANDOM}": {"value": row["a_random"]},
        }
    return cells


def draw(folder: Path, one: int, mine: list[Any], theirs: list[Any]) -> None:
    """Heat maps of φ(i, j), a Gaussian baseline at the right, and of ΔW beside W (Figure 8)."""
    from lora_jax.inside import comparing, plots

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {x.module: x.shape[0] for x in mine}
    names = (f"i of r={one}", "j of r=64, another seed")
    found = comparing.similarity(mine, theirs)
    plots.similarities(found, sizes, names=names).savefig(folder / f"rank{one}_rank64.png", dpi=120)
    if one == 64:
        shown = set(plots.some_layers(x.layer for x in mine))
        found = comparing.similarity_to_base([x for x in mine if x.layer in shown])
        figure = plots.similarities(found, sizes, names=("i of W", "j of ΔW, r=64"))
        figure.savefig(folder / "base_rank64.png", dpi=120)


def table(scale: str) -> Table:
    rows = []
    for rank in (4, 64):
        name = f"Table 7: ‖UᵀWqVᵀ‖, r={rank}"
        for metric, column, of in (
            ("of ΔWq", "fro_UtWqVt", "dWq"), ("of Wq", "fro_UtWqVt", "Wq"),
            ("of random", "fro_UtWqVt", "Random"), ("‖Wq‖", "fro_Wq", "dWq"),
            ("‖ΔWq‖", "fro_dWq", "dWq"), ("amplification", "", ""),
            ("amplification, median of layers", "", ""),
        ):  # fmt: skip
            where = {"r": rank, "U_V_from": of}
            published = Published("lora_t07_frobenius", where, column) if column else None
            function = functools.partial(beside_weights, scale, rank)
            rows.append(Row(name, metric, _work(scale, function, metric), published))
    for one, what in ((8, "Figure 3: r=8 and r=64"), (64, "Figure 4: two seeds, r=64")):
        function = functools.partial(across, scale, one, 64)
        for module in MODULES:
            for phi in ("φ(1, 1)", f"φ({one}, 64)", f"φ({one}, 64) {RANDOM}"):
                metric = f"{module}: {phi}"
                rows.append(Row(what, metric, _work(scale, function, metric)))
    if scale == "smoke":
        rows = [x for x in rows if x.row.startswith(("Table 7: ‖UᵀWqVᵀ‖, r=4", "Figure 3"))]
    return Table(
        f"LoRA paper, Table 7 and Figures 3, 4, 6 to 8, {scale}", tuple(rows),
        seeds=1 if scale == "smoke" else 3, notes=NOTES,
        cost="about 25 minutes on 2 CPU cores",
    )  # fmt: skip


def _work(scale: str, function: Any, metric: str) -> Computed | NotRun:
    if scale == "paper":
        return NotRun(missing.GPT3)
    return Computed(function, seeded=True, name="analysis", metric=metric)
