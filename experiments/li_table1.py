"""Li et al. 2018, Table 1: the intrinsic dimension of MNIST.

    lora-jax table experiments/li_table1.py --scale small --workdir runs/li_table1
    lora-jax table experiments/li_table1.py --scale small --workdir runs/li_table1 --rows 'FC, fast'

d_int90: the smallest d at which training in a random subspace of d dimensions reaches an accuracy
of 0.9 on the test set, as published for MNIST; everything, the last layer too, lies in the
subspace. Beside it the d that reaches 0.9 of our own full training. Weights, subspace and order of
the data differ between seeds. `small`: ten values of d with Fastfood, five about the published d
with the other projections, 3 seeds; `paper`: a finer ladder for all, 5 seeds, and the dense
projection of the larger network; `smoke`: two values, on 120 images. `MNIST_DIR` names a folder
with TFDS's mnist, if it is not in the usual place.

Measured so (experiments/results/li_table1_small.csv): FC 702 [605, 756] by Fastfood and 701 [579,
816] by sparse projections, for 750; LeNet 276 [158, 307], 284 [207, 299] and 267 [227, 298] by
Fastfood, sparse and dense ones, for 290 (or 275). So the three kinds agree, and all are a little
below what is published: ours is where the fit meets 0.9, between the values that were run. LeNet's
runs were seldom converged at 2,000 updates. A search of 10 values and 3 seeds took 17 minutes.
"""

from collections.abc import Sequence
from pathlib import Path

from given_folders import mnist

from lora_jax.sweeps import smallest
from lora_jax.sweeps.ladder import Ladder
from lora_jax.sweeps.smallest_plots import compare
from lora_jax.tables import Baseline, NotRun, Published, Row, Searched, Table
from lora_jax.tables.table import Filled

# The name in the config, parameters, updates at most, the ladder's ends, and those of a short one.
NETS = {
    "FC": ("fc", 199_210, 4000, (250, 2000), (400, 1500)),
    "LeNet": ("lenet", 44_426, 2000, (100, 1000), (150, 600)),
}
PROJECTIONS = ("fastfood", "sparse", "dense")
SEEDED = ("model.init_seed", "data.seed")
OWN = "d90 of own baseline"
SHORT = {
    "training.steps": 20, "training.eval_every": 10, "data.source.split": "train[:120]",
    "data.validation": "test[:40]",
}  # fmt: skip
NOTES = (
    "The published threshold is an accuracy of 0.9, whatever full training reaches; the authors' "
    "notebook gives 525 for FC at 0.9 of its own baseline of 0.9758, and a bootstrap mean of 786 "
    "with a deviation of 66.",
    "The published d is the first of a grid whose run is enough; ours is where the monotone fit to "
    "the seeds' means meets 0.9, by one optimizer (Adam) and one constant learning rate for all d.",
    "Our thresholds depend on how long runs go on: near 0.9 accuracy still creeps up when a run "
    "ends, so runs of more updates give a smaller d.",
)


def table(scale: str) -> Table:
    return {"smoke": _smoke, "small": _small, "paper": _paper}[scale]()


def _search(net: str, projection: str, ladder: Ladder, *, own: bool, smoke: bool = False) -> Row:
    name, size, steps, *_ = NETS[net]
    overrides: dict[str, object] = {}
    if smoke:
        overrides = SHORT
    whole = {**overrides, "method.kind": "full", "optimizer.learning_rate": 1e-3}
    work = Searched(
        mnist(net=name, projection=projection, steps=steps), ladder,
        full=Baseline(whole, vary=SEEDED) if own else 1.0,
        overrides=overrides,
        vary=(*SEEDED, "method.projection_seed"),
    )  # fmt: skip
    published = Published("li_t1_dint90", {"problem": "MNIST", "D": size}, "d_int90")
    return Row(f"{net}, {projection}", OWN if own else "d_int90", work, None if own else published)


def _small() -> Table:
    rows = []
    for net, (*_, ends, near) in NETS.items():
        ladder = Ladder(*ends, points=6, parts=5)
        short = Ladder(*near, points=3, parts=3, ratio=1.3)
        for projection in PROJECTIONS:
            some = ladder if projection == "fastfood" else short
            rows.append(_search(net, projection, some, own=False))
        rows.append(_search(net, "fastfood", ladder, own=True))
    place = next(i for i, row in enumerate(rows) if row.row == "FC, dense")
    published = rows[place].published
    reason = "P is 199,210 x d numbers, read twice a step: about 3 hours on 2 cores; see `paper`"
    rows[place] = Row("FC, dense", "d_int90", NotRun(reason), published)
    return Table(
        "Li et al. 2018, Table 1 (MNIST), small", tuple(rows), seeds=3, notes=NOTES,
        cost="about 80 minutes on 2 CPU cores", figures=_figures,
    )  # fmt: skip


def _paper() -> Table:
    rows = []
    for net, (*_, ends, _near) in NETS.items():
        ladder = Ladder(*ends, points=10, parts=4, ratio=1.03)
        for projection in PROJECTIONS:
            rows += [_search(net, projection, ladder, own=own) for own in (False, True)]
    return Table(
        "Li et al. 2018, Table 1 (MNIST)", tuple(rows), seeds=5, notes=NOTES,
        cost="an hour on one GPU", figures=_figures,
    )  # fmt: skip


def _smoke() -> Table:
    rows = tuple(
        _search("FC", "fastfood", Ladder(20, 200, points=2, ratio=1e9), own=own, smoke=True)
        for own in (False, True)
    )
    return Table("Li et al. 2018, Table 1 (MNIST), smoke", rows, seeds=1, figures=_figures)


def _figures(filled: Filled, folder: Path) -> Sequence[Path]:
    """Accuracy over d, and the thresholds side by side, a figure for each network."""
    found = {
        line.row.row: smallest.load(Path(line.measured.place))
        for line in filled.lines
        if line.row.metric == "d_int90" and line.measured.place
    }
    return [
        compare(some, folder / f"li_table1_{net}.png", "test accuracy")
        for net in NETS
        if (some := {name: one for name, one in found.items() if name.startswith(net)})
    ]
