"""A sweep as one program, against one process a member: lora_jax packed, lora_jax alone, PEFT.

    python experiments/benchmark_sweep.py --out results/sweep.json

Members differ in rank and learning rate of LoRA on query and value of a small BERT (random
weights, a classifier of two words, written to a folder first). All arms see the same texts, batch
size, updates and number of evaluated texts. `packed` is one `lora-jax sweep`; `alone` starts
`lora-jax run` for each member; `peft` starts a process with transformers and PEFT for each.
Total time is what a user waits; steady is the time of the updates alone, as each arm reports it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import benchmarking as bench
import numpy as np
import torch_peer

from lora_jax import host

RANKS, RATES = (2, 4, 8, 16), (1e-4, 3e-4, 1e-3, 3e-3)
WORDS, TEXTS, HELD_OUT = 200, 2048, 256
LENGTH = 24  # words of a text
ARMS = ("packed", "alone", "peft")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--members", type=int, default=16, help="at most 16")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--mode", default="auto", help="of the sweep: auto, packed or serial")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peft-member", nargs=3, metavar=("FOLDER", "RANK", "RATE"),
                        help=argparse.SUPPRESS)  # fmt: skip
    return parser.parse_args()


def write_base(folder: Path, options: argparse.Namespace) -> None:
    """A BERT of random weights with a word tokenizer, as transformers reads it."""
    import jax
    import tokenizers

    from lora_jax import pretrained

    hf = {
        "model_type": "bert", "architectures": ["BertForSequenceClassification"],
        "vocab_size": WORDS + 4, "hidden_size": options.width, "num_labels": 2,
        "intermediate_size": 4 * options.width, "num_hidden_layers": options.layers,
        "num_attention_heads": max(2, options.width // 32), "hidden_act": "gelu",
        "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    model = pretrained.build_model(hf, {"head": "classification", "num_labels": 2})
    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    pretrained.save_pretrained(folder, model, params)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS))]
    level = tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(level)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]",
               "sep_token": "[SEP]"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def write_texts(path: Path) -> None:
    """Texts of random words; the label is whether more of them come from the first half."""
    draw = np.random.default_rng(0)
    lines = []
    for _ in range(TEXTS + HELD_OUT):
        low = draw.random(LENGTH) < draw.uniform(0.2, 0.8)
        words = np.where(low, draw.integers(0, WORDS // 2, LENGTH),
                         draw.integers(WORDS // 2, WORDS, LENGTH))  # fmt: skip
        label = int(low.mean() > 0.5)
        lines.append(json.dumps({"text": " ".join(f"w{i}" for i in words), "label": label}))
    path.write_text("\n".join(lines))


def write_config(path: Path, folder: Path, options: argparse.Namespace) -> None:
    config = {
        "model": {"source": str(folder / "base")},
        "method": {"kind": "lora", "rank": 8, "alpha": 16.0, "train": ["^head/out"]},
        "data": {
            "source": {"kind": "files", "path": str(folder / "texts.jsonl"),
                       "split": f"[:{TEXTS}]"},
            "task": {"kind": "classification", "labels": ["0", "1"]},
            "validation": f"[{TEXTS}:]", "batch_size": options.batch, "length": 32,
            "packing": False,
        },
        "optimizer": {"name": "adamw", "schedule": "constant"},
        "training": {"steps": options.steps, "log_every": options.steps},
    }  # fmt: skip
    rates, ranks = _grid(options)
    path.write_text(
        f"""def get_config():
    return {config!r}

def sweep_rank():
    for rank in {ranks!r}:
        yield {{"method.rank": rank, "method.alpha": 2.0 * rank}}

def sweep_rate():
    for rate in {rates!r}:
        yield {{"optimizer.learning_rate": rate}}
