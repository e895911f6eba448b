"""Time of one training step: lora_jax, LoRA by hand in JAX, full fine-tuning, PEFT on torch.

    python experiments/benchmark_step.py --out results/step.json
    python experiments/benchmark_step.py --model minilm-l6 --out results/step_minilm.json

LoRA r=8 on query and value, AdamW. A decoder (SmolLM2-135M) trains on 4 rows of 128 tokens, with
loss on all; an encoder (MiniLM-L6) classifies 32 texts of 32 to 64 tokens into 2 labels, its last
layer trained whole, as PEFT does. The arms run in turn, and ratios are taken within a round.
Limits: ours/hand 1.05, ours/full 0.62 (decoder), ours/peft 0.95 (1.05 times the tokens a second).

Those in JAX share a process, whose memory glibc keeps as in every `lora-jax` command
(`lora_jax.host.keep_memory`); PEFT has a process with torch's and glibc's defaults. Set
MALLOC_TOP_PAD_=67108864 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_MAX_=0 MALLOC_ARENA_MAX=1 to
give both that memory.
With --out a plot of the rounds is written beside the JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

# On a GPU PEFT's process shares the memory: JAX must not take most of it at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import benchmarking as bench
import hand_written
import jax
import jax.numpy as jnp
import numpy as np
import torch_peer

import lora_jax as lj
from lora_jax import host
from lora_jax.models import family_for
from lora_jax.pretrained.load import open_source
from lora_jax.training import (
    OptimizerConfig,
    chunked_loss,
    classification_loss,
    init_state,
    make_optimizer,
    make_step,
)

ARMS = ("ours", "hand", "full", "peft")
DEFAULT_ARMS = {"lm": ARMS, "classification": ("ours", "peft")}
DEFAULT_SHAPE = {"lm": (4, 128), "classification": (32, 64)}
LABELS = 2
RANK, ALPHA, RATE = 8, 16.0, 1e-3
RATIOS = (("ours", "hand", 1.05), ("ours", "full", 0.62), ("ours", "peft", 0.95))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", help="which of ours,hand,full,peft; without: what fits the model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, help="rows")
    parser.add_argument("--length", type=int, help="tokens a row")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unroll", type=int, help="layers per iteration, of ours")
    parser.add_argument("--out", type=Path, help="JSON file; a plot is written beside it")
    options = parser.parse_args()
    options.head = head_of(options.model)
    rows, length = DEFAULT_SHAPE[options.head]
    options.batch, options.length = options.batch or rows, options.length or length
    options.arms = (options.arms or ",".join(DEFAULT_ARMS[options.head])).split(",")
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"no arm {', '.join(sorted(unknown))}; choose from {', '.join(ARMS)}")
    if options.head != "lm" and "hand" in options.arms:
        parser.error("the arm hand is a Llama")
    return options


def head_of(source: str) -> str:
    """What the model is trained for here: encoders classify."""
    kind = open_source(source).config["model_type"]
    return "lm" if family_for(kind).module.causal else "classification"


def batch_of(options: argparse.Namespace, vocabulary: int) -> dict[str, np.ndarray]:
    """One batch, as lora_jax's losses take it."""
    tokens = bench.token_batch(options.batch, options.length, vocabulary)
    if options.head == "lm":
        return {"tokens": tokens, "loss_mask": np.ones(tokens.shape, np.float32)}
    draw = np.random.default_rng(1)
    lengths = draw.integers(options.length // 2, options.length + 1, options.batch)
    return {
        "tokens": tokens,
        "attention_mask": (np.arange(options.length)[None] < lengths[:, None]).astype(np.int32),
        "token_type_ids": np.zeros(tokens.shape, np.int32),
        "labels": draw.integers(0, LABELS, options.batch).astype(np.int32),
        "weights": np.ones(options.batch, np.float32),
    }


def trainer_arm(head: str, model: Any, params: Any, method: Any, batch: Any) -> tuple[Any, dict]:
    """An update of lora_jax's own training step, and what its compiler says."""
    tx = make_optimizer(OptimizerConfig(learning_rate=RATE, schedule="constant"), 1000)
    loss = chunked_loss if head == "lm" else classification_loss
    step = make_step(functools.partial(loss, model), method, tx)
    state, frozen = init_state(method, params, tx), method.frozen(params)
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    compiled, seconds = bench.compile_timed(step, frozen, state, batch)

    def run() -> float:
        nonlocal state
        state, metrics = compiled(frozen, state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return run, bench.compiled_figures(compiled, seconds)


def hand_arm(model: Any, params: Any, method: Any, tokens: np.ndarray) -> tuple[Any, dict]:
    tx = make_optimizer(OptimizerConfig(learning_rate=RATE, schedule="constant"), 1000)
    factors = hand_written.factors_of(model.config, method.init(jax.random.key(0), params))
    step = hand_written.make_step(model.config, ALPHA / RANK, tx)
    state, batch = (factors, tx.init(factors)), jnp.asarray(tokens)
    compiled, seconds = bench.compile_timed(step, params, state, batch)

    def run() -> float:
        nonlocal state
        state, loss = compiled(params, state, batch)
        jax.block_until_ready(state)
        return float(loss)

    return run, bench.compiled_figures(compiled, seconds)


def peft_arm(options: argparse.Namespace, model: Any, params: Any, batch: Any) -> bench.Process:
    """PEFT, loaded and waiting."""
    inputs = torch_peer.all_tokens(batch["tokens"])
    if options.head != "lm":
        names = {"tokens": "input_ids", "attention_mask": "attention_mask",
                 "token_type_ids": "token_type_ids", "labels": "labels"}  # fmt: skip
        inputs = {theirs: batch[name].astype(np.int64) for name, theirs in names.items()}
    gpu = jax.default_backend() == "gpu"
    with tempfile.TemporaryDirectory() as scratch:
        base, stored = Path(scratch) / "base", Path(scratch) / "batch.npz"
        lj.save_pretrained(base, model, params)
        np.savez(stored, **inputs)
        settings = {
            "folder": str(base), "head": options.head, "rank": RANK, "alpha": ALPHA,
            "learning_rate": RATE, "dtype": options.dtype, "device": "cuda" if gpu else "cpu",
            "compiled": gpu,
        }  # fmt: skip
        peer = bench.Process("torch_peer.py", json.dumps(settings), stored)
        peer.ask("parameters")  # the files are read
    return peer


def plot(path: Path, seconds: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for name, values in seconds.items():
        axes.plot(range(1, len(values) + 1), values, marker="o", label=name)
    axes.set(xlabel="round", ylabel="seconds a step", ylim=(0, None))
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)
    print(f"wrote {path}")


def build(
    options: argparse.Namespace,
    model: Any,
    params: Any,
    batch: Any,
    processes: contextlib.ExitStack,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, int], dict[str, str]]:
    """(arms, what the compiler said of JAX's, trained parameters, arms left out and why)."""
    # As PEFT for sequence classification: the layer that gives the scores is trained whole.
    whole = () if options.head == "lm" else (r"^head/out",)
    lora = lj.LoRA(rank=RANK, alpha=ALPHA, train=whole)
    arms: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    counts: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name in options.arms:
        if name in ("ours", "full"):
            method = lora if name == "ours" else lj.FullFineTuning()
            arms[name], figures[name] = trainer_arm(options.head, model, params, method, batch)
            counts[name] = method.count(params).total
        elif name == "hand":
            arms[name], figures[name] = hand_arm(model, params, lora, batch["tokens"])
        elif why := torch_peer.reason():
            left_out[name] = why
            print(f"arm {name} left out: {why}")
        else:
            peer = processes.enter_context(peft_arm(options, model, params, batch))
            arms[name] = functools.partial(peer.ask, "update")
            counts[name] = peer.ask("parameters")
    return arms, figures, counts, left_out


def table(seconds: Any, figures: Any, losses: Any, tokens: int) -> None:
    print(f"{'arm':<6} {'s/step':>8} {'min':>8} {'max':>8} {'tokens/s':>9} {'compile s':>10} "
          f"{'GFLOP*':>8} {'GB*':>7} {'temp MB':>8} {'first loss':>11}")  # fmt: skip
    for name, values in seconds.items():
        s, f = bench.summary(values), figures.get(name)
        row = f"{name:<6} {s['median']:>8.3f} {s['min']:>8.3f} {s['max']:>8.3f}"
        row += f" {tokens / s['median']:>9.1f}"
        cells = ("", "", "", "") if f is None else (
            f"{f['compile_seconds']:.1f}", f"{f['flops_counting_loops_once'] / 1e9:.2f}",
            f"{f['bytes_accessed_counting_loops_once'] / 1e9:.2f}",
            f"{f['temporary_bytes'] / 1e6:.0f}",
        )  # fmt: skip
        row += " {:>10} {:>8} {:>7} {:>8}".format(*cells)
        print(f"{row} {losses[name]:>11.4f}")
    print("* XLA's own figures: the body of the loop over layers counts once")


def main() -> None:
    kept = host.keep_memory()
    options = arguments()
    load = bench.warn_if_busy()
    head = {} if options.head == "lm" else {"head": options.head, "num_labels": LABELS}
    model, params = lj.load_pretrained(
        options.model, dtype=options.dtype, unroll=options.unroll, **head
    )
    batch = batch_of(options, model.config.vocab_size)
    with contextlib.ExitStack() as processes:
        arms, figures, counts, left_out = build(options, model, params, batch, processes)
        losses = {name: arm() for name, arm in arms.items()}  # all start from the same function
        seconds = bench.interleaved(arms, options.rounds)
    table(seconds, figures, losses, batch["tokens"].size)
    ratios = {f"{a}/{b}": bench.ratio(seconds, a, b) for a, b, _ in RATIOS}
    for one, other, limit in RATIOS:
        found = ratios[f"{one}/{other}"]
        if {one, other} <= {*options.arms}:
            print(bench.verdict(f"{one}/{other}", found and found["median"], limit))
    settings = {k: str(v) for k, v in vars(options).items() if k != "out"}
    results = {
        "settings": settings, "seconds": seconds, "compiled": figures, "ratios": ratios,
        "first_losses": losses, "trainable_parameters": counts, "left_out": left_out,
        "load_before": load, "keep_memory": kept,
        "summary": {name: bench.summary(values) for name, values in seconds.items()},
        **bench.context(
            jax.devices()[0].device_kind, "jax", "flax", "torch", "transformers", "peft"
        ),
    }  # fmt: skip
    bench.write_results(options.out, results)
    if options.out:
        plot(options.out.with_suffix(".png"), seconds)


if __name__ == "__main__":
    main()
