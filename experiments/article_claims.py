"""What the article that this project grew from claims, measured.

    lora-jax table experiments/article_claims.py --scale small --workdir runs/article_claims

Counts and bytes at GPT-3's shape come from shapes alone. Latency is a forward pass of SmolLM2-135M
(extra `quickstart`) as a ratio to the base, in turns in one process. The comparisons with full
fine-tuning and the rivals train SmolLM2 to pronounce (configs/quickstart.py) for a few steps.
`small`: about 50 minutes on 2 CPU cores; `smoke`: counts only.
"""

import functools
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.tables import Claim, Computed, NotRun, Row, Table, Trained

CONFIGS = Path(__file__).parents[1] / "configs"
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
        frozen = device_bytes(experiment.method.dropped(params))
        counted = experiment.method.count(params).total
        return frozen + trained + 4 * counted + device_bytes(state.opt_state), counted

    lora, counted = held(R4)
    full, _ = held({"method.kind": "full"})
    return {"value": lora / full, "trainable_params": counted}


def latency(method: str, rows: int, folder: Path, seed: int) -> dict[str, Any]:
    """Time of a forward pass of 128 tokens over the base's, median of 15 rounds in turns."""
    import jax
    import jax.numpy as jnp

    import lora_jax as lj

    model, params = lj.load_pretrained("smollm2-135m")
    tokens = jnp.ones((rows, 128), jnp.int32)
    chosen = {
        "merged": lj.LoRA(rank=8),
        "beside": lj.LoRA(rank=8),
        "adapter": lj.METHODS["adapter_h"](size=8),
    }[method]
    trainable = chosen.init(jax.random.key(seed), params)
    if method == "merged":
        other = {"params": chosen.merge(params, trainable)}
    else:
        other = chosen.combine(params, trainable)
    run = jax.jit(lj.adapt(lambda v, t: model.apply(v, t)[:, -1]))
    arms = {"base": {"params": params}, method: other}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(16):
        for name, variables in arms.items():
            began = time.perf_counter()
            run(variables, tokens).block_until_ready()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(seconds["base"], seconds[method], strict=True)]
    return {"value": statistics.median(ratios), "trainable_params": chosen.count(params).total}


def pronouncing(name: str, overrides: Mapping[str, Any], rates: tuple[float, ...]) -> list[Row]:
    """Error and general loss of a method on the quickstart's task, 40 steps."""
    short = {"evaluation.base_shots": (), "data.validation": "validation[:64]",
             "data.source.split": "train[:20000]"}  # fmt: skip
    grid = [{"optimizer.learning_rate": rate} for rate in rates]
    config = f"{CONFIGS / 'quickstart.py'}:steps=40"
    return [Row(name, "phoneme error rate", Trained(config, None, {**overrides, **short}, grid))]


METHODS = {
    "LoRA": ({}, (1e-3, 3e-3)),
    "full fine-tuning": ({"method.kind": "full"}, (3e-5, 1e-4)),
    "adapters (Houlsby)": ({"method.kind": "adapter_h", "method.size": 32}, (1e-3, 3e-3)),
    "Prefix-Tuning, length 8": (
        {"method.kind": "prefix_tuning", "method.length": 8}, (1e-3, 1e-2),
    ),
    "Prefix-Tuning, length 32": (
        {"method.kind": "prefix_tuning", "method.length": 32}, (1e-3, 1e-2),
    ),
    "Prompt Tuning": ({"method.kind": "prompt_tuning", "method.length": 16}, (1e-2, 1e-1)),
    "P-tuning v2": (
        {"method.kind": "p_tuning_v2", "method.length": 16, "method.train": ()}, (1e-2, 3e-2),
    ),
}  # fmt: skip


def table(scale: str) -> Table:
    rows = [
        Row("parameters: all / trained, GPT-3, r=4", "ratio", Computed(fewer_parameters),
            notes=("the article: 10,000 times fewer",)),
        Row("training memory: LoRA / full, GPT-3, r=4", "ratio", Computed(less_memory),
            notes=("the article: a third; weights, gradients and optimizer state are counted, "
                   "activations are not",)),
    ]  # fmt: skip
    claims: list[Claim] = []
    if scale != "smoke":
        for rows_ in (1, 8):
            for method, label in (("merged", "LoRA, merged"), ("beside", "LoRA, not merged"),
                                  ("adapter", "adapters (Houlsby)")):  # fmt: skip
                timed = functools.partial(latency, method, rows_)
                work = Computed(timed, name=f"{method}_{rows_}")
                rows.append(Row(f"latency of {label} / base, {rows_} x 128", "ratio", work))
        for name, (overrides, rates) in METHODS.items():
            rows += pronouncing(name, overrides, rates)
        claims = [Claim("LoRA", name, "phoneme error rate") for name in METHODS if name != "LoRA"]
        rows.append(
            Row("images: LoRA styles in Stable Diffusion", "quality", NotRun("no U-Net here yet"))
        )
    return Table(
        f"The article's claims, {scale}", tuple(rows), seeds=3, claims=tuple(claims),
        notes=("Another model and task than the article's, at a small scale.",),
        cost="about 50 minutes on 2 CPU cores",
    )  # fmt: skip
