"""A built wheel works outside of the clone, with all that it needs inside."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import pathlib, sys
import lora_jax
from lora_jax import cli, tables
from lora_jax.tables import presets, published

here = pathlib.Path(lora_jax.__file__).resolve()
assert here.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), here
assert (here.parent / "py.typed").is_file()
for name in published.index().index:
    assert len(published.frame(name)), name
assert presets.row("lora_t11_hparams_gpt2", dataset="E2E")["lora_r_q"] == 4
assert cli.main(["list", "methods"]) == 0
"""


def _isolation() -> list[str]:
    try:
        major = int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return []
    return ["--no-build-isolation"] if major >= 77 else []


def test_a_wheel_works_outside_of_the_clone(tmp_path: Path) -> None:
    """Built from a copy, so that the clone stays as it is; unpacked where nothing else lies."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip, to build and install a wheel")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "lora_jax", source / "lora_jax", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", str(source), "--no-deps", "-w", str(tmp_path)]
    # With the setuptools that is here, if it is new enough; else pip fetches one.
    subprocess.run([*pip, *build, *_isolation()], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("lora_jax-*.whl")
    target = tmp_path / "installed"
    install = ["install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    assert {p.name for p in target.iterdir()} >= {"lora_jax", "bin"}
    environment = {**os.environ, "PYTHONPATH": str(target)}
    found = subprocess.run(
        [sys.executable, "-c", CODE, str(target)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "lora_prefix_embedding" in found.stdout
