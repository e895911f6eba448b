"""The arms of benchmark_end_to_end: data, updates, and what each of them got done.

    python experiments/end_to_end_arms.py ARM FOLDER

is an arm in a process of its own, which answers a `benchmarking.Process`; FOLDER is what `prepare`
made. Ours keeps its memory as every `lora-jax` command does (`lora_jax.host.keep_memory`), and has
to pack its batches; PEFT's arms read theirs, load no JAX, and have torch's and glibc's defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import benchmarking as bench
import numpy as np
import torch_peer

from lora_jax import host

ARMS = ("ours", "padded", "packed")
Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all arms share.

    `rows` x `length` tokens is a step of the packed arms, `batch` examples one of the padded arm.
    """

    data: str
    model: str
    pairs: int
    rows: int
    length: int
    batch: int
    chunk: int
    unroll: int | None
    dtype: str
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 1e-3
    device: str = "cpu"
    compiled: bool = False
    seed: int = 0


class Counted(Iterator[Batch]):
    """Batches as they come, with a running count of what was in them."""

    def __init__(self, batches: Iterator[Batch], convert: Callable[[Batch], Batch] | None = None):
        self._batches, self._convert = batches, convert
        self.examples = self.tokens = self.slots = 0

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if "segment_ids" in batch:
            segments = batch["segment_ids"]
            self.examples += int(segments.max(axis=1).sum())
            self.tokens += int(np.count_nonzero(segments))
        else:
            self.examples += len(batch["attention_mask"])
            self.tokens += int(batch["attention_mask"].sum())
        self.slots += int(batch.get("tokens", batch.get("input_ids")).size)  # type: ignore[union-attr]
        return batch if self._convert is None else self._convert(batch)


@dataclasses.dataclass
class Arm:
    """Something that trains. `train(steps)` waits for the last update and gives the losses."""

    batches: Counted
    train: Callable[[int], list[float]]
    save: Callable[[Path], None]
    compile_seconds: float = 0.0

    def turn(self, steps: int) -> dict[str, float]:
        """Trains for some steps: seconds, and the examples, real tokens and slots they held."""
        at = self.batches
        before = at.examples, at.tokens, at.slots
        start, cpu = time.perf_counter(), time.process_time()
        losses = self.train(steps)
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "steps": steps,
            "examples": at.examples - before[0],
            "tokens": at.tokens - before[1],
            "slots": at.slots - before[2],
            "loss": float(np.mean(losses)),
        }


def records(settings: Settings) -> Sequence[Any]:
    """The first pairs of a file with the columns mr and ref, or of a TFDS data set."""
    from lora_jax.data import sources

    if Path(settings.data).suffix in (".csv", ".gz", ".jsonl"):
        return sources.Files(settings.data, split=f"[:{settings.pairs}]").open()
    return sources.TFDS(settings.data, split=f"train[:{settings.pairs}]").open()


def examples(settings: Settings, tokenizer: Any) -> list[Any]:
    """Tokens and loss masks: loss on the completion and its end token."""
    from lora_jax.data.packing import prepare as checked
    from lora_jax.data.tasks.e2e import E2E

    found: Any = E2E().examples(records(settings), tokenizer)
    return checked(found, length=settings.length)


def packed_batches(settings: Settings, found: list[Any], pad_id: int) -> Iterator[Batch]:
    """lora_jax's packed batches, for both packed arms."""
    from lora_jax.data import loader

    return loader.batches(
        found, batch_size=settings.rows, length=settings.length, packing=True,
        seed=settings.seed, pad_id=pad_id,
    )  # fmt: skip


def ours(settings: Settings, folder: Path) -> Arm:
    """lora_jax's loader, step and loop, as `lora-jax run` puts them together."""
    import lora_jax as lj
    from lora_jax import pretrained, training

    s, weights = settings, folder / "weights"
    tokenizer = pretrained.load_tokenizer(weights)
    found = examples(settings, tokenizer)
    model, params = lj.load_pretrained(weights, dtype=s.dtype, unroll=s.unroll)
    method = lj.LoRA(rank=s.rank, alpha=s.alpha)
    tx = training.make_optimizer(
        training.OptimizerConfig(learning_rate=s.learning_rate, schedule="constant"), s.pairs
    )
    state, frozen = training.init_state(method, params, tx, seed=s.seed), method.frozen(params)
    loss = functools.partial(training.chunked_loss, model, chunk=s.chunk)
    step = training.make_step(loss, method, tx)
    first = next(packed_batches(s, found, tokenizer.pad_id))
    compiled, seconds = bench.compile_timed(step, frozen, state, first)
    batches = Counted(packed_batches(s, found, tokenizer.pad_id))

    def train(steps: int) -> list[float]:
        nonlocal state
        losses = []

        def recorded(frozen: Any, state: Any, batch: Batch) -> Any:
            state, metrics = compiled(frozen, state, batch)
            losses.append(metrics["loss"])
            return state, metrics

        fitted = training.fit(recorded, frozen, state, batches, steps=steps, progress=False)
        state = fitted.state
        return [float(x) for x in losses]

    def save(to: Path) -> None:
        lj.save_adapter(to, model, method, state.trainable, params=params)

    return Arm(batches, train, save, seconds)


