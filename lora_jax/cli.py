"""The `lora-jax` command. Errors are one line; `--traceback` shows where they came from."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_jax import host
from lora_jax.errors import Interrupted, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status (2 for a user's error, a shell's for a signal)."""
    parser = _parser()
    args, extra = parser.parse_known_args(argv)
    overrides = []
    for item in extra:
        if not item.startswith("--config."):
            parser.error(f"unknown argument {item!r}; overrides look like --config.method.rank=4")
        overrides.append(item.removeprefix("--config."))
    _cache_compilations()
    if argv is None:  # the program has just begun: JAX has started no threads
        host.keep_memory()
    try:
        if overrides and not hasattr(args, "config"):
            raise UserError("--config overrides are for commands that take a config file")
        args.command(args, overrides)
    except (UserError, OSError) as error:
        if args.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return int(stop.code or 0)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-jax", description="LoRA experiments in JAX")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        # After the command, too; there it must not undo what stood before it.
        sub.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS,
                         help="show where an error came from")  # fmt: skip
        return sub

    run = add("run", _run, "train, evaluate and save what a config describes; resumes")
    run.add_argument("config", help="configs/FILE.py or configs/FILE.py:arg")
    run.add_argument("--workdir", required=True)
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    _sweep_arguments(
        add("sweep", _sweep, "train a config's grid in few compiled programs; resumes")
    )
    table = add("table", _table, "a paper's table: what is missing is run, and shown beside it")
    table.add_argument("experiment", help="experiments/NAME.py, which defines table(scale)")
    table.add_argument("--scale", default="small", help="smoke, small or paper")
    table.add_argument("--workdir", required=True)
    table.add_argument("--rows", default="", help="regex over 'row / metric'; others are not run")
    table.add_argument("--seeds", type=int, help="in place of the table's own number")
    table.add_argument(
        "--known", action="append", default=[], metavar="NAME.json",
        help="what an earlier command, maybe on another machine, wrote: its rows are not run again",
    )  # fmt: skip
    table.add_argument("--quiet", action="store_true", help="no progress bars")
    plan = add("plan", _plan, "what a config would cost, from the compiler, before it is run")
    plan.add_argument("config")
    plan.add_argument("--topology", help="a TPU slice that need not be there, such as v5e:8x8")
    plan.add_argument("--memory", help="of a device, such as 24GiB; default: what there is")
    plan.add_argument("--json", help="also write the plan to this file")
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
    _analyze_arguments(add("analyze", _analyze, "inside an adapter: ranks, directions, intruders"))
    listed = add("list", _list, "methods, model families and tasks")
    listed.add_argument(
        "what", nargs="?", choices=["methods", "tables"],
        help="the methods as a table; the tables of experiments/ with their costs",
    )  # fmt: skip
    return parser


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a config file with sweep_*() generators")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--only", nargs="+", default=(), help="names of sweep_* to use; all")
    parser.add_argument("--random", type=int, help="so many combinations at random, not all")
    parser.add_argument(
        "--halving", nargs=2, type=int, metavar=("FIRST", "ETA"),
        help="stop members early: at FIRST, FIRST x ETA, ... updates the best 1/ETA go on",
    )  # fmt: skip
    parser.add_argument("--optuna", type=int, help="so many trials that Optuna chooses")
    parser.add_argument("--seed", type=int, default=0, help="of --random and --optuna")
    parser.add_argument("--mode", choices=("auto", "packed", "serial"), default="auto")
    parser.add_argument("--slots", type=int, help="most members at a time")
    parser.add_argument("--memory", help="that a pack may use on a device, such as 24GiB")
    parser.add_argument("--dry", action="store_true", help="print the packs and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _analyze_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a run, an adapter (PEFT's or ours), or a tuned model")
    parser.add_argument("--against", help="another one, to compare it with matrix by matrix")
    parser.add_argument("--base", help="the base of what is no run; a PEFT LoRA is read without")
    parser.add_argument("--out", help="a folder for CSV files and plots")
    parser.add_argument(
        "--dense", action="store_true", help="also what is not low-rank, as whole differences"
    )
    parser.add_argument("--modules", help="only these: a regex, such as 'attention/query'")
    parser.add_argument(
        "--no-weights", action="store_true", help="nothing that decomposes the base's weights"
    )
    parser.add_argument(
        "--side", help="whose directions: a (of A; default), b, in or out (of the update)"
    )
    parser.add_argument("--directions", type=int, help="at most so many, to look for in the base")
    parser.add_argument("--top", type=int, default=10, help="directions that may be intruders")
    parser.add_argument("--epsilon", type=float, default=0.5, help="cosine below which they are")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _cache_compilations() -> None:
    """A second start reuses the first one's programs (JAX's persistent compilation cache)."""
    default = Path.home() / ".cache" / "lora_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(default))


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import config, experiment, runs

    parsed = experiment.from_dict(config.load_file(args.config), overrides)
    result = runs.run(parsed, args.workdir, progress=not args.quiet)
    for name, value in result["metrics"].items():
        print(f"{name}: {value:.4g}")
    print(f"{result['seconds']:.0f} s; everything is in {args.workdir}")


