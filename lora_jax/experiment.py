"""An experiment: its dataclasses, and how it runs from a config to an adapter and a result."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from lora_jax import config as configs
from lora_jax import methods, pretrained, training
from lora_jax.data import loader, sources, tasks
from lora_jax.data.metrics import phoneme_error_rate
from lora_jax.errors import UserError
from lora_jax.training.loss import chunked_loss


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The base model: alias, Hugging Face folder, .gguf or hub id."""

    source: str = "smollm2-135m"
    dtype: str = "float32"
    remat: str = "none"  # none | full | dots
    unroll: int = 1  # layers per iteration of the scan


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on: records of `source`, made examples by `task`."""

    source: Any
    task: Any
    validation: str = "validation[:128]"  # the source's split for evaluation
    batch_size: int = 8  # rows a step
    length: int = 128  # tokens a row
    packing: bool = True
    loss: Literal["completion", "all"] = "completion"
    too_long: Literal["error", "truncate", "drop"] = "error"


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    steps: int = 100
    accumulate: int = 1  # micro-batches a step
    eval_every: int = 0  # steps; 0: at the end only
    save_every: int = 0
    log_every: int = 10
    chunk: int = 512  # positions whose logits exist at one time
    start_from: str | None = None  # an adapter folder to go on from


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Greedy (or beam) answers to the validation prompts, scored by the task's metrics."""

    max_new_tokens: int = 48
    num_beams: int = 1
    length_penalty: float = 1.0
    batch_size: int = 64
    base_shots: tuple[int, ...] = ()  # examples in the base model's prompt; best is kept
    base_examples: int = 64  # of the validation split, for the base model
    show: int = 8  # answers printed side by side


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides a run's numbers."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    method: Any = dataclasses.field(default_factory=methods.LoRA)
    optimizer: training.OptimizerConfig = dataclasses.field(
        default_factory=training.OptimizerConfig
    )
    mesh: training.MeshConfig = dataclasses.field(default_factory=training.MeshConfig)
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0
    training: TrainingConfig = TrainingConfig()  # last: the name hides the module from here on


def kinds() -> dict[str, configs.Kinds]:
    """The fields whose `kind` chooses a class, and the classes."""
    return {
        "method": methods.METHODS,
        "source": {"tfds": sources.TFDS, "files": sources.Files},
        "task": tasks.TASKS,
    }


