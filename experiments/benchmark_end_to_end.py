"""Training on E2E from text to updates: lora_jax packed, PEFT padded dynamically, PEFT packed.

    python experiments/benchmark_end_to_end.py --data FILE --out results/end_to_end.json

The first 2000 pairs, SmolLM2-135M, LoRA r=8 on query and value, loss on the completion, AdamW. A
step holds about as many examples in every arm: 4 rows of 128 packed tokens take 8.3 of them, the
padded batch 8. Both packed arms see the very same batches and start, so that their losses agree.

Each arm has a process of its own (see end_to_end_arms.py), and they take turns of some steps;
figures leave out compilation and first steps, which are reported apart. `--full` trains one epoch
of each arm. Default: about 5 minutes on 2 cores. `LIMITS` are what it aims at, in examples/s over
each arm; `results/` says what was reached.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# On a GPU the arms share its memory: JAX must not take most of it at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import benchmarking as bench
import end_to_end_arms as arms
import torch_peer
from end_to_end_arms import Settings

LIMITS = (("padded", 1.8), ("packed", 1.2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default="e2e_cleaned", help="CSV with mr and ref (may be .gz), or a TFDS name"
    )
    parser.add_argument("--pairs", type=int, default=2000, help="how many, from the first")
    parser.add_argument("--arms", default=",".join(arms.ARMS), help="separated by commas")
    parser.add_argument("--steps", type=int, default=20, help="of each arm")
    parser.add_argument("--turn", type=int, default=5, help="steps before the next arm's turn")
    parser.add_argument("--full", action="store_true", help="one epoch in place of --steps")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=4, help="of a packed step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a packed row")
    parser.add_argument("--batch", type=int, default=8, help="examples of a padded step")
    parser.add_argument("--chunk", type=int, default=128, help="positions of ours at the head")
    parser.add_argument("--unroll", type=int, help="layers per iteration of ours")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="PEFT; on a GPU by default"
    )
    parser.add_argument("--out", type=Path, help="JSON file; a plot is written beside it")
    options = parser.parse_args()
    options.arms = options.arms.split(",")
    if wrong := {*options.arms} - {*arms.ARMS}:
        parser.error(f"{', '.join(sorted(wrong))}: no such arm")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    import jax

    gpu = jax.default_backend() == "gpu"
    names = ("data", "model", "pairs", "rows", "length", "batch", "chunk", "unroll", "dtype")
    return Settings(
        **{name: getattr(options, name) for name in names},
        device="cuda" if gpu else "cpu",
        compiled=gpu if options.compile is None else options.compile,
    )


def take_turns(
    built: dict[str, bench.Process], steps: int, done: Callable[[list[dict[str, float]]], bool]
) -> dict[str, list[dict[str, float]]]:
    """Turns of `steps` updates, arm after arm, until `done` says of each that it has enough."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in built}
    number = 0
    while waiting := [name for name in built if not done(turns[name])]:
        shift = number % len(waiting)  # no arm always runs after the same one
        for name in waiting[shift:] + waiting[:shift]:
            time.sleep(bench.REST)
            turn = built[name].ask("turn", steps=steps)
            turns[name].append(turn)
            rate = turn["examples"] / turn["seconds"]
            print(f"turn {number + 1}, {name}: {rate:.2f} examples/s, loss {turn['loss']:.3f}",
                  flush=True)  # fmt: skip
        number += 1
    return turns


def rates(turns: list[dict[str, float]]) -> dict[str, Any]:
    """Of one arm: figures a second by turns, and of all turns together."""
    seconds = sum(t["seconds"] for t in turns)
    totals = {key: sum(t[key] for t in turns) for key in ("steps", "examples", "tokens", "slots")}
    return {
        **{
            f"{key}_per_second": bench.summary([t[key] / t["seconds"] for t in turns])
            for key in ("examples", "tokens")
        },
        "overall_examples_per_second": totals["examples"] / seconds,
        "overall_tokens_per_second": totals["tokens"] / seconds,
        "fill": totals["tokens"] / totals["slots"],
        "seconds": seconds,
        **totals,
        "last_loss": turns[-1]["loss"],
    }