def peft(name: str, settings: Settings, folder: Path) -> Arm:
    """PEFT on torch, from the start that lora_jax drew."""
    s = settings
    convert = torch_peer.packed if name == "packed" else None
    batches = Counted(_stored(folder / f"{name}.npz"), convert)
    trainer = torch_peer.Trainer(
        folder / "weights", adapter=folder / "start", rank=s.rank, alpha=s.alpha,
        learning_rate=s.learning_rate, dtype=s.dtype, device=s.device, compiled=s.compiled,
    )  # fmt: skip
    return Arm(batches, functools.partial(trainer.train, batches), trainer.save_adapter)


def prepare(settings: Settings, folder: Path) -> int:
    """Writes weights, start, settings and PEFT's batches of two epochs; the number of examples.

    Two, since the last turn of an epoch may go on into the next.
    """
    import jax

    import lora_jax as lj
    from lora_jax import pretrained, training

    tokenizer = pretrained.load_tokenizer(settings.model)
    found = examples(settings, tokenizer)
    model, params = lj.load_pretrained(settings.model, dtype=settings.dtype)
    lj.save_pretrained(folder / "weights", model, params, tokenizer_source=settings.model)
    method = lj.LoRA(rank=settings.rank, alpha=settings.alpha)
    start = method.init(training.stream(settings.seed, "init"), params)
    lj.save_adapter(
        folder / "start", model, method, jax.device_get(start), params=params,
        base_name=str(folder / "weights"),
    )  # fmt: skip
    pad_id = tokenizer.pad_id
    packed = Counted(packed_batches(settings, found, pad_id))
    _store(folder / "packed.npz", _until(packed, 2 * len(found)))
    padded = Counted(torch_peer.padded(found, settings.batch, seed=settings.seed, pad_id=pad_id))
    _store(folder / "padded.npz", _until(padded, 2 * len(found)))
    (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(settings)))
    return len(found)


def _until(batches: Counted, examples: int) -> list[Batch]:
    """Batches until so many examples were in them."""
    chosen: list[Batch] = []
    while batches.examples < examples:
        chosen.append(next(batches))
    return chosen


def _store(path: Path, batches: Sequence[Batch]) -> None:
    np.savez(path, **{f"{i}/{name}": x for i, b in enumerate(batches) for name, x in b.items()})


def _stored(path: Path) -> Iterator[Batch]:
    """The batches of a file, again and again."""
    with np.load(path) as file:
        names = sorted(file.files, key=lambda name: int(name.split("/")[0]))
        grouped = itertools.groupby(names, key=lambda name: name.split("/")[0])
        stored = [{name.split("/")[1]: file[name] for name in group} for _, group in grouped]
    return itertools.cycle(stored)


def answer(name: str, folder: Path) -> None:
    """Answers a `benchmarking.Process` with what one arm does, and what memory that took."""
    settings = Settings(**json.loads((folder / "settings.json").read_text()))
    if name == "ours":
        host.keep_memory()
        arm = ours(settings, folder)
    else:
        arm = peft(name, settings, folder)
    before = host.peak_bytes()

    def save() -> int:
        """Bytes of the adapter."""
        arm.save(folder / f"adapter_{name}")
        return (folder / f"adapter_{name}" / "adapter_model.safetensors").stat().st_size

    def memory() -> dict[str, Any]:
        return {"before_training": before, "peak": host.peak_bytes(),
                "device_peak": _device_peak(name, settings.device)}  # fmt: skip

    bench.serve({"turn": arm.turn, "save": save, "memory": memory,
                 "compile_seconds": lambda: arm.compile_seconds})  # fmt: skip


def _device_peak(name: str, device: str) -> int | None:
    if device == "cpu":
        return None
    if name == "ours":
        import jax

        return int((jax.local_devices()[0].memory_stats() or {})["peak_bytes_in_use"])
    import torch

    return int(torch.cuda.max_memory_allocated())


if __name__ == "__main__":
    answer(sys.argv[1], Path(sys.argv[2]))