"""
    )


def _grid(options: argparse.Namespace) -> tuple[list[float], list[int]]:
    rates = list(RATES[: max(1, min(4, options.members))])
    return rates, list(RANKS[: max(1, options.members // len(rates))])


def timed(command: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = done.stdout[-2000:] + done.stderr[-4000:]
        raise SystemExit(f"{' '.join(command)} failed:\n{tail}")
    return time.perf_counter() - began


def cli(*command: str) -> list[str]:
    return [sys.executable, "-m", "lora_jax.cli", *command]


def packed(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    work = folder / "sweep"
    command = cli("sweep", str(folder / "config.py"), "--workdir", str(work), "--quiet",
                       "--mode", options.mode)  # fmt: skip
    total = timed(command)
    result = json.loads((work / "result.json").read_text())
    members = [json.loads(p.read_text()) for p in work.glob("members/*/result.json")]
    tokens = [m["tokens_per_second"] for m in members]
    return {
        "total": total, "members": len(members), "programs": result["programs_compiled"],
        "modes": result["modes"], "slots": members[0]["slots"],
        "updates_seconds": result["update_seconds"],
        "accuracy": max(m["metrics"]["accuracy"] for m in members),
        "peak_bytes": max(m["peak_memory_bytes"] for m in members), "tokens_per_second": tokens,
    }  # fmt: skip


def alone(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    rates, ranks = _grid(options)
    total, updates, accuracy, peak = 0.0, 0.0, [], []
    for number, (rank, rate) in enumerate((r, t) for r in ranks for t in rates):
        work = folder / f"run{number}"
        total += timed(
            cli("run", str(folder / "config.py"), "--workdir", str(work), "--quiet",
                     f"--config.method.rank={rank}", f"--config.method.alpha={2.0 * rank}",
                     f"--config.optimizer.learning_rate={rate}")
        )  # fmt: skip
        result = json.loads((work / "result.json").read_text())
        tokens = options.steps * options.batch * (LENGTH + 2)
        updates += tokens / result["tokens_per_second"]
        accuracy.append(result["metrics"]["accuracy"])
        peak.append(result["peak_memory_bytes"])
    return {"total": total, "members": len(accuracy), "updates_seconds": updates,
            "accuracy": max(accuracy), "peak_bytes": max(peak)}  # fmt: skip


def peft(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    rates, ranks = _grid(options)
    total, updates, accuracy, peak = 0.0, 0.0, [], []
    for rank, rate in ((r, t) for r in ranks for t in rates):
        out = folder / "peft.json"
        total += timed(
            [sys.executable, __file__, "--steps", str(options.steps), "--batch",
             str(options.batch), "--out", str(out), "--peft-member", str(folder), str(rank),
             str(rate)]
        )  # fmt: skip
        found = json.loads(out.read_text())
        updates += found["updates_seconds"]
        accuracy.append(found["accuracy"])
        peak.append(found["peak_bytes"])
    return {"total": total, "members": len(accuracy), "updates_seconds": updates,
            "accuracy": max(accuracy), "peak_bytes": max(peak)}  # fmt: skip


def peft_member(options: argparse.Namespace) -> None:
    """One member with transformers and PEFT: load, train, evaluate, save."""
    import tokenizers
    import torch

    folder, rank, rate = Path(options.peft_member[0]), *map(float, options.peft_member[1:])
    rows = [json.loads(x) for x in (folder / "texts.jsonl").read_text().splitlines()]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    ids = np.array([tokenizer.encode(r["text"]).ids for r in rows], np.int64)
    labels = np.array([r["label"] for r in rows], np.int64)
    trainer = torch_peer.Trainer(
        folder / "base", head="classification", rank=int(rank), alpha=2 * rank, learning_rate=rate
    )
    draw = np.random.default_rng(0)
    began, order = time.perf_counter(), np.array([], np.int64)
    for _ in range(options.steps):
        if len(order) < options.batch:
            order = draw.permutation(TEXTS)
        some, order = order[: options.batch], order[options.batch :]
        trainer.update({"input_ids": ids[some], "labels": labels[some]})
    updates = time.perf_counter() - began
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids[TEXTS:])).logits.numpy()
    trainer.save_adapter(folder / "peft_adapter")
    found = {"updates_seconds": updates, "peak_bytes": host.peak_bytes(),
             "accuracy": float((logits.argmax(-1) == labels[TEXTS:]).mean())}  # fmt: skip
    options.out.write_text(json.dumps(found))


def main() -> None:
    options = arguments()
    if options.peft_member:
        return peft_member(options)
    arms = options.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        raise SystemExit(f"no arm {', '.join(sorted(unknown))}; choose from {', '.join(ARMS)}")
    found: dict[str, Any] = {}
    load = bench.warn_if_busy()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").mkdir()
        write_base(folder / "base", options)
        write_texts(folder / "texts.jsonl")
        write_config(folder / "config.py", folder, options)
        for arm in arms:
            if arm == "peft" and (why := torch_peer.reason()):
                print(f"arm peft left out: {why}")
                continue
            found[arm] = {"packed": packed, "alone": alone, "peft": peft}[arm](folder, options)
            print(arm, json.dumps(found[arm]), flush=True)
    ratios = {
        f"{one}/{other} {part}": found[one][key] / found[other][key]
        for one, other in (("packed", "alone"), ("packed", "peft"), ("alone", "peft"))
        for part, key in (("total", "total"), ("updates", "updates_seconds"))
        if one in found and other in found
    }
    for what, ratio in ratios.items():
        print(f"{what}: {ratio:.3f}")
    result = {
        "members": math.prod(map(len, _grid(options))), "steps": options.steps,
        "batch": options.batch, "arms": found, "ratios": ratios, "load_before": load,
        "command": " ".join(sys.argv),
        "versions": bench.versions("jax", "torch", "transformers", "peft"),
    }  # fmt: skip
    bench.write_results(options.out, result)
    return None


if __name__ == "__main__":
    main()
