"""Beyond the papers: does the intrinsic dimension of MNIST grow with the width of the network?

    lora-jax table experiments/beyond_width.py --scale small --workdir runs/beyond_width

Networks 784-w-w-10 from a random start; d_int90 as in experiments/li_table1.py, by Fastfood: the
smallest d with a test accuracy of 0.9. Li et al. 2018 found it nearly constant for fully connected
networks (their Figure 3); the figure shows d over all parameters, with intervals. `MNIST_DIR` names
a folder with TFDS's mnist. `small`: five widths; `paper`: a sixth, whose transforms take as long as
all others'. `smoke`: two narrow networks, a few updates.

Measured so (experiments/results/beyond_width_small.csv), from width 12 to 200: 1141 [1099, beyond
2000], 872 [774, 1009], 721 [568, 767], 711 [679, 716], 700 [613, 727]. From 50 on it is constant,
as theirs; a network of 9,706 parameters needs more, not fewer.
"""

from collections.abc import Sequence
from pathlib import Path

from given_folders import mnist
from li_table1 import SHORT

from lora_jax.sweeps import smallest
from lora_jax.sweeps.ladder import Ladder
from lora_jax.sweeps.smallest_plots import over
from lora_jax.tables import Row, Searched, Table
from lora_jax.tables.table import Filled

WIDTHS = {"smoke": (4, 8), "small": (12, 25, 50, 100, 200), "paper": (12, 25, 50, 100, 200, 400)}


def table(scale: str) -> Table:
    smoke = scale == "smoke"
    ladder = Ladder(20, 200, points=2, ratio=1e9) if smoke else Ladder(250, 2000, parts=5)
    rows = []
    for width in WIDTHS[scale]:
        overrides = {"model.shape.widths": (width, width), **(SHORT if smoke else {})}
        work = Searched(
            mnist(net="fc"), ladder, full=1.0,
            overrides=overrides,
            vary=("model.init_seed", "data.seed", "method.projection_seed"),
        )  # fmt: skip
        rows.append(Row(f"784-{width}-{width}-10", "d_int90", work))
    return Table(
        "Intrinsic dimension of MNIST over width", tuple(rows), seeds=1 if smoke else 3,
        cost="about 70 minutes on 2 CPU cores" if scale == "paper" else
             "about 36 minutes on 2 CPU cores", figures=_figures,
    )  # fmt: skip


def _figures(filled: Filled, folder: Path) -> Sequence[Path]:
    found = {}
    for line in filled.lines:
        if line.measured.place:
            width = int(line.row.row.split("-")[1])
            parameters = 785 * width + (width + 1) * width + (width + 1) * 10
            found[float(parameters)] = smallest.load(Path(line.measured.place))
    return [over(found, folder / "beyond_width.png", "parameters of the network")] if found else []