def _sweep(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import plan
    from lora_jax.sweeps import sweep

    options = sweep.Options(
        generators=tuple(args.only),
        random=args.random,
        halving=tuple(args.halving) if args.halving else None,
        optuna=args.optuna,
        seed=args.seed,
        mode=args.mode,
        slots=args.slots,
        memory=plan.parse_memory(args.memory) if args.memory else None,
        dry=args.dry,
    )
    result = sweep.sweep(
        args.config, args.workdir, overrides=overrides, options=options, progress=not args.quiet
    )
    print(
        f"{result['members']} members, {result['packs']} packs, "
        f"{result['programs_compiled']} programs, {result['seconds']:.0f} s; "
        f"everything is in {args.workdir}"
    )


def _table(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import locks, tables
    from lora_jax.tables import kept, render
    from lora_jax.tables.work import fullest

    name, workdir = f"{Path(args.experiment).stem}_{args.scale}", Path(args.workdir)
    table = tables.load(args.experiment, args.scale)
    cost = table.declared_cost(args.scale)
    if cost and not args.quiet:  # before it is spent
        print(f"{table.title}. Declared cost: {cost}", flush=True)
    known = kept.read([Path(p) for p in args.known], table, args.scale)
    with locks.alone(workdir):
        earlier = kept.earlier(workdir / f"{name}.json", table, args.scale)
        filled = tables.run(
            table, args.scale, workdir,
            rows=args.rows, seeds=args.seeds, progress=not args.quiet, known=known, earlier=earlier,
            after=lambda so_far: render.write(so_far, workdir, name, fullest(known, earlier)),
        )  # fmt: skip
    print(render.markdown(filled))
    print(f"{workdir / name}.csv, .md, .tex, .html and .json")
    if filled.failed:
        raise UserError(tables.again(filled.failed))


def _plan(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import config, experiment, plan

    parsed = experiment.from_dict(config.load_file(args.config), overrides)
    memory = plan.parse_memory(args.memory) if args.memory else None
    found = plan.plan_config(parsed, topology=args.topology, memory=memory)
    print(found)
    if args.json:
        Path(args.json).write_text(json.dumps(found.to_dict(), indent=2) + "\n")


def _eval(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import runs

    bench, method, trainable = runs.load_run(args.workdir)
    metrics, _ = bench.evaluate(method.combine(method.frozen(bench.params), trainable))
    print(json.dumps(metrics, indent=2))


def _generate(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import runs

    bench, method, trainable = runs.load_run(args.workdir)
    variables = method.combine(method.frozen(bench.params), trainable)
    for answer in bench.answers(variables, args.prompt):
        print(answer)


def _export(args: argparse.Namespace, overrides: list[str]) -> None:
    source, out = Path(args.workdir) / "adapter", Path(args.out)
    if not source.is_dir():
        raise UserError(f"{args.workdir} holds no adapter: finish `lora-jax run` first")
    if out.exists():
        raise UserError(f"{out} exists: choose another folder")
    shutil.copytree(source, out)


def _merge(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import pretrained, runs

    if Path(args.out).exists():
        raise UserError(f"{args.out} exists: choose another folder")
    bench, method, trainable = runs.load_run(args.workdir)
    merged = method.merge(method.frozen(bench.params), trainable)
    source = bench.experiment.model.source if bench.task.reads == "tokens" else None
    pretrained.save_pretrained(args.out, bench.model, merged, tokenizer_source=source)


def _analyze(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import inside

    options = inside.Options(
        against=args.against, base=args.base, dense=args.dense, modules=args.modules,
        weights=not args.no_weights, side=args.side, directions=args.directions, k=args.top,
        epsilon=args.epsilon, progress=not args.quiet,
    )  # fmt: skip
    inside.analyze(args.path, args.out, options)


def _list(args: argparse.Namespace, overrides: list[str]) -> None:
    from lora_jax import methods, models
    from lora_jax.data.tasks import TASKS

    if args.what == "methods":
        from lora_jax.methods import table

        print(table.markdown())
        return
    if args.what == "tables":
        from lora_jax.tables import listing

        print(listing.markdown(Path("experiments")))
        return
    print("methods:", ", ".join(sorted(methods.METHODS)))
    print("model families:", ", ".join(sorted(models.FAMILIES)))
    print("tasks:", ", ".join(sorted(TASKS)))


if __name__ == "__main__":
    sys.exit(main())
