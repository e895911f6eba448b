"""What the article that this project grew from claims, measured.

    lora-jax table experiments/article_claims.py --scale small --workdir runs/article_claims

Counts and bytes at GPT-3's shape come from shapes alone. Latency is a forward pass of SmolLM2-135M
(extra `quickstart`) over the base's, in turns in one process. The comparisons train SmolLM2 to
pronounce for 40 steps of two rows; `GENERAL_TEXT` names a text file (say, Shakespeare's works)
whose loss before and after tells what is forgotten. `small`: about 75 minutes on 2 CPU cores;
`smoke`: counts, one latency, one step.

Measured so, `small`, 3 seeds. At GPT-3's shape 9,251 times fewer parameters and 0.20 of the
training memory (the article: 10,000, a third). LoRA's error is 0.493 and full fine-tuning's 0.472,
undecided, 0.021 [-0.102, 0.144]; adapters, 0.448, are better than LoRA by 0.045 [0.029, 0.061], and
LoRA than Prompt Tuning, 0.598, by 0.105 [0.016, 0.194]. Prefix-Tuning is hard to train: over rates
a factor of 30 apart its worst error is 3.45 above its best, LoRA's 0.46 (from 3e-4, not 1e-3, on);
over lengths 2, 8 and 32 its error is 0.68, 0.56 and 0.66, with undecided differences. What the
adapted model loses on Shakespeare, from 4.35: full fine-tuning to 4.49, Prompt Tuning 4.71, LoRA
4.91 (more than full fine-tuning by 0.43 [0.29, 0.56]), adapters 6.3, Prefix-Tuning 7.6 to 8.5,
P-tuning v2 9.4, which does not learn the task in 40 steps either. Merged, LoRA is as fast as the
base, -0.6 % [-9.2, 7.9] at 1 x 128; beside it a forward pass takes 8.5 % [7.6, 9.4] longer, with
adapters 4.9 % [2.9, 6.9]. At 8 x 128 the weights' own products hide all three: 2.1 % [-2.4, 6.7],
2.2 % [-2.8, 7.2], 1.8 % [-15.6, 19.1].
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from given_folders import CONFIGS

from lora_jax.tables import Claim, Computed, Measured, NotRun, Row, Table, Trained

MODEL = "smollm2-135m"
GPT3 = str(CONFIGS / "gpt3_175b.py")
# r=4 on query and value: the paper's section 4.2, "350GB to 35MB, roughly 10,000x".
R4 = {"method.rank": 4, "method.alpha": 4.0}


def gpt3(overrides: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """(experiment, abstract parameters, abstract state) of GPT-3's shape."""
    import dataclasses

    import jax

    from lora_jax import training
    from lora_jax.plan.sketch import Sketch
    from lora_jax.sweeps.grid import configured

    experiment = dataclasses.replace(configured(GPT3, overrides), mesh=training.MeshConfig())
    params = Sketch(experiment).params
    tx = training.make_optimizer(experiment.optimizer, experiment.training.steps)
    state = jax.eval_shape(lambda p: training.init_state(experiment.method, p, tx), params)
    return experiment, params, state


def fewer_parameters(folder: Path, seed: int) -> dict[str, Any]:
    """All parameters over the trainable ones."""
    import math

    import jax

    experiment, params, _ = gpt3(R4)
    trainable = experiment.method.count(params).total
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    return {"value": total / trainable, "trainable_params": trainable}


def less_memory(folder: Path, seed: int) -> dict[str, Any]:
    """Weights, gradients and optimizer state of LoRA over those of full fine-tuning.

    The weights are bfloat16. Gradients count as float32, Adam's moments as the optimizer has them.
    """
    from lora_jax.plan.cost import device_bytes

    def held(overrides: Mapping[str, Any]) -> tuple[int, int]:
        experiment, params, state = gpt3(overrides)
        trained = device_bytes(state.trainable)
        frozen = device_bytes(experiment.method.frozen(params))
        counted = experiment.method.count(params).total
        return frozen + trained + 4 * counted + device_bytes(state.opt_state), counted

    lora, counted = held(R4)
    full, _ = held({"method.kind": "full"})
    return {"value": lora / full, "trainable_params": counted}


