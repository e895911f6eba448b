"""METEOR 1.5 (Denkowski and Lavie 2014): its authors' Java program, as pycocoevalcap carries it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from lora_jax.data.metrics import ptb
from lora_jax.data.metrics.matching import same_references
from lora_jax.errors import UserError


def lacking() -> str | None:
    """Why METEOR cannot be had on this machine; None where it can."""
    return None if shutil.which("java") else "METEOR 1.5 is a Java program, and there is no Java"


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus METEOR, 0 to 1, for English, over tokens of `ptb.words`.

    Raises:
      UserError: no Java (`lacking`), or pycocoevalcap is not installed.
    """
    same_references(predictions, references)
    reason = lacking()
    if reason:
        raise UserError(f"{reason}.")
    lines = [
        " ||| ".join(["SCORE", *(_plain(r) for r in options), _plain(guess)])
        for guess, options in zip(predictions, references, strict=True)
    ]
    jar = _jar()
    command = ["java", "-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command,
        cwd=jar.parent,  # its table of paraphrases lies beside it
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    ) as program:
        assert program.stdin is not None and program.stdout is not None
        counts = [_ask(program.stdin, program.stdout, line) for line in lines]
        _ask(program.stdin, program.stdout, " ||| ".join(["EVAL", *counts]))
        scores = [program.stdout.readline() for _ in lines]  # the last is of the whole set
    try:
        return float(scores[-1])
    except ValueError as error:
        raise UserError(f"METEOR's program failed (exit code {program.returncode}).") from error


def _plain(text: str) -> str:
    return " ".join(ptb.words(text)).replace("|||", "")


def _ask(to: IO[str], answers: IO[str], line: str) -> str:
    # One at a time: writing them all at once would fill the pipe while the program waits for us.
    to.write(line + "\n")
    to.flush()
    return answers.readline().strip()


def _jar() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("METEOR needs the package pycocoevalcap: pip install 'lora-jax[metrics]'")
    path = Path(next(iter(spec.submodule_search_locations))) / "meteor" / "meteor-1.5.jar"
    if not path.is_file():
        raise UserError(f"The installed pycocoevalcap has no {path}. Reinstall it.")
    return path
