"""A filled table as text: Markdown, CSV, LaTeX, HTML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from lora_jax.atomic import write_text
from lora_jax.tables import kept
from lora_jax.tables.table import Claim, Filled, Line
from lora_jax.tables.work import Measured

_HEADER = ("row", "metric", "published", "measured", "difference", "trainable", "seeds", "notes")


def markdown(filled: Filled) -> str:
    """The table with its footnotes, for a README or a terminal."""
    cells, notes = _cells(filled)
    lines = ["| " + " | ".join(_HEADER) + " |", "| " + " | ".join("---" for _ in _HEADER) + " |"]
    lines += ["| " + " | ".join(_md(c).replace("|", "\\|") for c in row) + " |" for row in cells]
    parts = [f"### {_md(filled.table.title)}", "\n".join(lines), *map(_md, _claims(filled))]
    if notes:
        parts.append("\n".join(f"{i}. {_md(text)}" for i, text in enumerate(notes, 1)))
    return "\n\n".join([*parts, _md(_foot(filled))]) + "\n"


def latex(filled: Filled) -> str:
    """A tabular with its claims and footnotes under it (needs booktabs and amssymb)."""
    cells, notes = _cells(filled)
    rows = [" & ".join(_tex(c) for c in row) + r" \\" for row in (_HEADER, *cells)]
    body = "\n".join([r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"])
    numbered = (f"[{i}] {text}" for i, text in enumerate(notes, 1))
    under = "\n\n".join(map(_tex, (*_claims(filled), *numbered, _foot(filled))))
    columns = "ll" + "r" * (len(_HEADER) - 3) + "l"
    return (
        f"% {filled.table.title}\n\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n\n"
        f"{under}\n"
    )


def page(filled: Filled) -> str:
    """One HTML page that needs nothing else."""
    cells, notes = _cells(filled)
    head = "".join(f"<th>{html.escape(c)}</th>" for c in _HEADER)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells
    )
    under = "".join(f"<li>{html.escape(text)}</li>" for text in notes)
    claims = "".join(f"<p>{html.escape(text)}</p>" for text in _claims(filled))
    title = html.escape(filled.table.title)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>"
        "<style>body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{border-bottom:1px solid #ccc;padding:.2em .7em;text-align:right}"
        "td:first-child,td:nth-child(2){text-align:left}</style>"
        f"<h1>{title}</h1><table><tr>{head}</tr>{body}</table>{claims}<ol>{under}</ol>"
        f"<p>{html.escape(_foot(filled))}</p></html>\n"
    )


def write(
    filled: Filled, folder: Path, name: str, before: Mapping[str, Measured] = MappingProxyType({})
) -> list[Path]:
    """`name` with the ending of each form in `folder`, each whole or not at all, and figures.

    `before`: see `kept.text`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    forms: dict[str, Callable[[], str]] = {
        "csv": lambda: filled.frame().to_csv(index=False),
        "md": lambda: markdown(filled),
        "tex": lambda: latex(filled),
        "html": lambda: page(filled),
        "json": lambda: kept.text(filled, before),
    }
    paths = []
    for ending, form in forms.items():
        path = folder / f"{name}.{ending}"
        write_text(path, form())
        paths.append(path)
    if filled.table.figures is not None:
        paths += filled.table.figures(filled, folder)
    return paths


def _cells(filled: Filled) -> tuple[list[list[str]], list[str]]:
    """(rows of text, footnotes): the same note is written once."""
    notes: list[str] = list(filled.table.notes)
    rows = []
    for line in filled.lines:
        marks = []
        for text in _notes_of(line):
            if text not in notes:
                notes.append(text)
            marks.append(str(notes.index(text) + 1))
        rows.append(
            [
                line.row.row,
                line.row.metric,
                _published(line),
                _measured(line),
                _difference(line),
                _params(line),
                str(_seeds(line)),
                " ".join(f"[{m}]" for m in marks),
            ]
        )
    return rows, notes


def _notes_of(line: Line) -> list[str]:
    found = []
    if line.cited is not None:
        found.append(f"published: {line.cited.source}, {line.cited.status}")
        found += [line.cited.notes] if line.cited.notes else []
    if line.measured.reason:
        standing = "" if line.measured.beyond else f"{line.standing}: "
        found.append(standing + line.measured.reason)
    if line.measured.chosen:
        chosen = ", ".join(f"{k}={v}" for k, v in line.measured.chosen.items())
        found.append(f"chosen on the first seed: {chosen}")
    return [*found, *line.row.notes, *line.measured.notes]


def _published(line: Line) -> str:
    if line.cited is None:
        return "–"
    std = f" ± {number(line.cited.std)}" if line.cited.std is not None else ""
    return f"{line.cited.value:,.7g}{std}"  # as printed: no table has more digits


def _seeds(line: Line) -> int:
    if line.summary is None:
        return len(line.measured.seeds) if line.measured.beyond else 0
    return line.summary.n


