"""The `lora-jax` command. Errors are one line; `--traceback` shows where they came from."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status (2 for a user's error)."""
    parser = _parser()
    args, extra = parser.parse_known_args(argv)
    overrides = []
    for item in extra:
        if not item.startswith("--config."):
            parser.error(f"unknown argument {item!r}; overrides look like --config.method.rank=4")
        overrides.append(item.removeprefix("--config."))
    _cache_compilations()
    try:
        args.command(args, overrides)
    except (UserError, OSError) as error:
        if args.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-jax", description="LoRA experiments in JAX")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    run = add("run", _run, "train, evaluate and save what a config describes; resumes")
    run.add_argument("config", help="configs/FILE.py or configs/FILE.py:arg")
    run.add_argument("--workdir", required=True)
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    add("eval", _eval, "the metrics of a finished run's adapter").add_argument("workdir")
    generate = add("generate", _generate, "the adapted model's continuation of a prompt")
    generate.add_argument("workdir")
    generate.add_argument("prompt", nargs="+")
    export = add("export", _export, "copy the adapter, in PEFT's format, to a folder")
    export.add_argument("workdir")
    export.add_argument("out")
    merge = add("merge", _merge, "write base and adapter merged, as transformers loads it")
    merge.add_argument("workdir")
    merge.add_argument("out")
    add("list", _list, "methods, model families and tasks")
    return parser


def _cache_compilations() -> None:
    """A second start reuses the first one's programs (JAX's persistent compilation cache)."""
    default = Path.home() / ".cache" / "lora_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(default))


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import config, experiment

    parsed = experiment.from_dict(config.load_file(args.config), overrides)
    result = experiment.run(parsed, args.workdir, progress=not args.quiet)
    for name, value in result["metrics"].items():
        print(f"{name}: {value:.4g}")
    print(f"{result['seconds']:.0f} s; everything is in {args.workdir}")


def _eval(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import experiment

    work, method, trainable = experiment.load_run(args.workdir)
    print(json.dumps(work.evaluate(method.combine(work.params, trainable))[0], indent=2))


def _generate(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import experiment

    work, method, trainable = experiment.load_run(args.workdir)
    prompts = [work.tokenizer.encode(p) for p in args.prompt]
    variables = method.combine(work.params, trainable)
    for answer in work.answers(variables, prompts, work.tokenizer.eos_id):
        print(answer)


def _export(args: argparse.Namespace, overrides: list[str]) -> None:
    source, out = Path(args.workdir) / "adapter", Path(args.out)
    if not source.is_dir():
        raise UserError(f"{args.workdir} holds no adapter: finish `lora-jax run` first")
    if out.exists():
        raise UserError(f"{out} exists: choose another folder")
    shutil.copytree(source, out)


def _merge(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import experiment, pretrained

    if Path(args.out).exists():
        raise UserError(f"{args.out} exists: choose another folder")
    work, method, trainable = experiment.load_run(args.workdir)
    merged = method.merge(work.params, trainable)
    pretrained.save_pretrained(args.out, work.model, merged)


def _list(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import methods, models
    from lora_jax.data.tasks import TASKS

    print("methods:", ", ".join(sorted(methods.METHODS)))
    print("model families:", ", ".join(sorted(models.FAMILIES)))
    print("tasks:", ", ".join(sorted(TASKS)))


if __name__ == "__main__":
    sys.exit(main())
