"""Beyond the papers: do the first gradients tell, before any training, which rank will do?

    lora-jax table experiments/beyond_gradients.py --scale small --workdir runs/gradients

For each case (task, model, targets): r90, the smallest rank of LoRA on these targets that reaches
90 % of the gain over the head alone that the search's largest rank gives; and, at the start, ranks
of the gradient of the targets' weights under full fine-tuning, averaged over the first batches of
the training data. Several notions of rank are tried, since none is the obvious one: stable, entropy
and effective rank, the rank of 90 % of the energy, and the number of directions above the noise
between batches (`lora_jax.analysis.gradients`). A case's is the mean over its matrices and seeds.
Below, Spearman's correlation of each with r90 over the cases, whichever way it falls; figures: the
points, and the energy curves beside those of the noise.

Cases differ in their matrices' sizes too, which bound all of these ranks. All ranks of a case share
one alpha and one learning rate, where the best rate hardly depends on the rank.

The target was changed twice after a look: 90 % of the gain of training all matrices lay beyond what
LoRA on one of them reached at any rank in 8 of 10 cases; of training that one matrix whole, in 5 of
8: with one alpha a higher rank has smaller steps, and 300 updates end before it catches up. And on
CoLA an epoch of 4,000 sentences gave full fine-tuning nothing: CoLA is left to `paper`, and MNIST
got more networks.

Measured so, `small`, 3 seeds, 15 cases: none of the six foretells r90. Spearman's ρ lies between
−0.54 [−0.84, 0.00] (rank of 90 % energy) and 0.51 [−0.04, 0.82] (directions above noise), and every
interval holds 0. What there is of an order points the other way for five of the six: by effective
rank and by the rank of 90 % energy MiniLM's gradients spread over more directions than those of the
networks from a random start, and there rank 1 is already enough; above the noise they have fewer.

`small`: fully connected networks and LeNet on MNIST from a random start, MiniLM-L6 (extra
`minilm`) on SST-2; the same command goes on where it was. `paper`: more targets, five
tasks, a finer search, for a GPU. `smoke`: four cases on 120 images. `MNIST_DIR` and `GLUE_DIR` name
folders with TFDS's mnist and glue.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from given_folders import glue
from given_folders import mnist as mnist_config

from lora_jax import analysis, partition
from lora_jax.methods.offset import matrices
from lora_jax.sweeps import grid
from lora_jax.sweeps.ladder import Ladder
from lora_jax.tables import Baseline, Computed, Row, Searched, Table
from lora_jax.tables.related import Correlated, scatter
from lora_jax.tables.table import Filled
from lora_jax.workbench import Workbench

R90 = "r90"
RANKS = {
    "stable rank": lambda found: analysis.stable_rank(found.mean),
    "entropy rank": lambda found: analysis.entropy_rank(found.mean),
    "effective rank": lambda found: analysis.effective_rank(found.mean),
    "rank of 90 % energy": lambda found: analysis.rank_of_energy(found.mean),
    "entropy rank of all batches": lambda found: analysis.entropy_rank(found.stacked),
    "directions above noise": analysis.rank_above_noise,
}
NOISE = "noise's share of energy"
TARGETS, SIZE, RATE = "method.targets", "method.rank", "optimizer.learning_rate"
# The head trains whole in every run.
LORA = {"method.kind": "lora", "method.alpha": 16.0, "method.train": ("^head/",)}
ALONE = {"method.kind": "head_only"}
SHORT = {
    "training.steps": 40, "data.source.split": "train[:120]",
    "data.validation": "test[:40]", "data.batch_size": 20,
}  # fmt: skip
NOTE = (
    "of the first gradients at the start, by full fine-tuning's loss, a mean over the case's "
    "matrices; the interval is over seeds"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A point of the figure.

    Attributes:
      config: of the task and model, by `path.py:arg`.
      lora, head: overrides of the searched runs and of the head alone.
      vary: what a seed sets besides `seed`.
      batches: of the first gradients, an even number.
      beside: targets of all cases with this model and task.
    """

    name: str
    config: str
    lora: Mapping[str, Any]
    head: Mapping[str, Any]
    ladder: Ladder
    vary: Sequence[str]
    batches: int
    beside: tuple[str, ...] = ()

    def at(self, targets: Sequence[str]) -> list["Case"]:
        """The case for each of some targets."""
        return [
            dataclasses.replace(
                self, name=f"{self.name}, {one.rstrip('$')}", lora={**self.lora, TARGETS: one},
                beside=tuple(targets),
            )
            for one in targets
        ]  # fmt: skip

    def rows(self) -> list[Row]:
        largest = Baseline({**self.lora, SIZE: self.ladder.high})
        search = Searched(
            self.config, self.ladder, largest, self.lora, Baseline(self.head),
            size=SIZE, name=R90, vary=self.vary,
        )  # fmt: skip
        looked = functools.partial(Computed, self.look, seeded=True, name="gradients")
        return [
            Row(self.name, R90, search),
            *(Row(self.name, m, looked(metric=m), notes=(NOTE,)) for m in (*RANKS, NOISE)),
        ]

    def look(self, folder: Path, seed: int) -> dict[str, Any]:
        """Every rank, and the spectra: means over matrices of squared singular values, their sum 1
        (`noise` over the same sum)."""
        seeds = dict.fromkeys(("seed", *self.vary), seed)
        overrides = {**self.lora, TARGETS: self.beside, **seeds}
        own = self.lora[TARGETS]
        found = [
            one
            for path, one in first(self.config, json.dumps(overrides), self.batches).items()
            if any(partition.matches(own, e) for e in partition.expand(path))
        ]
        ranks = {name: _mean(rank(one) for one in found) for name, rank in RANKS.items()}
        return {
            **{name: {"value": value} for name, value in ranks.items()},
            NOISE: {"value": _mean(analysis.noise_share(one) for one in found)},
            "spectra": {
                side: _together([_shares(getattr(one, side), one.mean) for one in found])
                for side in ("mean", "noise")
            },
        }


