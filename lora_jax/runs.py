"""A run: from an experiment to a workdir that holds an adapter and a result, and back.

A workdir has `config.json` (complete), `metrics.jsonl`, `spectra.jsonl` (of the updates, at each
evaluation), TensorBoard events, `checkpoints/`, `adapter/` and `result.json`, written last: where
it stands, the run is finished. Its `seconds` and `tokens_per_second` are of the process that ended
the run, which began after `resumed_at` updates. One process at a time is at work there (`.lock`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import bases, host, locks, partition, pretrained, training
from lora_jax.atomic import write_json
from lora_jax.errors import UserError
from lora_jax.experiment import Experiment, from_dict, to_dict
from lora_jax.training.spectra import Row, rows, update_spectra, weight_norms
from lora_jax.workbench import Workbench

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Start:
    """A run before its first step.

    Attributes:
      method: after `prepare`, if it looks at data.
      tx: the optimizer, not yet wrapped by the method.
      frozen: what the step holds besides the state.
      state: on the mesh, if there is one.
    """

    method: Any
    tx: Any
    frozen: Any
    state: training.State


def begin(bench: Workbench, experiment: Experiment) -> Start:
    """The method, optimizer and first state of `experiment` on a workbench."""
    t = experiment.training
    method = bench.prepared(experiment)
    trainable = _from_adapter(t.start_from, bench, experiment, method) if t.start_from else None
    tx = training.make_optimizer(experiment.optimizer, t.steps)
    state = training.init_state(
        method, bench.params, tx, seed=experiment.seed, dropout_seed=t.dropout_seed,
        trainable=trainable, mesh=bench.mesh, rules=bench.sharding_rules,
    )  # fmt: skip
    return Start(method, tx, method.frozen(bench.params), state)


def _from_adapter(source: str, bench: Workbench, experiment: Experiment, method: Any) -> Any:
    """The method's start with the adapter in `source` in it; a new head stays as it is."""
    own_head = bench.task.head == "lm"
    saved, loaded = pretrained.load_adapter(source, bench.model, bench.params, head=own_head)
    trainable = method.init(training.stream(experiment.seed, "init"), bench.params)
    old = {n: tuple(x.shape) for n, x in partition.flatten(loaded).items()}
    new = {n: tuple(x.shape) for n, x in partition.flatten(trainable).items()}
    odd = [n for n, shape in old.items() if new.get(n) != shape]
    odd += [n for n in new if n not in old and not n.startswith("head/")]
    if odd:
        raise UserError(
            f"training.start_from: the adapter in {source} has other targets or ranks than "
            f"config.method, at {odd[0]}; make them equal"
        )
    start = {**trainable, **loaded}
    given = partition.arrays(saved.combine(bench.params, loaded))
    taken = partition.arrays(method.combine(bench.params, start))
    odd = [n for n in {**given, **taken} if not _alike(given.get(n), taken.get(n))]
    odd = [n for n in odd if own_head or "head" not in n.split("/")]
    if odd:
        raise UserError(
            f"training.start_from: with config.method the adapter in {source} computes something "
            f"else, at {odd[0]}; give the method the adapter's kind, alpha and scaling"
        )
    return start


def _alike(x: Any, y: Any) -> bool:
    """Whether two leaves are the same numbers; None is no leaf."""
    if x is y or x is None or y is None:
        return x is y
    if partition.is_key(x):
        x, y = jax.random.key_data(x), jax.random.key_data(y)
    if x.shape != y.shape:
        return False
    x, y = np.asarray(x), np.asarray(y)  # an exact copy needs no wider one
    return np.array_equal(x, y) or np.allclose(
        x.astype(np.float64), y.astype(np.float64), rtol=1e-5, atol=0.0
    )


