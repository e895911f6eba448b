"""A list of the experiments that are tables, made from their files: `lora-jax list tables`.

The README holds it between two comments, and a test compares the two.
"""

from __future__ import annotations

import ast
from pathlib import Path

from lora_jax.errors import UserError
from lora_jax.tables.table import SCALES, load

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
"""Between these the README has the list."""
HEADER = ("`experiments/`", "what", *(f"cost, {scale}" for scale in SCALES[1:]))


def markdown(folder: Path) -> str:
    """A line a file of `folder` that defines `table(scale)`: its docstring's first, and the costs.

    Raises UserError where there is none.
    """
    rows = [_cells(path, doc) for path in sorted(folder.glob("*.py")) if (doc := _about(path))]
    if not rows:
        raise UserError(f"no file in {folder}/ defines table(scale): call it in a clone")
    lines = [HEADER, ("---",) * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _about(path: Path) -> str:
    """The docstring's first line; "" for a file that defines no table."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {x.name: x for x in tree.body if isinstance(x, ast.FunctionDef)}
    if "table" not in functions or [x.arg for x in functions["table"].args.args] != ["scale"]:
        return ""
    return (ast.get_docstring(tree) or path.stem).splitlines()[0].rstrip(".")


def _cells(path: Path, about: str) -> tuple[str, ...]:
    costs = (load(str(path), scale).declared_cost(scale) for scale in SCALES[1:])
    return (f"`{path.name}`", about, *costs)