def measured(options: argparse.Namespace, folder: Path, examples: int) -> dict[str, Any]:
    """Figures of the arms, in turns."""
    with contextlib.ExitStack() as stack:
        built = {
            name: stack.enter_context(bench.Process("end_to_end_arms.py", name, folder))
            for name in options.arms
        }
        first = {name: arm.ask("turn", steps=1) for name, arm in built.items()}

        def done(turns: list[dict[str, float]]) -> bool:
            if options.full:
                return sum(t["examples"] for t in turns) >= examples
            return sum(t["steps"] for t in turns) >= options.steps

        turns = take_turns(built, options.turn, done)
        found = {
            what: {name: arm.ask(what) for name, arm in built.items()}
            for what in ("compile_seconds", "memory", "save")
        }
    per_example = {n: [t["seconds"] / t["examples"] for t in of] for n, of in turns.items()}
    rounds = min(len(of) for of in turns.values())
    cut = {n: of[:rounds] for n, of in per_example.items()}
    return {
        "rates": {name: rates(of) for name, of in turns.items()},
        "speed_up": {other: bench.ratio(cut, other, "ours") for other, _ in LIMITS},
        "first_step_seconds": {name: turn["seconds"] for name, turn in first.items()},
        "compile_seconds": found["compile_seconds"],
        "adapter_bytes": found["save"],
        "memory": found["memory"],
        "turns": turns,
    }


def report(found: dict[str, Any]) -> None:
    print(f"{'arm':<8} {'examples/s':>10} {'min':>6} {'max':>6} {'real tokens/s':>13} "
          f"{'fill':>5} {'per step':>8} {'compile s':>9} {'first s':>8} "
          f"{'adapter B':>10} {'last loss':>9} {'peak MiB':>8}")  # fmt: skip
    for name, r in found["rates"].items():
        s = r["examples_per_second"]
        print(f"{name:<8} {s['median']:>10.2f} {s['min']:>6.2f} {s['max']:>6.2f} "
              f"{r['tokens_per_second']['median']:>13.1f} {r['fill']:>5.2f} "
              f"{r['examples'] / r['steps']:>8.2f} {found['compile_seconds'][name]:>9.1f} "
              f"{found['first_step_seconds'][name]:>8.1f} {found['adapter_bytes'][name]:>10} "
              f"{r['last_loss']:>9.3f} {found['memory'][name]['peak'] / 2**20:>8.0f}")  # fmt: skip
    for other, limit in LIMITS:
        value = found["speed_up"][other]
        line = bench.verdict(f"ours/{other}", value and value["median"], limit, least=True)
        print(f"{line}, examples/s, median of rounds")


def plot(path: Path, turns: dict[str, list[dict[str, float]]]) -> None:
    """Examples a second by turn, and the loss over the examples seen."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for name, of in turns.items():
        left.plot([t["examples"] / t["seconds"] for t in of], marker="o", label=name)
        seen = np.cumsum([t["examples"] for t in of])
        right.plot(seen, [t["loss"] for t in of], marker="o", label=name)
    left.set(xlabel="turn", ylabel="examples a second", ylim=(0, None))
    right.set(xlabel="examples seen", ylabel="loss, nats a token")
    left.legend()
    figure.savefig(path)
    pyplot.close(figure)
    print(f"wrote {path}")


def main() -> None:
    options = arguments()
    why, left_out = torch_peer.reason(), {}
    if why:
        left_out = {name: why for name in options.arms if name != "ours"}
        options.arms = [name for name in options.arms if name == "ours"]
        print("".join(f"arm {name} left out: {why}\n" for name in left_out), end="")
    settings = settings_of(options)
    results: dict[str, Any] = {
        "settings": vars(settings), "left_out": left_out, "load_before": bench.warn_if_busy(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        examples = arms.prepare(settings, folder)
        results |= {"examples": examples, **measured(options, folder, examples)}
    import jax

    packages = ("lora-jax", "jax", "flax", "grain", "torch", "transformers", "peft")
    results |= bench.context(jax.devices()[0].device_kind, *packages)
    report(results)
    bench.write_results(options.out, results)
    if options.out:
        plot(options.out.with_suffix(".png"), results["turns"])


if __name__ == "__main__":
    main()
