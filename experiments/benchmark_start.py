"""From the start of a process to the end of its first update; and what imports take.

    python experiments/benchmark_start.py --out results/start.json

Each measurement is a process of its own: lora_jax with an empty compilation cache (cold) and with
the one that the cold start left (second), PEFT on torch from a folder of the same weights, and the
bare imports of lora_jax and flax.linen. Limits: second start 9.3 s, import 1.5 times flax's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import benchmarking as bench
import torch_peer

START_LIMIT, IMPORT_LIMIT = 9.3, 1.5  # seconds; times flax.linen
HERE = Path(__file__).parent

OURS = """
import functools, os, sys
import jax, jax.numpy as jnp
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
import lora_jax as lj
from lora_jax.training import OptimizerConfig, chunked_loss, init_state, make_optimizer, make_step
import benchmarking
model, params = lj.load_pretrained(sys.argv[1])
method = lj.LoRA(rank=8, alpha=16)
tx = make_optimizer(OptimizerConfig(learning_rate=1e-3, schedule="constant"), 1000)
tokens = benchmarking.token_batch(4, 128, model.config.vocab_size)
state = init_state(method, params, tx)
step = make_step(functools.partial(chunked_loss, model), method, tx)
batch = {"tokens": jnp.asarray(tokens), "loss_mask": jnp.ones(tokens.shape)}
state, metrics = step(method.frozen(params), state, batch)
print(float(metrics["loss"]))
"""

PEFT = """
import sys
import benchmarking, torch_peer
tokens = benchmarking.token_batch(4, 128, int(sys.argv[2]))
update = torch_peer.make_update(
    sys.argv[1], tokens, rank=8, alpha=16, learning_rate=1e-3, dtype="float32"
)
print(update())
"""

FOLDER = """
import sys
import lora_jax as lj
model, params = lj.load_pretrained(sys.argv[1])
lj.save_pretrained(sys.argv[2], model, params)
print(model.config.vocab_size)
"""
IMPORTS = {
    "import lora_jax": "import lora_jax as lj; lj.LoRA; lj.adapt; lj.load_pretrained",
    "import flax.linen": "import flax.linen",
}


def timed(code: str, *args: str) -> tuple[float, str]:
    """(seconds, last line of output) of a process of its own; its error ends this one."""
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    return time.perf_counter() - start, (done.stdout.strip().splitlines() or [""])[-1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    seconds: dict[str, list[float]] = {}
    why = torch_peer.reason()
    if why:
        print(f"arm peft left out: {why}")
    with tempfile.TemporaryDirectory() as scratch:
        # Both read the same folder: ours could read the packaged file, PEFT could not.
        weights = str(Path(scratch) / "weights")
        vocabulary = timed(FOLDER, options.model, weights)[1]
        for number in range(options.rounds):
            cache = str(Path(scratch) / f"cache{number}")
            runs = {"ours, cold": (OURS, weights, cache), "ours, second": (OURS, weights, cache)}
            if why is None:
                runs["peft"] = (PEFT, weights, vocabulary)
            runs |= {name: (code,) for name, code in IMPORTS.items()}
            for name, command in runs.items():
                seconds.setdefault(name, []).append(timed(*command)[0])
    for name, values in seconds.items():
        print("{:<18} {median:.2f} s ({min:.2f} to {max:.2f})".format(
            name, **bench.summary(values)))  # fmt: skip
    imports = bench.ratio(seconds, *IMPORTS)
    second = bench.summary(seconds["ours, second"])["median"]
    print(bench.verdict("second start, s", second, START_LIMIT))
    print(bench.verdict("import, of flax.linen's", imports and imports["median"], IMPORT_LIMIT))
    packages = ("jax", "flax", "torch", "transformers", "peft")
    results = {
        "seconds": seconds, "import_ratio": imports,
        "left_out": {"peft": why} if why else {}, "versions": bench.versions(*packages),
    }  # fmt: skip
    bench.write_results(options.out, results)


if __name__ == "__main__":
    main()