@functools.cache  # cases of one model and task look at it once
def first(config: str, overrides: str, batches: int) -> dict[str, analysis.FirstGradients]:
    """Of every leaf that the experiment's LoRA targets, on the first batches of its data.

    Args:
      overrides: of the config, as JSON.
    """
    experiment = grid.configured(config, json.loads(overrides))
    bench, lora = Workbench(experiment), experiment.method
    flat = partition.flatten(bench.params)
    layouts = {path: lora.layout(path, flat[path]) for path in lora.ranks(bench.params)}

    @jax.jit
    def gradient(params: Any, batch: Any) -> dict[str, jax.Array]:
        def mean(weights: Any) -> jax.Array:
            total, weight = bench.loss({"params": partition.replace(params, weights)}, batch)
            return total / weight

        own = partition.flatten(params)
        found = jax.grad(mean)({path: own[path] for path in layouts})
        return {path: matrices(found[path], layout) for path, layout in layouts.items()}

    stream = bench.batches(experiment.data.seed)
    of_batch = functools.partial(gradient, bench.params)
    return analysis.first_gradients(of_batch, stream, batches)


def _mean(values: Any) -> float:
    return float(np.mean(np.concatenate([np.ravel(x) for x in values])))


def _shares(s: Any, of: Any) -> np.ndarray:
    """[matrices, k]: squares of singular values over the sum of those of another spectrum."""
    squares, whole = np.square(np.asarray(s, np.float64)), np.square(np.asarray(of, np.float64))
    shares = squares / np.maximum(whole.sum(-1, keepdims=True), np.finfo(float).tiny)
    return shares.reshape(-1, shares.shape[-1])


def _together(shares: Sequence[np.ndarray]) -> list[float]:
    """The mean over matrices; short spectra go on with zeros."""
    longest = max(x.shape[-1] for x in shares)
    padded = [np.pad(x, ((0, 0), (0, longest - x.shape[-1]))) for x in shares]
    return [float(x) for x in np.concatenate(padded).mean(0)]


# Cases.


def mnist(
    net: str, layers: Sequence[str], scale: str, widths: tuple[int, ...] = (200, 200)
) -> list[Case]:
    """Layers of a network from a random start; Adam at its usual rates."""
    smoke = scale == "smoke"
    both = {"training.steps": 300, "training.eval_every": 0, "training.patience": 0,
            "training.keep": "last", "optimizer.schedule": "linear"}  # fmt: skip
    both |= SHORT if smoke else {}
    both |= {"model.shape.widths": widths} if net == "fc" else {}
    ladder = Ladder(1, 32, points=4, ratio=2.0 if scale == "small" else 1.1)
    name = "LeNet" if net == "lenet" else "-".join(map(str, (784, *widths, 10)))
    base = Case(
        f"MNIST, {name}",
        mnist_config(net=net, dimension=0),
        {**both, **LORA, RATE: 3e-3},
        {**both, **ALONE, RATE: 3e-3},
        Ladder(1, 4, points=2, ratio=1e9) if smoke else ladder,
        ("model.init_seed", "data.seed"), 2 if smoke else 8,
    )  # fmt: skip
    return base.at(layers)