def latency(rows: int, rounds: int, folder: Path, seed: int) -> dict[str, Any]:
    """Forward passes of `rows` x 128 tokens, all arms in turns: see `latency.cells`."""
    from latency import cells

    import lora_jax as lj

    model, params = lj.load_pretrained(MODEL)
    adapters = lj.METHODS["adapter_h"](size=8, start="normal")
    methods = {"LoRA merged": (lj.LoRA(rank=8), True), "LoRA beside": (lj.LoRA(rank=8), False),
               "adapters": (adapters, False)}  # fmt: skip
    return cells(model, params, methods, rows, 128, rounds=rounds, seed=seed)


# The quickstart, with half the rows a step and fewer words.
QUICKSTART = CONFIGS / "quickstart.py"
SHORT: dict[str, Any] = {
    "evaluation.base_shots": (), "data.validation": "validation[:64]", "evaluation.show": 0,
    "evaluation.forgetting_blocks": 32, "data.batch_size": 2, "training.save_every": 0,
}  # fmt: skip
SMOKE: dict[str, Any] = {
    "data.source.split": "train[:64]", "data.validation": "validation[:1]", "data.batch_size": 1,
    "evaluation.max_new_tokens": 1, "evaluation.batch_size": 1, "evaluation.spectra": 0,
    "evaluation.forgetting_blocks": 1,
}  # fmt: skip
PREFIX = "Prefix-Tuning, length"
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "LoRA": ({}, (1e-3, 3e-3)),
    "full fine-tuning": ({"method.kind": "full"}, (3e-5, 1e-4)),
    "adapters": ({"method.kind": "adapter_h", "method.size": 32}, (1e-3, 3e-3)),
    f"{PREFIX} 2": ({"method.kind": "prefix_tuning", "method.length": 2}, (1e-3, 1e-2)),
    f"{PREFIX} 8": ({"method.kind": "prefix_tuning", "method.length": 8}, (1e-3, 1e-2)),
    f"{PREFIX} 32": ({"method.kind": "prefix_tuning", "method.length": 32}, (1e-3, 1e-2)),
    "Prompt Tuning": ({"method.kind": "prompt_tuning", "method.length": 16}, (1e-2, 1e-1)),
    "P-tuning v2": (
        {"method.kind": "p_tuning_v2", "method.length": 16, "method.train": ()}, (1e-2, 3e-2),
    ),
}  # fmt: skip
# Rates over a factor of 30, the same number for each method.
SPREAD = {"LoRA": (3e-4, 1e-3, 3e-3, 1e-2), f"{PREFIX} 8": (1e-3, 3e-3, 1e-2, 3e-2)}
ERROR, GENERAL = "phoneme error rate", "loss on general text"
WORST = "phoneme error rate, worst rate − best"


def runs_of(name: str, metric: str | None, rates: Sequence[float], steps: int) -> Trained:
    """Runs of a method of `METHODS`, at the best of some rates by the task's own metric."""
    overrides = {
        **METHODS[name][0],
        **SHORT,
        **(SMOKE if steps == 1 else {}),
        "training.steps": steps,
        "optimizer.warmup_steps": steps // 15,
    }
    if text := os.environ.get("GENERAL_TEXT"):
        overrides["evaluation.forgetting"] = {"kind": "files", "path": text}
    grid = [{"optimizer.learning_rate": rate} for rate in rates]
    return Trained(str(QUICKSTART), metric, overrides, grid, chosen_by="phoneme_error_rate")