def from_dict(config: dict[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """The experiment a config describes; unknown keys and wrong types are UserErrors."""
    built = configs.build(Experiment, config, kinds())
    if overrides:
        built = configs.build(Experiment, configs.override(to_dict(built), overrides), kinds())
    return built


def to_dict(experiment: Experiment) -> dict[str, Any]:
    return configs.expand(experiment, kinds())


class Run:
    """A base model, data and method brought together; everything loads when first used."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        shape = experiment.mesh.shape
        self.mesh = training.make_mesh(experiment.mesh) if max(shape) > 1 else None
        self.task = experiment.data.task

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        m = self.experiment.model
        return pretrained.load_pretrained(
            m.source, dtype=m.dtype, mesh=self.mesh, remat=m.remat, unroll=m.unroll
        )

    @property
    def model(self) -> Any:
        return self.loaded[0]

    @property
    def params(self) -> Any:
        return self.loaded[1]

    @functools.cached_property
    def tokenizer(self) -> Any:
        return pretrained.load_tokenizer(self.experiment.model.source)

    @functools.cached_property
    def pad_id(self) -> int:
        tokenizer = self.tokenizer
        return next(i for i in (tokenizer.pad_id, tokenizer.eos_id, 0) if i is not None)

    @functools.cached_property
    def train_records(self) -> Sequence[Any]:
        return self.experiment.data.source.open()

    @functools.cached_property
    def validation_records(self) -> list[Any]:
        d = self.experiment.data
        return list(dataclasses.replace(d.source, split=d.validation).open())

    @functools.cached_property
    def train_data(self) -> Any:
        d = self.experiment.data
        return loader.batches(
            self.task.examples(self.train_records, self.tokenizer),
            batch_size=d.batch_size,
            length=d.length,
            packing=d.packing,
            loss=d.loss,
            seed=self.experiment.seed,
            pad_id=self.pad_id,
            too_long=d.too_long,
        )

    def loss(self, variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        return chunked_loss(self.model, variables, batch, chunk=self.experiment.training.chunk)

    def answers(self, variables: Any, prompts: list[list[int]], eos_id: int | None) -> list[str]:
        e = self.experiment.evaluation
        ids = training.generate(
            self.model,
            variables,
            prompts,
            max_new_tokens=e.max_new_tokens,
            eos_id=eos_id,
            pad_id=self.pad_id,
            num_beams=e.num_beams,
            length_penalty=e.length_penalty,
            batch_size=e.batch_size,
        )
        return [self.tokenizer.decode(x, skip_special_tokens=True).strip() for x in ids]

    def evaluate(self, variables: Any) -> tuple[dict[str, float], list[str]]:
        """The task's metrics on the validation split, and the answers themselves."""
        records = self.validation_records
        prompts = [self.task.prompt_ids(r, self.tokenizer) for r in records]
        answers = self.answers(variables, prompts, self.tokenizer.eos_id)
        return score(self.task, answers, [self.task.references(r) for r in records]), answers

    def evaluate_base(self) -> tuple[dict[str, float], list[str]]:
        """The base model with k examples in its prompt, best k kept: `base_*` and `base_shots`."""
        e = self.experiment.evaluation
        records = self.validation_records[: e.base_examples]
        picked = np.random.default_rng(self.experiment.seed).permutation(len(self.train_records))
        newline = self.tokenizer.encode("\n")[-1]
        best: tuple[float, dict[str, float], list[str]] | None = None
        for k in e.base_shots:
            shots = [self.train_records[int(i)] for i in picked[:k]]
            lines = [self.task.prompt(r) + self.task.completion(r) + "\n" for r in shots]
            before = self.tokenizer.encode("".join(lines))
            prompts = [before + self.task.prompt_ids(r, self.tokenizer) for r in records]
            answers = self.answers({"params": self.params}, prompts, newline)
            found = score(self.task, answers, [self.task.references(r) for r in records])
            name, value = next(iter(found.items()))
            print(f"base model, {k} examples in the prompt: {name} {value:.3f}", flush=True)
            cost = value if name.endswith("error_rate") else -value
            if best is None or cost < best[0]:
                named = {f"base_{n}": v for n, v in found.items()}
                best = cost, {**named, "base_shots": float(k)}, answers
        return (best[1], best[2]) if best else ({}, [])


def score(task: Any, answers: list[str], references: list[list[str]]) -> dict[str, float]:
    """Metrics by name, the task's principal one first."""
    exact = float(np.mean([a in r for a, r in zip(answers, references, strict=True)]))
    if isinstance(task, tasks.G2P):
        rate = float(phoneme_error_rate(answers, references))
        return {"phoneme_error_rate": rate, "exact_match": exact}
    return {"exact_match": exact}


def run(experiment: Experiment, workdir: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Trains, evaluates and saves; an interrupted workdir goes on where it was.

    Raises UserError for a workdir that is finished, or that another config began.
    """
    began, folder = time.perf_counter(), Path(workdir)
    config = to_dict(experiment)
    claim(folder, config)
    work = Run(experiment)
    model, params, method = work.model, work.params, experiment.method
    print(f"trainable parameters\n{method.count(params)}", flush=True)
    frozen = method.dropped(params)
    tx = training.make_optimizer(experiment.optimizer, experiment.training.steps)
    trainable = None
    if experiment.training.start_from:
        _, trainable = pretrained.load_adapter(experiment.training.start_from, model, params)
    state = training.init_state(
        method, params, tx, seed=experiment.seed, trainable=trainable, mesh=work.mesh
    )
    layout = training.shardings_of(state) if work.mesh is not None else None
    t = experiment.training
    step = training.make_step(
        work.loss, method, tx, accumulate=t.accumulate, mesh=work.mesh, state_shardings=layout
    )

    def evaluate(frozen: Any, state: Any) -> dict[str, float]:
        return work.evaluate(method.combine(frozen, state.trainable))[0]

    with training.Checkpoints(folder / "checkpoints", metric=None) as checkpoints:
        fitted = training.fit(
            step, frozen, state, work.train_data, steps=t.steps, workdir=folder,
            checkpoints=checkpoints, evaluate=evaluate if t.eval_every else None,
            eval_every=t.eval_every, save_every=t.save_every, log_every=t.log_every,
            mesh=work.mesh, progress=progress,
        )  # fmt: skip
    metrics, answers = work.evaluate(method.combine(frozen, fitted.state.trainable))
    print("adapted model:", ", ".join(f"{n} {v:.3f}" for n, v in metrics.items()), flush=True)
    base, base_answers = work.evaluate_base()
    metrics = {**metrics, **base}
    show(work, answers, base_answers)
    sha = pretrained.base_sha256(experiment.model.source)
    if isinstance(method, methods.LoRA):
        pretrained.save_adapter(
            folder / "adapter", model, method, fitted.state.trainable, params=params,
            base_sha256=sha, base_name=experiment.model.source,
        )  # fmt: skip
    else:
        merged = method.merge(frozen, fitted.state.trainable)
        pretrained.save_pretrained(folder / "model", model, merged)
    total = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    result = {
        "metrics": metrics,
        "trainable_params": method.count(params).total,
        "total_params": total,
        "tokens_per_second": fitted.tokens_per_second,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        "seconds": time.perf_counter() - began,
        "base_sha256": sha,
        "seed": experiment.seed,
        "config": config,
        **environment(),
    }
    write_json(folder / "result.json", result)
    return result


def show(work: Run, answers: list[str], base_answers: list[str]) -> None:
    """Some answers side by side."""
    rows = work.validation_records[: work.experiment.evaluation.show]
    for i, record in enumerate(rows):
        base = f"   base: {base_answers[i]}" if i < len(base_answers) else ""
        wanted = work.task.references(record)[0]
        print(f"{work.task.prompt(record)}   wanted: {wanted}   adapted: {answers[i]}{base}")


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Makes the workdir, or checks that it is an unfinished one of this very config."""
    if (folder / "result.json").exists():
        raise UserError(f"{folder} holds a finished run: choose another --workdir or remove it")
    path = folder / "config.json"
    if path.exists():
        if json.loads(path.read_text()) != json.loads(json.dumps(config)):
            raise UserError(f"{folder} was begun with another config: choose another --workdir")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, config)


def write_json(path: Path, content: Any) -> None:
    """Atomically: a reader sees the old file or the whole new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)


def environment() -> dict[str, Any]:
    """Versions, device and git commit: what a number depends on besides its config."""
    names = ("lora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "versions": {n: importlib.metadata.version(n) for n in names},
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "git_commit": commit.stdout.strip() or None,
    }


def load_run(workdir: str | Path) -> tuple[Run, Any, Any]:
    """(run, method, trainable) of a finished workdir that holds an adapter."""
    folder = Path(workdir)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no workdir: it has no config.json")
    if not (folder / "adapter").exists():
        raise UserError(f"{folder} holds no adapter yet: finish `lora-jax run` first")
    work = Run(from_dict(json.loads((folder / "config.json").read_text())))
    sha = pretrained.base_sha256(work.experiment.model.source)
    method, trainable = pretrained.load_adapter(
        folder / "adapter", work.model, work.params, base_sha256=sha
    )
    return work, method, trainable
