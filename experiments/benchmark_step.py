"""Time of one training step: lora_jax, LoRA by hand in JAX, full fine-tuning, PEFT on torch.

    python experiments/benchmark_step.py --out results/step.json

One setting for all: SmolLM2-135M, LoRA r=8 on query and value, loss on all tokens, AdamW. The arms
run in turn, and ratios are taken within a round. Limits: ours/hand 1.05, ours/full 0.62.
With --out a plot of the rounds is written beside the JSON file.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import benchmarking as bench
import hand_written
import jax
import jax.numpy as jnp
import numpy as np
import torch_peer

import lora_jax as lj
from lora_jax.training import OptimizerConfig, chunked_loss, init_state, make_optimizer, make_step

ARMS = ("ours", "hand", "full", "peft")
RANK, ALPHA, RATE = 8, 16.0, 1e-3
RATIOS = (("ours", "hand", 1.05), ("ours", "full", 0.62), ("ours", "peft", 1.05))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default=",".join(ARMS), help="which, separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unroll", type=int, default=1, help="layers per iteration, of ours")
    parser.add_argument("--out", type=Path, help="JSON file; a plot is written beside it")
    options = parser.parse_args()
    options.arms = options.arms.split(",")
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"no arm {', '.join(sorted(unknown))}; choose from {', '.join(ARMS)}")
    return options


def trainer_arm(model: Any, params: Any, method: Any, tokens: np.ndarray) -> tuple[Any, dict]:
    """An update of lora_jax's own training step, and what its compiler says."""
    tx = make_optimizer(OptimizerConfig(learning_rate=RATE, schedule="constant"), 1000)
    step = make_step(functools.partial(chunked_loss, model), method, tx)
    state, frozen = init_state(method, params, tx), method.dropped(params)
    batch = {"tokens": jnp.asarray(tokens), "loss_mask": jnp.ones(tokens.shape)}
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


def peft_arm(model: Any, params: Any, tokens: np.ndarray, dtype: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        lj.save_pretrained(folder, model, params)
        return torch_peer.make_update(
            folder, tokens, rank=RANK, alpha=ALPHA, learning_rate=RATE, dtype=dtype
        )


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
    print(f"wrote {path}")


def main() -> None:
    options = arguments()
    model, params = lj.load_pretrained(options.model, dtype=options.dtype, unroll=options.unroll)
    tokens = bench.token_batch(options.batch, options.length, model.config.vocab_size)
    lora = lj.LoRA(rank=RANK, alpha=ALPHA)
    arms: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in options.arms:
        if name == "ours":
            arms[name], figures[name] = trainer_arm(model, params, lora, tokens)
        elif name == "full":
            arms[name], figures[name] = trainer_arm(model, params, lj.FullFineTuning(), tokens)
        elif name == "hand":
            arms[name], figures[name] = hand_arm(model, params, lora, tokens)
        elif why := torch_peer.reason():
            left_out[name] = why
            print(f"arm {name} left out: {why}")
        else:
            arms[name] = peft_arm(model, params, tokens, options.dtype)

    losses = {name: arm() for name, arm in arms.items()}  # all start from the same function
    seconds = bench.interleaved(arms, options.rounds)
    print(f"{'arm':<6} {'s/step':>8} {'min':>8} {'max':>8} {'tokens/s':>9} {'compile s':>10} "
          f"{'GFLOP*':>8} {'GB*':>7} {'temp MB':>8} {'first loss':>11}")  # fmt: skip
    for name, values in seconds.items():
        s, f = bench.summary(values), figures.get(name)
        row = f"{name:<6} {s['median']:>8.3f} {s['min']:>8.3f} {s['max']:>8.3f}"
        row += f" {tokens.size / s['median']:>9.1f}"
        cells = ("", "", "", "") if f is None else (
            f"{f['compile_seconds']:.1f}", f"{f['flops_counting_loops_once'] / 1e9:.2f}",
            f"{f['bytes_accessed_counting_loops_once'] / 1e9:.2f}",
            f"{f['temporary_bytes'] / 1e6:.0f}",
        )  # fmt: skip
        row += " {:>10} {:>8} {:>7} {:>8}".format(*cells)
        print(f"{row} {losses[name]:>11.4f}")
    print("* XLA's own figures: the body of the loop over layers counts once")
    ratios = {f"{a}/{b}": bench.ratio(seconds, a, b) for a, b, _ in RATIOS}
    for one, other, limit in RATIOS:
        found = ratios[f"{one}/{other}"]
        print(bench.verdict(f"{one}/{other}", found and found["median"], limit))
    settings = {k: str(v) for k, v in vars(options).items() if k != "out"}
    results = {
        "settings": settings, "seconds": seconds, "compiled": figures, "ratios": ratios,
        "first_losses": losses, "left_out": left_out,
        "versions": bench.versions("jax", "flax", "torch", "transformers", "peft"),
    }  # fmt: skip
    bench.write_results(options.out, results)
    if options.out:
        plot(options.out.with_suffix(".png"), seconds)


if __name__ == "__main__":
    main()