def minilm(task: str, targets: Sequence[str], scale: str) -> list[Case]:
    """MiniLM-L6; `small`: 120 steps of 16 sentences."""
    whole = scale == "paper"
    some = {"examples": 0 if whole else 4000, "batch": 32 if whole else 16,
            "epochs": 3 if whole else 1}  # fmt: skip
    both: dict[str, Any] = {"training.eval_every": 0, "training.keep": "last"}
    if not whole:
        both |= {"training.steps": 120, "data.length": 32, "data.buckets": (16,),
                 "data.too_long": "truncate"}  # fmt: skip
    base = Case(
        f"{task.upper()}, MiniLM-L6",
        glue(task=task, **some),
        {**both, **LORA, RATE: 2e-3},
        {**both, **ALONE, RATE: 1e-2},
        Ladder(1, 64, points=4, ratio=1.3) if whole else Ladder(1, 64, points=3, ratio=9.0),
        ("data.seed", "training.dropout_seed"), 32 if whole else 8,
    )  # fmt: skip
    return base.at(targets)


def cases(scale: str) -> list[Case]:
    layers = ("hidden_0$", "hidden_1$")
    if scale == "smoke":
        return mnist("fc", (*layers, "hidden_2$", r"hidden_\d$"), scale, (16, 16, 16))
    widths = (25, 50, 100, 200)
    found = [case for n in widths for case in mnist("fc", layers, scale, (n, n))]
    found += mnist("lenet", ("conv_1$", *layers), scale)
    every = ("attention/query$", "attention/value$", "mlp/up$", "mlp/down$")
    if scale == "small":
        chosen = {"sst2": every}
    else:
        every += ("attention/key$", "attention/out$", "attention/(query|value)$",
                  "(attention|mlp)/(query|key|value|out|up|down)$")  # fmt: skip
        chosen = dict.fromkeys(("sst2", "cola", "mrpc", "qnli", "stsb"), every)
    return [*found, *(x for task, some in chosen.items() for x in minilm(task, some, scale))]


def table(scale: str) -> Table:
    rows = [case.rows() for case in cases(scale)]
    related = [
        Row("all cases: rank correlation", f"{metric} with {R90}",
            Correlated([(own[at], own[0]) for own in rows]))
        for at, metric in enumerate(RANKS, 1)
    ]  # fmt: skip
    return Table(
        f"Ranks of the first gradients and r90, {scale}", (*(r for own in rows for r in own),
                                                           *related),
        seeds=1 if scale == "smoke" else 3, figures=_figures,
        cost="a day on one GPU" if scale == "paper" else "about 55 minutes on 2 CPU cores",
    )  # fmt: skip


def _figures(filled: Filled, folder: Path) -> Sequence[Path]:
    return [*scatter(filled, folder / "beyond_gradients.png"), *_energies(filled, folder)]


def _energies(filled: Filled, folder: Path) -> Sequence[Path]:
    """Energy within the first k directions of the mean gradient, and (dashed) of its noise."""
    from lora_jax.sweeps.plots import legend_below, new_figure, shades

    lines = [x for x in filled.lines if x.row.metric == NOISE and x.measured.place]
    if not lines:
        return []
    figure, axes = new_figure(height=5.5, width=7.0)
    for colour, line in zip(shades(len(lines)), lines, strict=True):
        found = next(iter(json.loads(Path(line.measured.place).read_text()).values()))["spectra"]
        for side, style in (("mean", "-"), ("noise", "--")):
            curve = np.cumsum(found[side])
            label = line.row.row if side == "mean" else None
            axes.plot(range(1, len(curve) + 1), curve, style, color=colour, label=label)
    axes.set(xscale="log", xlabel="directions", ylabel="share of the mean gradient's energy",
             title="dashed: the noise in it")  # fmt: skip
    legend_below(figure, [axes])
    path = folder / "beyond_gradients_energy.png"
    figure.savefig(path, dpi=120)
    return [path]
