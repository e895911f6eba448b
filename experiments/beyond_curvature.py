"""Beyond the papers: does the curvature that LoRA's factors see tell the best learning rate?

    lora-jax table experiments/beyond_curvature.py --scale small --workdir runs/curvature

Gradient descent is stable along an eigenvector of the Hessian only at rates below 2/λ, so 1/λ_max
might foretell the best rate. Here λ_max is that of the Hessian in the coordinates that train (A, B
and what else), on a few batches, by Lanczos (`lora_jax.analysis.curvature`): at the start, and
after some steps of SGD at a tenth of 1/λ_max, since at B = 0 there is no curvature along A and what
couples A and B is the first gradient alone. Beside it the best rate of arms that differ in rank,
scale (alpha / rank) and targets, of a packed sweep over rates half a decade apart, for SGD, of
which the theory is, and for Adam, which divides by its own estimate of the gradient's size.
Spearman's correlation over the arms says how it falls; the lines in the figure are rates of 1/λ and
2/λ. "Relative" columns are of Lanczos's errors: the residual, and a bound from its random start.

`small`: a fully connected network on MNIST from a random start, 12 arms, 3 seeds, 504 members of
300 updates: about 15 minutes on 2 CPU cores; the same command goes on where it was. `paper`: LeNet
and MiniLM-L6 on SST-2 (extra `minilm`) too, 5 seeds, for a GPU. `smoke`: four arms on 120 images.
`MNIST_DIR` and `GLUE_DIR` name folders with TFDS's mnist and glue.

Measured so (experiments/results/beyond_curvature_small.csv), ρ over the 12 arms: for SGD 0.51
[-0.13, 0.85] at the start, which decides nothing, and 0.62 [0.01, 0.89] after 100 steps; for Adam
0.85 [0.45, 0.96] and 0.86 [0.48, 0.97]. So curvature foretells the order of Adam's best rates, of
which the theory is not; SGD's intervals hold 0, or nearly. Its size foretells less: 1/λ is some 1.3
or 0.3 at the start, by the scale alone, and 0.02 to 0.15 later; SGD's best rates, 0.03 to 0.32, lie
between. Reached by 20 steps at half of 1/λ, the second place gave 0.67 [0.04, 0.92] for SGD and
0.70 [0.09, 0.93] for Adam over 11 arms; the arm of the highest rank, scale and number of targets
diverged on the way. 20 steps at a tenth of it hardly left the start.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import best_rates as best
import jax
import pandas as pd
from given_folders import glue
from given_folders import mnist as mnist_config

from lora_jax import analysis, runs, training
from lora_jax.errors import UserError
from lora_jax.experiment import to_dict
from lora_jax.sweeps import grid, report
from lora_jax.sweeps.sweep import Options, Sweep
from lora_jax.tables import Computed, Row, Table
from lora_jax.tables.related import Correlated, scatter
from lora_jax.tables.table import Filled
from lora_jax.tables.work import Measured
from lora_jax.workbench import Workbench

START, LATER = "1/λ at the start", "1/λ after some steps"
RESIDUAL, BOUND = "relative residual, the greater", "relative upper bound, the greater"
RATE = "optimizer.learning_rate"
HEAD = ("^head/",)


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """A model and task with its arms; equal to itself alone.

    Attributes:
      arms: overrides by name.
      rates: by optimizer.
      vary: what a seed sets besides `seed`.
      batches: that the loss is a mean of, for its curvature.
      later: steps between the two places.
      share: rate of these steps, in units of 1/λ at the start.
      products: of Lanczos, at least (so that its bound says something) and at most.
    """

    name: str
    config: str
    overrides: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    rates: Mapping[str, Sequence[float]]
    vary: Sequence[str]
    batches: int = 4
    later: int = 100
    share: float = 0.1
    products: tuple[int, int] = (40, 80)

    def seeds(self, seed: int) -> dict[str, int]:
        return dict.fromkeys(("seed", *self.vary), seed)

    def rows(self) -> list[Row]:
        found, related = [], []
        best_of: dict[str, list[Row]] = {name: [] for name in self.rates}
        places: dict[str, list[Row]] = {START: [], LATER: []}
        for arm in self.arms:
            label = f"{self.name}, {arm}"
            look = Computed(functools.partial(look_at, self, arm), True, "curvature")
            measured = {
                metric: Row(label, metric, dataclasses.replace(look, metric=metric))
                for metric in (START, LATER, RESIDUAL, BOUND)
            }
            rates = {name: Row(label, f"best rate, {name}", BestRate(self, name, arm))
                     for name in self.rates}  # fmt: skip
            found += [*rates.values(), *measured.values()]
            for name, row in rates.items():
                best_of[name].append(row)
            for place, rows in places.items():
                rows.append(measured[place])
        for (name, ys), (place, xs) in itertools.product(best_of.items(), places.items()):
            work = Correlated(list(zip(xs, ys, strict=True)))
            related.append(Row(f"{self.name}: rank correlation", f"{place}, {name}", work))
        return found + related


@dataclasses.dataclass(frozen=True)
class BestRate:
    """The best rate of an arm by seed, from one sweep over all arms of its setting."""

    setting: Setting
    optimizer: str
    arm: str

    def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
        place = folder.parent / f"sweep_{self.setting.name}_{self.optimizer}".replace(" ", "_")
        frame = swept(self.setting, self.optimizer, place, tuple(seeds))
        own = frame[frame["arm"] == self.arm]
        if best.curves(frame, self.arm).empty:
            return Measured({}, reason="at every rate some seed diverged")
        found = {seed: 10.0**x for seed, x in best.best_rates(frame, self.arm).items()}
        end = ("best at an end of the grid of rates, so only a bound",)
        notes = end if best.at_an_end(frame, self.arm) else ()
        return Measured(
            found, int(own["trainable_params"].dropna().iloc[0]), place=str(place), notes=notes
        )


@functools.cache  # every row of the setting reads it
def swept(setting: Setting, optimizer: str, place: Path, seeds: tuple[int, ...]) -> pd.DataFrame:
    """A row a member (arm, rate, seed, value: NaN where it diverged); runs what is missing."""
    base = grid.configured(setting.config, {**setting.overrides, "optimizer.name": optimizer})
    arms = [(name, rate) for name in setting.arms for rate in setting.rates[optimizer]]
    tried = [{**setting.arms[name], RATE: rate} for name, rate in arms]
    sweeps = {"arm": tried, "seed": [setting.seeds(seed) for seed in seeds]}
    sweep = Sweep(to_dict(base), sweeps, place, Options(), progress=False)
    if sweep.waiting:
        sweep.run()
    found = report.table(sweep.members, sweep.folder).set_index("member")
    rows = []
    wanted = itertools.product(arms, seeds)
    for ((name, rate), seed), member in zip(wanted, sweep.grid, strict=True):
        row = found.loc[member.name]
        value = row[sweep.task.principal] if row["status"] == "finished" else math.nan
        rows.append({"arm": name, "rate": rate, "seed": seed, "value": value,
                     "trainable_params": row["trainable_params"]})  # fmt: skip
    return pd.DataFrame(rows)


def look_at(setting: Setting, arm: str, folder: Path, seed: int) -> dict[str, Any]:
    """1/λ_max at both places, and Lanczos's errors over λ_max, the greater of both."""
    overrides = {**setting.overrides, **setting.arms[arm], **setting.seeds(seed)}
    experiment = grid.configured(setting.config, {**overrides, "optimizer.name": "sgd"})
    bench = Workbench(experiment)
    stream = bench.batches(experiment.data.seed)
    batches = [next(stream) for _ in range(setting.batches)]
    begun = runs.begin(bench, experiment)

    def loss(trainable: Any, frozen: Any, numbers: Any, batch: Any) -> jax.Array:
        total, weight = bench.loss(begun.method.combine(frozen, trainable, numbers=numbers), batch)
        return total / weight

    @jax.jit
    def added(total: Any, *args: Any) -> Any:
        product = analysis.hessian_product(loss)(*args)
        return jax.tree.map(lambda x, y: x + y / len(batches), total, product)

    def top(state: training.State) -> analysis.Top:
        def mean(v: Any) -> Any:
            total = zero
            for batch in batches:
                total = added(total, state.trainable, v, begun.frozen, state.numbers, batch)
            return total

        start = analysis.random_direction(jax.random.key(seed), state.trainable)
        found = analysis.top_eigenvalue(mean, start, least=least, steps=most)
        if found.value <= 0:
            raise UserError(
                f"{arm}: the Hessian has no positive eigenvalue, and no rate is too large"
            )
        return found

    least, most = setting.products
    zero = jax.tree.map(jax.numpy.zeros_like, begun.state.trainable)
    first = top(begun.state)
    small = dataclasses.replace(experiment.optimizer, learning_rate=setting.share / first.value)
    again = runs.begin(bench, dataclasses.replace(experiment, optimizer=small))
    step, state = training.make_step(bench.loss, again.method, again.tx), again.state
    for _ in range(setting.later):
        state, _ = step(again.frozen, state, next(stream))
    second = top(state)
    return {
        START: {"value": 1.0 / first.value},
        LATER: {"value": 1.0 / second.value},
        RESIDUAL: {"value": max(x.residual / x.value for x in (first, second))},
        BOUND: {"value": max(x.upper / x.value - 1.0 for x in (first, second))},
        "converged": [x.converged for x in (first, second)],
        "products": [x.steps for x in (first, second)],
        "least over greatest": [x.least / x.value for x in (first, second)],
    }


