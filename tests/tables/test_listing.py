"""The list of tables: made from the files, and the README has it, with all that they read."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lora_jax import cli, tables
from lora_jax.errors import UserError
from lora_jax.tables import listing, presets

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXPERIMENTS = ROOT / "experiments"


def test_the_readme_has_the_list(monkeypatch: Any, capsys: Any) -> None:
    found = README.split(listing.BEGIN)[1].split(listing.END)[0].strip()
    monkeypatch.chdir(ROOT)
    assert cli.main(["list", "tables"]) == 0
    made = capsys.readouterr().out.strip()
    assert found == made, "write what `lora-jax list tables` prints into README.md"
    cost = tables.load(str(EXPERIMENTS / "lora_table2.py"), "small").cost
    assert f"| `lora_table2.py` | LoRA paper, Table 2: GLUE, development sets | {cost} |" in made


def test_files_without_a_table_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def table(frame, title):\n    pass\n")
    (tmp_path / "b.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"defines table\(scale\): call it in a clone"):
        listing.markdown(tmp_path)
    (tmp_path / "c.py").write_text(
        '"""A table.\n\nMore."""\n'
        "from lora_jax.tables import NotRun, Row, Table\n"
        "def table(scale):\n"
        "    return Table(scale, (Row('a', 'm', NotRun('x')),))\n"
    )
    rows = listing.markdown(tmp_path).splitlines()
    assert rows[2:] == ["| `c.py` | A table | nothing is run | nothing is run |"]


def test_the_readme_names_what_the_environment_may_say() -> None:
    """And no variable that nothing reads."""
    code = "".join(p.read_text(encoding="utf-8") for p in EXPERIMENTS.glob("*.py"))
    read = set(re.findall(r'environ\.get\("([A-Z0-9_]+)"', code)) - {"PYTHONPATH"}
    assert {"GLUE_DIR", "E2E_DIR"} <= read
    said = set(re.findall(r"`([A-Z0-9]+_(?:DIR|TEXT))`", README))
    assert said == read


def test_the_readme_names_the_presets() -> None:
    said = set(re.findall(r"`((?:roberta|deberta)-[\w.-]+)`", README))
    assert said == set(presets.GLUE)


def test_the_readmes_pictures_are_the_projects() -> None:
    """Each is what a notebook drew, as it is committed."""
    shown = [path for path in re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)]
    assert shown
    drawn = {
        base64.b64decode("".join(output["data"]["image/png"]))
        for book in ROOT.glob("notebooks/*.ipynb")
        for cell in json.loads(book.read_text(encoding="utf-8"))["cells"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    }
    for path in shown:
        assert (ROOT / path).read_bytes() in drawn, path