def _measured(line: Line) -> str:
    summary, beyond = line.summary, line.measured.beyond
    if beyond is not None:
        value = f"{'>' if beyond[1] else '<'} {number(beyond[0])}"
    elif summary is not None:
        value = number(summary.value)
    else:
        return line.standing
    if summary is None or math.isnan(summary.low):
        return value
    low, high = number(summary.low), number(summary.high)
    spread = "" if math.isnan(summary.std) else f" ± {number(summary.std)}"
    return f"{value}{spread} [{low}, {high}]"


def _difference(line: Line) -> str:
    if line.cited is None or line.summary is None or math.isnan(line.summary.value):
        return "–"
    gap = line.summary.value - line.cited.value
    return ("+" if gap >= 0 else "−") + number(abs(gap))


def _params(line: Line) -> str:
    counted = line.measured.trainable_params
    shown = "–" if counted is None else f"{counted:,}"
    beside = [] if line.row.formula is None else [f"formula {line.row.formula:,}"]
    if line.cited is not None and line.cited.params:
        beside.append(f"printed {line.cited.params}")
    return f"{shown} ({', '.join(beside)})" if beside else shown


def _claims(filled: Filled) -> list[str]:
    found = []
    for claim, gap in filled.differences():
        what = f"{claim.better} − {claim.worse}, {claim.metric}"
        if gap is None:
            found.append(f"{what}: {_unpaired(filled, claim)}")
        elif math.isnan(gap.low):
            found.append(f"{what}: {number(gap.value)} (one seed: no interval)")
        else:
            found.append(
                f"{what}, mean of the differences paired over {gap.n} seeds: {number(gap.value)} "
                f"[95 %: {number(gap.low)}, {number(gap.high)}]"
            )
    return found


def _unpaired(filled: Filled, claim: Claim) -> str:
    """Why a claim has no difference."""
    standings = {"not run" if line is None else line.standing for line in filled.of(claim)}
    odd = sorted(standings - {"measured"})
    return " and ".join(odd) if odd else "no values of one seed in both"


def _foot(filled: Filled) -> str:
    kind = {
        "mean": "mean ± std [95 % interval of the mean]",
        "median": "median ± std [least, greatest]",
    }
    seconds: dict[str, float] = {}
    for line in filled.lines:  # metrics of the same runs took them once
        where = line.measured.where or line.row.name
        seconds[where] = max(seconds.get(where, 0.0), line.measured.seconds)
    spent = sum(seconds.values())
    declared = filled.table.declared_cost(filled.scale)
    cost = f"Declared cost: {declared}; " if declared else ""
    took = f"computing took {spent / 60:.1f} minutes."
    used = dict.fromkeys(x for line in filled.lines for x in line.measured.software)
    software = f" Measured with {'; '.join(used)}." if used else ""
    return (
        f"Scale: {filled.scale}. Measured: {kind[filled.table.statistic]}. "
        f"{cost}{took if cost else took.capitalize()}{software}"
    )


def number(x: float | None) -> str:
    """Four significant digits, with no exponent for what is readable without."""
    if x is None or math.isnan(x):
        return "–"
    return f"{x:,.0f}" if abs(x) >= 9999.5 else f"{x:.4g}"


# A tag, which a page would swallow, and emphasis; words_with_underscores are none.
_MARKS = re.compile(r"[*`\\]|<(?=[A-Za-z/!?])")


def _md(text: str) -> str:
    return _MARKS.sub(r"\\\g<0>", text)


_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "η": "eta",
    "θ": "theta", "κ": "kappa", "λ": "lambda", "μ": "mu", "π": "pi", "ρ": "rho", "σ": "sigma",
    "τ": "tau", "φ": "varphi", "ω": "omega", "Σ": "Sigma", "Φ": "Phi",
}  # fmt: skip
# What pdflatex takes for something else, or has no letter for. A "[" at the start of a row would be
# an argument of the line break before it.
_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$",
        "{": r"\{", "}": r"\}", "^": r"\^{}", "~": r"\~{}", "[": "{[}", "*": "{*}",
        "±": r"$\pm$", "−": "$-$",
        "–": r"\textendash{}", "<": "$<$", ">": "$>$", "|": r"\textbar{}", "·": r"$\cdot$",
        "×": r"$\times$",
        "‖": r"$\Vert$", "√": r"$\surd$", "²": "$^2$", "ᵀ": r"$^\top$", "Δ": r"$\Delta$",
        "≤": r"$\leq$", "≥": r"$\geq$", "≈": r"$\approx$", "∞": r"$\infty$", "∈": r"$\in$",
        "…": r"\dots{}", "→": r"$\to$",
        **{letter: f"$\\{name}$" for letter, name in _GREEK.items()},
    }
)  # fmt: skip


def _tex(text: str) -> str:
    return text.translate(_TEX).replace("--", "-{}-")  # two hyphens would be a dash