@dataclasses.dataclass(frozen=True)
class Spread:
    """The worst error over rates less the best one, or the error at one of them.

    A method's runs are shared with its row of `compared`.

    Args:
      rate: whose error; None: the difference.
    """

    name: str
    steps: int
    rate: float | None = None

    def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
        rates = SPREAD[self.name]
        for seed in seeds:  # all rates in one sweep
            runs_of(self.name, None, rates, self.steps).measure(folder, [seed], progress)
        cells = {
            rate: runs_of(self.name, None, (rate,), self.steps).measure(folder, seeds, False)
            for rate in rates
        }
        shown = dataclasses.replace(cells[self.rate or rates[0]], chosen={})  # it was given
        if self.rate is not None:
            return shown
        if lost := [f"{rate:g}" for rate, x in cells.items() if len(x.values) < len(seeds)]:
            reason = f"diverged at rates {', '.join(lost)}: no error to compare"
            return dataclasses.replace(shown, values={}, reason=reason)
        errors = {seed: [x.values[seed] for x in cells.values()] for seed in seeds}
        return dataclasses.replace(shown, values={s: max(x) - min(x) for s, x in errors.items()})


def compared(steps: int, names: Sequence[str]) -> list[Row]:
    """Error, and loss on general text, of each method at its best rate."""
    rows = []
    for name in names:
        rates = METHODS[name][1]
        rows.append(Row(name, ERROR, runs_of(name, None, rates, steps)))
        metrics = {GENERAL: "general_loss"}
        if name == "LoRA":  # the untrained model is the same in all
            metrics[f"{GENERAL}, untrained"] = "base_general_loss"
        for label, metric in metrics.items():
            work: Trained | NotRun = runs_of(name, metric, rates, steps)
            if not os.environ.get("GENERAL_TEXT"):
                work = NotRun("set GENERAL_TEXT to a text file")
            rows.append(Row(name, label, work))
    return rows


def counts() -> list[Row]:
    """At GPT-3's shape."""
    return [
        Row("parameters: all / trained, GPT-3, r=4", "ratio", Computed(fewer_parameters),
            notes=("the article: 10,000 times fewer",)),
        Row("training memory: LoRA / full, GPT-3, r=4", "ratio", Computed(less_memory),
            notes=("the article: a third; weights, gradients and optimizer state are counted, "
                   "activations are not",)),
    ]  # fmt: skip


def latencies(batches: Sequence[int], rounds: int) -> list[Row]:
    return [
        Row(f"latency, {rows} x 128", metric,
            Computed(functools.partial(latency, rows, rounds), seeded=True, name="latency",
                     metric=metric))
        for rows in batches
        for metric in ("LoRA merged overhead (%)", "LoRA beside overhead (%)",
                       "adapters overhead (%)")
    ]  # fmt: skip


def table(scale: str) -> Table:
    if scale == "smoke":
        rows = [*counts(), *latencies((1,), 1), *compared(1, ("P-tuning v2",))]
        return Table("The article's claims, smoke", tuple(rows), seeds=1)
    rows = [*counts(), *latencies((1, 8), 15), *compared(40, tuple(METHODS))]
    for name, rates in SPREAD.items():
        rows.append(Row(name, WORST, Spread(name, 40)))
        rows += [Row(name, f"{ERROR}, rate {rate:g}", Spread(name, 40, rate)) for rate in rates]
    rows.append(
        Row("images: LoRA styles in Stable Diffusion", "quality", NotRun("no U-Net here yet"))
    )
    return Table(
        f"The article's claims, {scale}", tuple(rows), seeds=3,
        claims=(
            *(Claim("LoRA", name, ERROR) for name in METHODS if name != "LoRA"),
            Claim("LoRA", f"{PREFIX} 8", WORST),
            Claim(f"{PREFIX} 2", f"{PREFIX} 8", ERROR), Claim(f"{PREFIX} 8", f"{PREFIX} 32", ERROR),
            *(Claim("LoRA", name, GENERAL) for name in METHODS if name != "LoRA"),
        ),
        notes=(
            "Another model and task than the article's, at a small scale. Error and loss: lower is "
            "better.",
            "Loss on general text is of the adapted model. A prefix or prompt that is taken away "
            "leaves the base as it was, and so does a LoRA that was not merged.",
        ),
        cost="about 75 minutes on 2 CPU cores",
    )  # fmt: skip
