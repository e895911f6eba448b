"""Compile time of the training step at few and at many layers: a scanned stack should not care.

    python experiments/benchmark_compile.py --out results/compile.json

Each measurement is tracing, lowering and compiling in this process, with no compilation cache;
layer counts take turns. Limit: 48 layers take at most 1.3 times what 6 take.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import benchmarking as bench
import jax
import jax.numpy as jnp

import lora_jax as lj
from lora_jax.models.llama import Llama, LlamaConfig
from lora_jax.training import OptimizerConfig, chunked_loss, init_state, make_optimizer, make_step

LIMIT = 1.3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=2, default=(6, 48))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args()


def compile_step(layers: int, rows: int, length: int) -> float:
    """Seconds to compile a LoRA step of a small Llama; no weight is ever made."""
    jax.clear_caches()
    config = LlamaConfig(
        vocab_size=4096, hidden_size=192, num_layers=layers, num_heads=6, num_kv_heads=2,
        head_dim=32, mlp_size=512,
    )  # fmt: skip
    model, method = Llama(config), lj.LoRA(rank=8)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    tx = make_optimizer(OptimizerConfig(), 1000)
    state: Any = jax.eval_shape(functools.partial(init_state, method, tx=tx), params)
    step = make_step(functools.partial(chunked_loss, model), method, tx)
    batch = {"tokens": tokens, "loss_mask": jax.ShapeDtypeStruct((rows, length), jnp.float32)}
    return bench.compile_timed(step, method.frozen(params), state, batch)[1]


def main() -> None:
    options = arguments()
    jax.config.update("jax_enable_compilation_cache", False)
    few, many = options.layers
    compile_step(few, options.batch, options.length)  # imports and first uses
    seconds: dict[str, list[float]] = {str(few): [], str(many): []}
    for number in range(options.rounds):
        order = (few, many) if number % 2 == 0 else (many, few)
        for layers in order:
            took = compile_step(layers, options.batch, options.length)
            seconds[str(layers)].append(took)
    for layers, values in seconds.items():
        print("{:>3} layers: {median:.2f} s ({min:.2f} to {max:.2f})".format(
            layers, **bench.summary(values)))  # fmt: skip
    found = bench.ratio(seconds, str(many), str(few))
    print(bench.verdict(f"{many}/{few} layers", found and found["median"], LIMIT))
    results = {"seconds": seconds, "ratio": found, "versions": bench.versions("jax", "flax")}
    bench.write_results(options.out, results)


if __name__ == "__main__":
    main()