def run(experiment: Experiment, workdir: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Trains, evaluates and saves; an interrupted workdir goes on where it was.

    Returns what `result.json` holds. Raises UserError for a workdir that is finished, that another
    config began, or that another process is at work in.
    """
    one_process()
    folder = Path(workdir)
    check_free(folder, to_dict(experiment))
    with locks.alone(folder):
        return _run(experiment, folder, progress)


def _run(experiment: Experiment, folder: Path, progress: bool) -> dict[str, Any]:
    began, t = time.perf_counter(), experiment.training
    bench, config = Workbench(experiment), to_dict(experiment)
    start = begin(bench, experiment)
    bench.check_evaluation()
    print(f"trainable parameters\n{start.method.count(bench.params)}", flush=True)
    data = bench.batches(experiment.data.seed)
    claim(folder, config)  # only now: a config with a mistake leaves no workdir
    layout = training.shardings_of(start.state) if bench.mesh is not None else None
    step = training.make_step(
        bench.loss, start.method, start.tx,
        accumulate=t.accumulate, mesh=bench.mesh, state_shardings=layout,
    )  # fmt: skip

    def variables(state: training.State) -> Any:
        return start.method.combine(start.frozen, state.trainable, numbers=state.numbers)

    def evaluate(_: Any, state: training.State) -> dict[str, float]:
        return bench.evaluate(variables(state))[0]

    with open_checkpoints(folder, bench) as checkpoints:
        fitted = training.fit(
            step, start.frozen, start.state, data, steps=t.steps,
            workdir=folder, checkpoints=checkpoints, evaluate=evaluate if t.eval_every else None,
            inspect=inspector(start.method, experiment.evaluation.spectra),
            eval_every=t.eval_every, save_every=t.save_every, log_every=t.log_every,
            patience=t.patience, mesh=bench.mesh, progress=progress,
        )  # fmt: skip
        state, best = fitted.state, checkpoints.best
        if t.keep == "best":
            # The rest of the state, twice as large, has no further use.
            trainable = checkpoints.restore_trainable(state.trainable, best)
            state = state.replace(trainable=trainable)
    adapted = variables(state)
    metrics, predictions = bench.evaluate(adapted)
    print("adapted model:", ", ".join(f"{n} {v:.3f}" for n, v in metrics.items()), flush=True)
    metrics |= bench.general_loss(adapted)
    base_metrics, base_predictions = evaluate_base(bench, experiment.data.seed)
    show(bench, predictions, base_predictions)
    return finish(
        bench, experiment, start.method, folder, state.trainable,
        metrics={**metrics, **base_metrics},
        fingerprint=data.fingerprint,
        extra={
            "tokens_per_second": fitted.tokens_per_second,
            "seconds": time.perf_counter() - began,
            "best_step": best,
            "converged": fitted.converged,
            "resumed_at": fitted.resumed_at,
        },
    )  # fmt: skip


def one_process() -> None:
    """UserError under several processes, which would all write to the one workdir."""
    if jax.process_count() > 1:
        raise UserError(
            f"{jax.process_count()} processes: a run is of one, on all devices of its machine. For "
            "several, write the loop: loader.batches(host_index=…), place_batch and make_step"
        )


def inspector(method: Any, k: int) -> Callable[[Any, training.State], list[Row]] | None:
    """(frozen, state) -> rows of the first k singular values of each update; None for k = 0.

    For one base: the norms of its weights are computed at the first call.
    """
    if not k:
        return None
    spectra = jax.jit(functools.partial(update_spectra, method, k=k))
    norms: list[Any] = []

    def inspect(frozen: Any, state: training.State) -> list[Row]:
        args = frozen, state.trainable, state.numbers
        if not norms:
            norms.append(weight_norms(method, *args))
        return rows(jax.device_get(spectra(*args, norms[0])))

    return inspect


def open_checkpoints(folder: Path, bench: Workbench) -> training.Checkpoints:
    """The checkpoints of a workdir; the best one by the task's principal metric."""
    mode = "max" if bench.task.higher_is_better else "min"
    return training.Checkpoints(folder / "checkpoints", metric=bench.task.principal, mode=mode)


def evaluate_base(bench: Workbench, seed: int) -> tuple[dict[str, float], Any]:
    """The base model's metrics, `base_*`, as far as the config asks for them; see
    `Workbench.evaluate_base`."""
    metrics, predictions = bench.evaluate_base(seed)
    general = bench.general_loss({"params": bench.params})
    return metrics | {f"base_{name}": value for name, value in general.items()}, predictions


def finish(
    bench: Workbench,
    experiment: Experiment,
    method: Any,
    folder: Path,
    trainable: Any,
    *,
    metrics: dict[str, float],
    fingerprint: str,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Writes the adapter and then the result, which marks the workdir as finished.

    The adapter is what the method keeps (`Method.settle`): what only training needed is gone.
    """
    kept, trained = method.settle(bench.params, trainable)
    pretrained.save_adapter(
        folder / "adapter", bench.model, kept, trained, params=bench.params,
        base_name=bases.name(experiment.model),
    )  # fmt: skip
    result = {
        "status": "finished",
        "metrics": metrics,
        "trainable_params": method.count(bench.params).total,
        "total_params": sum(
            int(np.prod(x.shape)) for x in partition.flatten(bench.params).values()
        ),
        "peak_memory_bytes": peak_memory_bytes(),
        **extra,
        "base_sha256": bases.sha256(experiment.model),
        "data": {"name": describe(experiment.data.source), "fingerprint": fingerprint},
        "seed": experiment.seed,
        "config": to_dict(experiment),
        **environment(),
    }
    write_json(folder / RESULT, result)
    return result


def describe(source: Any) -> str:
    """A source in words: its class and the fields that choose the data."""
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    return f"{type(source).__name__}({', '.join(f'{k}={v!r}' for k, v in fields.items() if v)})"


def peak_memory_bytes() -> int:
    """Of the accelerator where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return host.peak_bytes()


def show(bench: Workbench, predictions: Any, base_predictions: Any) -> None:
    """Some answers side by side; nothing for a classification."""
    if bench.task.head != "lm" or bench.by_loss:
        return
    for i, record in enumerate(bench.validation_records[: bench.experiment.evaluation.show]):
        base = f"   base: {base_predictions[i]}" if i < len(base_predictions) else ""
        wanted = bench.task.references(record)[0]
        prompt = bench.task.prompt(record, bench.tokenizer)
        print(f"{prompt}   wanted: {wanted}   adapted: {predictions[i]}{base}")


def check_free(folder: Path, config: dict[str, Any]) -> None:
    """UserError unless the workdir is yet to be made, or an unfinished one of this very config."""
    if (folder / RESULT).exists():
        raise UserError(f"{folder} holds a finished run: choose another --workdir or remove it")
    path = folder / "config.json"
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(config)):
        raise UserError(f"{folder} was begun with another config: choose another --workdir")


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Makes the workdir, once it is known that the config can be run."""
    check_free(folder, config)
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)


@functools.cache
def environment() -> Mapping[str, Any]:
    """Versions, device and git commit: what a number depends on besides its config.

    As they were when it was first asked: what this process imported then, it runs.
    """
    names = ("lora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "versions": {n: importlib.metadata.version(n) for n in names},
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "git_commit": _commit(),
    }


def software() -> str:
    """What `environment` says of packages and device, in a line."""
    found = environment()
    versions = (f"{name} {version}" for name, version in found["versions"].items())
    return ", ".join((f"Python {found['python']}", *versions, str(found["device"])))


def _commit() -> str | None:
    """None outside of a clone, and where git is not installed."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return None
    return found.stdout.strip() or None


def load_run(workdir: str | Path) -> tuple[Workbench, Any, Any]:
    """(workbench, method, trainable) of a finished workdir."""
    folder = Path(workdir)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no workdir: it has no config.json")
    if not (folder / RESULT).exists():
        raise UserError(f"{folder} holds no result yet: finish `lora-jax run` first")
    status = json.loads((folder / RESULT).read_text())["status"]
    if status != "finished":
        raise UserError(f"{folder} holds no adapter: {status}")
    bench = Workbench(from_dict(json.loads((folder / "config.json").read_text())))
    method, trainable = pretrained.load_adapter(folder / "adapter", bench.model, bench.params)
    return bench, method, trainable