# Settings.


def lora(
    ranks: Sequence[int], scales: Sequence[float], targets: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Arms: every rank, scale (alpha / rank) and target."""
    return {
        f"{name}, r={rank}, s={scale:g}": {
            "method.rank": rank, "method.alpha": scale * rank, "method.targets": pattern,
        }
        for (name, pattern), scale, rank in itertools.product(targets.items(), scales, ranks)
    }  # fmt: skip


def mnist(net: str, scale: str) -> Setting:
    overrides = {
        "method.kind": "lora", "training.steps": 300, "training.eval_every": 0,
        "training.patience": 0, "training.keep": "last", "evaluation.spectra": 0,
    }  # fmt: skip
    targets = {"first layer": r"(hidden|conv)_0$", "all layers": r"((hidden|conv)_\d|head)$"}
    arms = lora((1, 4, 16), (1.0, 4.0), targets)
    tried = {"sgd": best.rates(-3.0, 0.5), "adam": best.rates(-4.0, -1.5)}
    further: dict[str, int] = {}
    if scale == "smoke":
        overrides |= {
            "training.steps": 30, "model.shape.widths": (12, 12), "data.batch_size": 20,
            "data.source.split": "train[:120]", "data.validation": "test[:40]",
        }  # fmt: skip
        arms = lora((1, 4), (1.0,), targets)
        tried = {"sgd": best.rates(-1.0, 0.0)}
        further = {"batches": 2, "later": 3}
    spec = mnist_config(net=net, dimension=0)
    name = "MNIST, LeNet" if net == "lenet" else "MNIST, fully connected"
    return Setting(
        name, spec, overrides, arms, tried,
        ("model.init_seed", "data.seed"), **further,
    )  # fmt: skip


def minilm() -> Setting:
    overrides = {
        "method.kind": "lora", "method.train": HEAD, "training.steps": 500,
        "training.eval_every": 0, "training.keep": "last", "optimizer.schedule": "constant",
        "optimizer.weight_decay": 0.0, "evaluation.spectra": 0,
    }  # fmt: skip
    targets = {"query and value": "attention/(query|value)$", "all layers": "all-linear"}
    return Setting(
        "SST-2, MiniLM-L6", glue(task="sst2", batch=32), overrides,
        lora((1, 8, 64), (0.25, 2.0), targets),
        {"sgd": best.rates(-3.0, 1.0), "adam": best.rates(-4.5, -2.0)},
        ("data.seed", "training.dropout_seed"), batches=16,
    )  # fmt: skip


def table(scale: str) -> Table:
    settings = [mnist("fc", scale)]
    if scale == "paper":
        settings += [mnist("lenet", scale), minilm()]
    return Table(
        f"Curvature in adapter coordinates and the best learning rate, {scale}",
        tuple(row for setting in settings for row in setting.rows()),
        seeds={"smoke": 1, "small": 3, "paper": 5}[scale], figures=_figures,
        cost="hours on one GPU" if scale == "paper" else "about 15 minutes on 2 CPU cores",
    )  # fmt: skip


def _figures(filled: Filled, folder: Path) -> Sequence[Path]:
    return scatter(filled, folder / "beyond_curvature.png", multiples=(1.0, 2.0))
