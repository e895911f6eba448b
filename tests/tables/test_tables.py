"""Tables: published numbers as printed, ours measured once, resumed, and rendered side by side."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lora_jax import cli, locks, statistics, tables
from lora_jax.errors import UserError
from lora_jax.tables import kept, published, render
from lora_jax.tables.quoted import quoted
from lora_jax.tables.related import Correlated
from lora_jax.tables.table import COLUMNS, Filled, Line
from lora_jax.tables.work import Measured

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_published_numbers_are_found_with_status_and_notes() -> None:
    where = {"model": "RoBERTa-base", "method": "LoRA"}
    cited = tables.Published("lora_t02_glue", where, "CoLA", times=0.01).look_up()
    assert (cited.value, cited.std) == (pytest.approx(0.634), pytest.approx(0.012))
    assert cited.status == "verified-primary" and "MEDIAN" in cited.notes
    assert cited.source == "LoRA 2106.09685v2, Table 2"
    # A table with a status for each row.
    li = tables.Published("li_t1_dint90", {"problem": "MNIST", "D": 44426}, "d_int90").look_up()
    assert li.value == 290 and li.status == "verified-code+secondary" and "275" in li.notes
    # A note of a row alone, in a table with one status.
    where = {"config": "DoRA r=32 LLaMA-7B"}
    dora = tables.Published("param_counts", where, "computed").look_up()
    assert dora.status == "computed" and dora.notes == "0.846%; paper 0.84%"
    # A deviation in a column of that name is of the number before it; parameters as printed.
    where = {"method": "FT/LoRA", "batch_size": 1}
    latency = tables.Published("lora_t01_latency", where, "latency_ms").look_up()
    assert (latency.value, latency.std) == (19.8, 2.7) and cited.params == "0.3M"
    where = {"method": "LoRA", "hyperparameters": "rq=rv=8"}
    wide = tables.Published("lora_t15_gpt3_sweep", where, "MNLI_m_acc").look_up()
    assert (wide.params, wide.std) == ("37.7M", None)


@pytest.mark.parametrize(
    ("table", "where", "column", "match"),
    [
        ("lora_t2_glue", {}, "CoLA", "did you mean lora_t02_glue"),
        ("lora_t02_glue", {"model": "RoBERTa-base"}, "COLA", "no column 'COLA'; did you mean CoLA"),
        ("lora_t02_glue", {"model": "RoBERTa-base"}, "CoLA", "has [2-9] rows"),
        ("lora_t02_glue", {"model": "BERT"}, "CoLA", "has 0 rows"),
    ],
)
def test_what_is_not_published_is_an_error(table: str, where: Any, column: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        tables.Published(table, where, column).look_up()


def test_every_published_table_is_in_the_index_and_readable() -> None:
    folder = Path(published.__file__).parent / "published"
    names = {p.stem for p in folder.glob("*.csv")} - {"_index"}
    assert names == set(published.index().index)
    for name in names:
        assert len(published.frame(name)) > 0, name
        assert published.index().loc[name, "status"], name


def test_summaries() -> None:
    mean = statistics.mean([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653: the interval's half is t·1/√3.
    assert mean.value == 2.0 and mean.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert statistics.median([5.0, 1.0, 2.0]) == statistics.Summary(
        2.0, 1.0, 5.0, pytest.approx(2.081666), 3
    )
    assert math.isnan(statistics.mean([1.0]).low)
    gap = statistics.paired({0: 3.0, 1: 4.0, 2: 9.0}, {0: 2.0, 1: 3.0, 3: 0.0})
    assert gap is not None and (gap.value, gap.n, gap.low) == (1.0, 2, 1.0)
    assert statistics.paired({0: 1.0}, {1: 1.0}) is None


def counting(calls: list[int]) -> Any:
    def function(folder: Path, seed: int) -> dict[str, Any]:
        calls.append(seed)
        return {"value": 10.0 + seed, "trainable_params": 7}

    return function


def a_table(calls: list[int]) -> tables.Table:
    cited = tables.Published("li_t1_dint90", {"problem": "MNIST", "D": 44426}, "d_int90")
    return tables.Table(
        "A table",
        (
            tables.Row("a & b", "d90", tables.Computed(counting(calls), seeded=True), cited),
            tables.Row("c", "d90", tables.Computed(lambda f, s: {"value": 1.0}, name="c")),
            tables.Row("d", "d90", tables.NotRun("no such model here"), cited, formula=12),
        ),
        claims=(tables.Claim("a & b", "c", "d90"),),
        notes=("the same for all",),
        cost="a second or < 2",
    )


def test_what_is_measured_once_is_kept(tmp_path: Path) -> None:
    calls: list[int] = []
    tables.run(a_table(calls), "small", tmp_path, seeds=2)
    filled = tables.run(a_table(calls), "small", tmp_path, seeds=3)
    assert calls == [0, 1, 2]
    frame = filled.frame()
    assert tuple(frame.columns) == COLUMNS
    first, second, third = (frame.iloc[i] for i in range(3))
    assert (first["measured"], first["seeds"], first["trainable_params"]) == (11.0, 3, 7)
    assert first["low"] < 11.0 < first["high"] and first["published"] == 290
    assert (second["seeds"], second["status"]) == (1, "measured") and pd.isna(second["low"])
    assert third["seeds"] == 0 and pd.isna(third["measured"]) and third["published"] == 290
    fewer = tables.run(a_table(calls), "small", tmp_path, seeds=1).frame().iloc[0]
    assert (fewer["measured"], fewer["seeds"]) == (10.0, 1) and calls == [0, 1, 2]
    with pytest.raises(UserError, match="--seeds is 0"):
        tables.run(a_table(calls), "small", tmp_path, seeds=0)


def test_a_function_that_gives_several_cells_is_called_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def function(folder: Path, seed: int) -> dict[str, Any]:
        calls.append(seed)
        return {"a": {"value": 1.0 + seed, "trainable_params": 5}, "b": {"value": 2.0}}

    rows = [
        tables.Row("r", m, tables.Computed(function, seeded=True, name="f", metric=m))
        for m in ("a", "b", "c")
    ]
    frame = tables.run(tables.Table("t", tuple(rows)), "small", tmp_path, seeds=2).frame()
    assert calls == [0, 1]
    assert list(frame["measured"][:2]) == [1.5, 2.0] and frame["trainable_params"][0] == 5
    assert frame["seeds"][2] == 0  # there is no such metric


def test_rows_that_name_the_same_runs_share_them(tmp_path: Path) -> None:
    calls: list[int] = []
    work = tables.Computed(counting(calls), seeded=True)
    rows = [tables.Row(f"Table {n}: q", "acc", work, runs="q") for n in (5, 6)]
    frame = tables.run(tables.Table("t", tuple(rows)), "small", tmp_path, seeds=2).frame()
    assert calls == [0, 1]
    assert list(frame["row"]) == ["Table 5: q", "Table 6: q"]
    assert list(frame["measured"]) == [10.5, 10.5]


def test_other_functions_do_not_share_their_runs() -> None:
    works = [tables.Computed(lambda f, s, x=x: {"value": x}, name="value") for x in (1.0, 2.0)]
    rows = tuple(tables.Row(str(i), "acc", work, runs="q") for i, work in enumerate(works))
    with pytest.raises(UserError, match="'0' and '1' of 't' would share"):
        tables.Table("t", rows)


def test_a_second_command_in_a_tables_workdir_is_told(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "exp.py"
    file.write_text(
        "from lora_jax.tables import NotRun, Row, Table\n"
        "def table(scale):\n    return Table('t', (Row('a', 'm', NotRun('why')),))\n"
    )
    arguments = ["table", str(file), "--scale", "small", "--workdir", str(tmp_path / "w")]
    with locks.alone(tmp_path / "w"):
        assert cli.main(arguments) == 2
    assert "at work in" in capsys.readouterr().err
    assert cli.main(arguments) == 0


def test_a_table_says_with_what_it_was_measured(tmp_path: Path, monkeypatch: Any) -> None:
    table = a_table([])
    monkeypatch.setattr(tables.table, "software", lambda: "jax 1")
    file = render.write(tables.run(table, "small", tmp_path, seeds=2), tmp_path, "t")[-1]
    monkeypatch.setattr(tables.table, "software", lambda: "jax 2")

    def lines(seeds: int) -> list[str]:
        before = kept.earlier(file, table, "small")
        filled = tables.run(table, "small", tmp_path, seeds=seeds, earlier=before)
        assert "computing took 0.0 minutes. Measured with jax" in render.markdown(filled)
        return [" ".join(line.measured.software) for line in filled.lines]

    assert lines(2) == ["jax 1", "jax 1", ""]  # the last one is not run
    assert lines(3) == ["jax 2", "jax 1", ""]


def test_all_metrics_of_a_row_are_of_one_choice(tiny_config: Any, tmp_path: Path) -> None:
    """Loss on general text is reported of the runs that were chosen by the task's metric."""
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 20)
    forgetting = {"kind": "files", "path": str(tmp_path / "text.txt")}
    config = tmp_path / "config.py"
    made = tiny_config(training={"steps": 2}, evaluation={"forgetting": forgetting})
    # On these 20 rows two updates raise the loss on that text.
    made["data"]["source"]["split"], made["data"]["validation"] = "[:20]", "[20:24]"
    config.write_text(f"def get_config():\n    return {made!r}\n")
    grid = [{"optimizer.learning_rate": r} for r in (3e-2, 1e-9)]
    works = [
        tables.Trained(str(config), metric, grid=grid, chosen_by="exact_match")
        for metric in (None, "general_loss", "base_general_loss")
    ]
    found = [work.measure(tmp_path / "row", [0], False) for work in works]
    assert len({x.place for x in found}) == 1 and len({str(x.chosen) for x in found}) == 1
    members = list(Path(found[0].place).glob("members/*/result.json"))
    assert len(members) == 2  # nothing was trained for the second and third metric
    single = tables.Trained(str(config), "general_loss", grid=grid[:1])  # nor for another grid
    single.measure(tmp_path / "row", [0], False)
    assert len(list((tmp_path / "row").glob("*/members/*"))) == 2
    by_rate = {r["config"]["optimizer"]["learning_rate"]: r["metrics"]
               for r in (json.loads(m.read_text()) for m in members)}  # fmt: skip
    rate = found[1].chosen["optimizer.learning_rate"]
    assert found[1].values == {0: by_rate[rate]["general_loss"]}
    assert by_rate[1e-9]["exact_match"] == by_rate[3e-2]["exact_match"]  # a tie: the later one wins
    assert rate == 1e-9
    # Next to nothing is forgotten at such a rate; by the loss itself the other would be chosen.
    still = by_rate[1e-9]
    assert still["general_loss"] == pytest.approx(still["base_general_loss"], abs=1e-4)
    assert by_rate[3e-2]["general_loss"] > still["general_loss"] + 1e-3


FAILING = """
from collections.abc import Sequence
from pathlib import Path
from lora_jax.tables import Computed, NotRun, Published, Row, Table
def table(scale):
    def reached(folder, seed):
        if not Path(r"{there}").exists():
            raise ConnectionError("no route\\nto host")
        return {{"value": 2.0}}
    def counted(folder, seed):
        return {{"value": 1.0}}
    cited = Published("li_t1_dint90", {{"problem": "MNIST", "D": 44426}}, "d_int90")
    return Table("T", (
        Row("a (1|2) [x]", "m", Computed(reached), cited), Row("b", "m", Computed(reached)),
        Row("c", "m", Computed(counted)), Row("d", "m", NotRun("nothing here")),
    ))
"""


def test_what_fails_stands_with_its_reason_and_the_others_run(tmp_path: Path, capsys: Any) -> None:
    """A download that does not come: exit status 2, and which rows to run again; then it comes."""
    experiment, there = tmp_path / "exp.py", tmp_path / "there"
    experiment.write_text(FAILING.format(there=there))
    arguments = ["table", str(experiment), "--workdir", str(tmp_path / "w")]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out.count("failed: no route to host\n") == 1 + 2  # the footnote, and as they fail
    frame = pd.read_csv(tmp_path / "w" / "exp_small.csv").set_index("row")
    assert frame.loc["c", "measured"] == 1.0
    assert list(frame["status"])[1:] == ["failed", "measured", "not run"]
    text = (tmp_path / "w" / "exp_small.md").read_text()
    assert "| a (1\\|2) [x] | m | 290 | failed | – |" in text and "| d | m | – | not run |" in text
    assert err.startswith("error: 2 failed: a (1|2) [x] / m; b / m. The footnotes say why.")
    only = shlex.split(err)[shlex.split(err).index("--rows") + 1]
    there.touch()
    assert cli.main([*arguments, "--quiet", "--rows", only]) == 0
    frame = pd.read_csv(tmp_path / "w" / "exp_small.csv").set_index("row")
    assert list(frame["seeds"]) == [1, 1, 1, 0]  # c stands as it was, d has nothing
    assert cli.main([*arguments, "--quiet"]) == 0


def test_a_mistake_of_the_program_is_raised(tmp_path: Path) -> None:
    def wrong(folder: Path, seed: int) -> dict[str, Any]:
        raise TypeError("a mistake")

    table = tables.Table("T", (tables.Row("a", "m", tables.Computed(wrong)),))
    with pytest.raises(TypeError, match="a mistake"):
        tables.run(table, "small", tmp_path, progress=False)


def test_a_cost_that_follows_is_not_declared() -> None:
    """Small's cost is not said of a smoke run, nor of rows that stand as not run."""
    published, counted = tables.NotRun("x"), tables.Counted("configs/gpt3_175b.py")
    trained = tables.Trained("configs/quickstart.py")
    of = {
        name: tables.Table("t", tuple(tables.Row(str(i), "m", w) for i, w in enumerate(works)),
                           cost="an hour")
        for name, works in (("none", [published]), ("counts", [published, counted]),
                            ("trained", [published, counted, trained]))
    }  # fmt: skip
    assert of["none"].declared_cost("paper") == "nothing is run"
    assert of["counts"].declared_cost("small") == "a minute at most: shapes alone are counted"
    assert of["trained"].declared_cost("small") == "an hour"
    assert of["trained"].declared_cost("smoke") == "a minute at most"


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'x / d9' is of no row of 'A table'; did you mean"):
        tables.run(a_table([]), "small", tmp_path, rows="x / d9")
    with pytest.raises(UserError, match="no regular expression"):
        tables.run(a_table([]), "small", tmp_path, rows="(")


def test_what_is_not_run_says_why_whichever_rows_are_asked_for(tmp_path: Path) -> None:
    first, _, last = tables.run(a_table([]), "small", tmp_path, rows="^c ").lines
    assert first.measured.reason == "left out by --rows"
    assert last.measured.reason == "no such model here"


def test_a_grid_is_chosen_in_its_metrics_own_direction() -> None:
    """Of the metric that chooses, and not of the task's principal one."""
    from lora_jax.data.examples import higher_is_better
    from lora_jax.data.tasks import TASKS
    from lora_jax.data.tasks.regression import Regression

    e2e, g2p = TASKS["e2e"](), TASKS["g2p"]()
    assert [higher_is_better(e2e, m) for m in ("bleu", "general_loss", "nist")] == [
        True,
        False,
        True,
    ]
    assert not higher_is_better(g2p, "phoneme_error_rate") and higher_is_better(g2p, "exact_match")
    values = Regression(text="text", label="label")
    assert higher_is_better(values, "spearman") and not higher_is_better(values, "mse")


def test_seeds_that_diverged_are_named(tiny_config: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    made = tiny_config(training={"steps": 2}, optimizer={"name": "sgd"})
    config.write_text(f"def get_config():\n    return {made!r}\n")

    class Some(tables.Trained):
        def _seed(self, seed: int) -> dict[str, Any]:
            return {"seed": seed, "optimizer.learning_rate": 1e30 if seed else 1e-3}

    class Chosen:
        config = "c.py"

        def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
            return Measured({5: 1.0}, chosen={"method.rank": np.int64(4)})

    works = {"some": Some(str(config)), "other": Chosen(), "none": tables.NotRun("why")}
    rows = [tables.Row(name, "m", work) for name, work in works.items()]
    claims = tuple(tables.Claim("some", name, "m") for name in ("other", "none"))
    filled = tables.run(tables.Table("t", tuple(rows), claims=claims), "small", tmp_path)
    text = render.markdown(filled)
    assert "diverged, and left out: seed 1, 2" in text
    assert "some − other, m: no values of one seed in both" in text
    assert "some − none, m: not run" in text
    assert '"method.rank": 4' in kept.text(filled)  # NumPy's numbers too


def test_a_grid_that_diverged_is_a_result(tiny_config: Any, tmp_path: Path) -> None:
    """Nothing failed: the same command would give the same."""
    config = tmp_path / "config.py"
    made = tiny_config(training={"steps": 2}, optimizer={"name": "sgd"})
    config.write_text(f"def get_config():\n    return {made!r}\n")
    grid = [{"optimizer.learning_rate": r} for r in (1e30, 1e31)]
    measured = tables.Trained(str(config), grid=grid).measure(tmp_path / "row", [0], False)
    assert measured.reason == "every run of the grid diverged" and not measured.failed


def test_published_rows_stand_without_numbers_of_ours() -> None:
    rows = quoted("ptuning2_repo_results", ("backbone",), ("RTE", "CoNLL03"), "not here", 0.01)
    # Nothing is printed of CoNLL03 with BERT.
    assert [(r.row, r.metric) for r in rows] == [
        ("BERT-large", "RTE"), ("RoBERTa-large", "RTE"), ("RoBERTa-large", "CoNLL03"),
    ]  # fmt: skip
    assert rows[0].published is not None
    assert rows[0].published.look_up().value == pytest.approx(0.801)
    assert rows[0].work.measure(Path("x"), [0], False).reason == "not here"


def test_forms(tmp_path: Path) -> None:
    filled = tables.run(a_table([]), "small", tmp_path)
    paths = render.write(filled, tmp_path / "out", "name")
    assert {p.suffix for p in paths} == {".csv", ".md", ".tex", ".html", ".json"}
    assert not list((tmp_path / "out").glob("*.part"))
    again = pd.read_csv(tmp_path / "out" / "name.csv")
    pd.testing.assert_frame_equal(again, filled.frame(), check_dtype=False)
    text = (tmp_path / "out" / "name.md").read_text()
    assert "| a & b | d90 | 290 | 11 ± 1 [8.516, 13.48] | −279 | 7 | 3 |" in text
    assert "not run: no such model here" in text and "(formula 12)" in text
    assert "a & b − c, d90: 9 (one seed: no interval)" in text
    assert "1. the same for all" in text and text.count("published: Li 1804.08838") == 1
    tex = (tmp_path / "out" / "name.tex").read_text()
    assert r"a \& b & d90" in tex and "a \\& b $-$ c, d90: 9 (one seed" in tex
    assert "\n\n{[}1] the same for all\n" in tex and "Declared cost: a second or $<$ 2;" in tex
    assert "a &amp; b" in (tmp_path / "out" / "name.html").read_text()
    assert "Declared cost: a second or < 2; computing took 0.0 minutes." in text
    assert "Declared cost: a second or &lt; 2;" in (tmp_path / "out" / "name.html").read_text()
    assert "a second" not in (tmp_path / "out" / "name.csv").read_text()
    # Printed numbers have all their digits; marks and letters survive each form.
    where = {"rank": 1024}
    nist = tables.Published("lora_t18_rank_e2e", where, "NIST")
    count = tables.Published("lora_t15_gpt3_sweep", {"hyperparameters": "rq=rv=8"},
                             "trainable_params")  # fmt: skip
    odd = tables.Table("α*β <b>", (
        tables.Row("*w* --rows", "m", tables.Computed(lambda f, s: {"value": 9999.7}), nist),
        tables.Row("n", "m", tables.Computed(
            lambda f, s: {"value": 1.0, "trainable_params": 7}, name="n"), count),
    ))  # fmt: skip
    shown = tables.run(odd, "small", tmp_path / "odd")
    text, tex = render.markdown(shown), render.latex(shown)
    assert "### α\\*β \\<b>" in text and "| \\*w\\* --rows | m |" in text
    assert "| 10,000 |" in text and "| 7 (printed 37.7M) |" in text
    assert "{*}w{*} -{}-rows & m" in tex and str(nist.look_up().value) in text
    counts = shown.frame()["trainable_params"]  # whole numbers beside an empty cell
    assert str(counts.dtype) == "Int64" and list(counts.dropna()) == [7]
    silent = dataclasses.replace(filled, table=dataclasses.replace(filled.table, cost=""))
    assert "Declared" not in render.markdown(silent) and "Computing took" in render.markdown(silent)


SHARED = """
from lora_jax.statistics import Summary
from lora_jax.tables import Claim, Computed, Row, Table
from lora_jax.tables.work import Measured
def value(folder, seed):
    with open({calls!r}, "a") as file:
        file.write("x")
    return {{m: {{"value": seed + k, "trainable_params": 7}} for k, m in enumerate("mn")}}
class Search:
    def measure(self, folder, seeds, progress):
        return Measured({{}}, summary=Summary(3.0, 2.0, float("nan"), float("nan"), len(seeds)))
def table(scale):
    rows = [Row(r, m, Computed(value, seeded=True, metric=m)) for r in "ab" for m in "mn"]
    claims = (Claim("a", "b", "m"),)
    return Table(f"shared, {{scale}}", (*rows, Row("c", "d90", Search())), claims=claims, seeds=2)
"""


def test_machines_share_the_rows_of_a_table(tmp_path: Path, capsys: Any) -> None:
    experiment, calls = tmp_path / "exp.py", tmp_path / "calls"
    experiment.write_text(SHARED.format(calls=str(calls)))

    def table(workdir: str, *more: str) -> int:
        return cli.main(["table", str(experiment), "--workdir", str(tmp_path / workdir), *more])

    assert table("one", "--rows", "^a / ") == table("two", "--rows", "^(b|c) / ") == 0
    assert len(calls.read_text()) == 4
    known = [
        part for w in ("one", "two") for part in ("--known", str(tmp_path / w / "exp_small.json"))
    ]
    assert table("both", *known) == table("whole") == 0
    assert len(calls.read_text()) == 8  # both rows again in `whole` alone
    for ending in ("csv", "md"):
        both, whole = (
            (tmp_path / w / f"exp_small.{ending}").read_text() for w in ("both", "whole")
        )
        assert both == whole
    # Of more seeds than it has, a row is run; those that are left out stand as they are.
    assert table("more", "--seeds", "3", "--rows", "^a / ", *known) == 0
    assert len(calls.read_text()) == 11
    frame = pd.read_csv(tmp_path / "more" / "exp_small.csv").set_index(["row", "metric"])
    assert list(frame["seeds"]) == [3, 3, 2, 2, 2]
    # What is known with fewer seeds takes nothing away.
    assert table("more", "--seeds", "3", "--rows", "^b / ", *known) == 0
    rows = json.loads((tmp_path / "more" / "exp_small.json").read_text())["rows"]
    assert rows["a / m"]["values"] == {"0": 0, "1": 1, "2": 2}
    capsys.readouterr()
    assert table("x", "--scale", "smoke", *known) == 2
    assert "is of 'shared, small' at scale small, not of 'shared, smoke'" in capsys.readouterr().err
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({"title": "shared, small", "scale": "small", "rows": {"a / m": {}}}))
    for file in (experiment, odd):
        assert table("x", "--known", str(file)) == 2
        assert "is not the NAME.json that" in capsys.readouterr().err
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "exp_small.json").write_text(odd.read_text())
    assert table("x", "--rows", "^a / ") == 0  # a damaged one in the workdir is written anew
    assert table("x", "--known", str(tmp_path / "none.json")) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_training_goes_on_from_known_seeds(tiny_config: Any, tmp_path: Path) -> None:
    """Where each seed's run is what it is without the others: not where a grid is chosen from."""
    config = tmp_path / "config.py"
    config.write_text(f"def get_config():\n    return {tiny_config(training={'steps': 1})!r}\n")

    def measured(workdir: str, seeds: int, **options: Any) -> Measured:
        table = tables.Table("t", (tables.Row("a", "m", tables.Trained(str(config))),))
        filled = tables.run(
            table, "small", tmp_path / workdir, seeds=seeds, progress=False, **options
        )
        return filled.lines[0].measured

    first = measured("one", 1)
    both = measured("two", 2, known={"a / m": first})
    assert len(list((tmp_path / "two").glob("small/a/*/members/*"))) == 1
    assert both.values == measured("whole", 2).values and both.seeds == (0, 1)
    assert both.seconds > first.seconds > 0
    lost = dataclasses.replace(first, values={}, seeds=(1, 2), notes=())
    told = first.and_more(lost)
    assert told.values == first.values and told.notes == ("diverged, and left out: seed 1, 2",)
    fewer = told.of([0, 1])
    assert fewer is not None and fewer.notes == ("diverged, and left out: seed 1",)
    before = dataclasses.replace(both, software=("jax 0",))
    again = measured("two", 2, known={"a / m": first}, earlier={"a / m": before})
    assert again.software == ("jax 0",)
    rates = [{"optimizer.learning_rate": rate} for rate in (1e-3, 1e-2)]
    assert not tables.Trained(str(config), grid=rates).by_seed


def test_a_row_yet_to_be_run_stands_with_the_seeds_it_has(tmp_path: Path) -> None:
    """An interruption takes away nothing of it."""
    table = a_table([])
    had = {"c / d90": Measured({0: 4.0}, seeds=(0,)), "a & b / d90": Measured({0: 5.0}, seeds=(0,))}
    shown: list[dict[str, Any]] = []

    def after(filled: Filled) -> None:
        shown.append({line.row.row: dict(line.measured.values) for line in filled.lines})

    tables.run(table, "small", tmp_path, seeds=2, earlier=had, after=after)
    assert shown[0] == {"a & b": {0: 10.0, 1: 11.0}, "c": {0: 4.0}}
    assert shown[-1] == {"a & b": {0: 10.0, 1: 11.0}, "c": {0: 1.0}, "d": {}}


def test_rows_left_out_stand_as_they_were_measured_before(tmp_path: Path) -> None:
    experiment, calls = tmp_path / "exp.py", tmp_path / "calls"
    experiment.write_text(SHARED.format(calls=str(calls)))

    def table(*more: str) -> int:
        return cli.main(["table", str(experiment), "--workdir", str(tmp_path / "w"), *more])

    assert table("--rows", "^b / ") == table("--rows", "^a / ") == 0
    frame = pd.read_csv(tmp_path / "w" / "exp_small.csv").set_index(["row", "metric"])
    assert list(frame["seeds"]) == [2, 2, 2, 2, 0] and len(calls.read_text()) == 4
    # A later row is not lost while an earlier one is measured.
    loaded = tables.load(str(experiment), "small")
    before = kept.earlier(tmp_path / "w" / "exp_small.json", loaded, "small")
    seen: list[int] = []
    tables.run(
        loaded, "small", tmp_path / "w", rows="^a / ", progress=False, earlier=before,
        after=lambda filled: seen.append(sum(bool(x.measured.values) for x in filled.lines)),
    )  # fmt: skip
    assert seen == [4] * 5
    # Also where others get more seeds, or fewer: what more seeds gave is kept for the next call.
    for seeds in (3, 1):
        assert table("--rows", "^a / ", "--seeds", str(seeds)) == 0
        frame = pd.read_csv(tmp_path / "w" / "exp_small.csv").set_index(["row", "metric"])
        assert list(frame["seeds"]) == [seeds, seeds, 2, 2, 0]
        there = kept.earlier(tmp_path / "w" / "exp_small.json", loaded, "small")
        assert there["a / m"].seeds == (0, 1, 2) and there["b / m"].seeds == (0, 1)
    # Another scale has files of its own; another table is not read.
    assert table("--scale", "smoke", "--rows", "^a / ") == 0
    assert list(pd.read_csv(tmp_path / "w" / "exp_smoke.csv")["seeds"]) == [2, 2, 0, 0, 0]
    assert list(pd.read_csv(tmp_path / "w" / "exp_small.csv")["seeds"]) == [1, 1, 2, 2, 0]
    other = dataclasses.replace(loaded, title="another")
    assert kept.earlier(tmp_path / "w" / "exp_small.json", other, "small") == {}
    assert kept.earlier(tmp_path / "none.json", loaded, "small") == {}
    # A row that the table no longer has is left; a file that is named for it is another table's.
    fewer = dataclasses.replace(loaded, rows=loaded.rows[1:], claims=())
    found = kept.earlier(tmp_path / "w" / "exp_small.json", fewer, "small")
    assert list(found) == ["a / n", "b / m", "b / n"]
    with pytest.raises(UserError, match="has a row 'a / m', which the table has not"):
        kept.read([tmp_path / "w" / "exp_small.json"], fewer, "small")


def test_what_has_no_number_a_seed_is_kept_too(tmp_path: Path) -> None:
    """A count, a row of which one seed diverged, and, made anew, what follows from other rows."""
    calls: list[str] = []

    class Once:
        config = "c.py"  # of a class of one's own, which says nothing of settings

        def __init__(self, name: str, values: dict[int, float]):
            self.name, self.found = name, Measured(values)

        def measure(self, folder: Path, seeds: Sequence[int], progress: bool) -> Measured:
            calls.append(self.name)
            return self.found

    works = {"count": Once("count", {0: 7.0}), "diverged": Once("diverged", {0: 1.0, 2: 3.0})}
    works |= {f"x{i}": Once(f"x{i}", dict.fromkeys(range(3), float(i))) for i in range(5)}
    rows = [tables.Row(name, "m", work) for name, work in works.items()]
    pairs = [(x, x) for x in rows[2:]]
    rows.append(tables.Row("all", "rho", Correlated(pairs)))
    table = tables.Table("t", tuple(rows))
    render.write(tables.run(table, "small", tmp_path), tmp_path, "t")
    assert calls == list(works)
    for kept_rows in (kept.read([tmp_path / "t.json"], table, "small"),
                      kept.earlier(tmp_path / "t.json", table, "small")):  # fmt: skip
        assert set(kept_rows) == {row.name for row in rows}
        for how in ({"known": kept_rows}, {"earlier": kept_rows, "rows": "rho"}):
            frame = tables.run(table, "small", tmp_path / "other", **how).frame()
            assert list(frame["seeds"]) == [1, 2, 3, 3, 3, 3, 3, 5]
    assert calls == list(works)
    # Of two files the one with more seeds; half of the correlated rows is not all of them.
    fewer = tables.run(table, "small", tmp_path, seeds=1, rows="^(x0|x1|x2|x3|all) / ")
    render.write(fewer, tmp_path, "fewer")
    both = kept.read([tmp_path / "fewer.json", tmp_path / "t.json"], table, "small")
    assert all(len(x.seeds) == 3 for x in both.values())
    some = {n: x for n, x in kept_rows.items() if n != "x4 / m"}
    assert tables.run(table, "small", tmp_path, known=some).lines[-1].summary.n == 5


def test_another_model_is_another_config_and_other_places_of_data_are_not() -> None:
    a, b = ("c.py:model=/models/a", "c.py:model=/models/b")
    assert tables.work.told(a) != tables.work.told(b)
    at = [tables.work.told(f"{d}/c.py:task=a,data_dir={d},folder={d}x") for d in ("/x", "y")]
    assert at[0] == at[1] == ["c.py", "task=a"]
    text = [{"source": {"kind": "files", "path": path}, "rate": 1} for path in ("/x/a", "y/a", "b")]
    one, same, other = (kept.settings(tables.Trained("c.py", overrides=x)) for x in text)
    assert one == same != other


def test_a_kept_row_of_other_settings_is_measured_anew(tmp_path: Path, caplog: Any) -> None:
    def table(folder: str, rate: float) -> tables.Table:
        trained = tables.Trained(f"/{folder}/c.py:task=a,data_dir=/{folder}", grid=[{"rate": rate}])
        function = tables.Computed(lambda folder, seed: {"value": 1.0}, name="one")
        return tables.Table("t", (tables.Row("r", "m", trained), tables.Row("s", "m", function)))

    kept_file, here = tmp_path / "t.json", table("here", 1.0)
    lines = tuple(Line(row, None, Measured({0: 1.0}), None) for row in here.rows)
    kept_file.write_text(kept.text(Filled(here, "small", lines)))
    assert list(kept.read([kept_file], table("there", 1.0), "small")) == ["r / m", "s / m"]
    assert not caplog.records
    assert list(kept.read([kept_file], table("here", 2.0), "small")) == ["s / m"]
    assert "r / m was measured with other settings" in caplog.text
    caplog.clear()
    assert list(kept.earlier(kept_file, table("here", 2.0), "small")) == ["s / m"]
    assert "r / m was measured with other settings" in caplog.text


def test_a_threshold_with_an_open_end_is_kept(tmp_path: Path) -> None:
    """The sizes run bound it on one side alone, or on none."""
    function = tables.Computed(lambda folder, seed: {"value": 1.0}, name="one")
    table = tables.Table("t", (tables.Row("r", "d90", function),))
    found = statistics.Summary(700.0, 0.0, math.inf, math.nan, 3)
    line = Line(table.rows[0], None, Measured({}, summary=found), found)
    render.write(Filled(table, "small", (line,)), tmp_path, "t")
    assert "700 [0, inf]" in (tmp_path / "t.md").read_text()
    again = kept.read([tmp_path / "t.json"], table, "small")["r / d90"].summary
    assert again is not None and (again.low, again.high) == (0.0, math.inf)
    assert math.isnan(again.std)


def test_the_command_says_what_it_will_cost_first(tmp_path: Path, capsys: Any) -> None:
    experiment = tmp_path / "exp.py"
    experiment.write_text(
        """
from lora_jax.tables import Computed, Row, Table
def table(scale):
    work = Computed(lambda folder, seed: {"value": 1.0}, name="one")
    return Table("a table", (Row("r", "m", work),), cost="an hour")
"""
    )
    arguments = ["table", str(experiment), "--workdir", str(tmp_path / "w")]
    assert cli.main(arguments) == 0
    before, after = capsys.readouterr().out.split("r / m\n")
    assert before == "a table. Declared cost: an hour\n" and "Declared cost: an hour;" in after
    assert cli.main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().out.count("an hour") == 1


def test_mistakes_in_a_table() -> None:
    row = tables.Row("a", "m", tables.NotRun("x"))
    with pytest.raises(UserError, match="two rows"):
        tables.Table("t", (row, row))
    same = tables.Computed(lambda folder, seed: {"value": 1.0}, name="latency")
    with pytest.raises(UserError, match="'LoRA' and 'LoRA.' of 't' would share"):
        tables.Table("t", (tables.Row("LoRA", "m", same), tables.Row("LoRA+", "m", same)))
    with pytest.raises(UserError, match="claim names 'b'"):
        tables.Table("t", (row,), claims=(tables.Claim("a", "b", "m"),))


def test_a_training_is_chosen_by_its_grid_and_resumed(tiny_config: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(f"def get_config():\n    return {tiny_config(training={'steps': 2})!r}\n")
    experiment = tmp_path / "exp.py"
    experiment.write_text(
        f"""
from lora_jax.tables import Row, Table, Trained
GRID = [{{"optimizer.learning_rate": r}} for r in (1e-9, 3e-2)]
def table(scale):
    work = Trained({str(config)!r}, "rouge1" if scale == "paper" else None, grid=GRID)
    return Table("tiny", (Row("r", "m", work),), seeds=2)
"""
    )
    arguments = ["table", str(experiment), "--workdir", str(tmp_path / "w"), "--quiet"]
    assert cli.main([*arguments, "--scale", "small"]) == 0
    frame = pd.read_csv(tmp_path / "w" / "exp_small.csv")
    assert frame.loc[0, "seeds"] == 2 and frame.loc[0, "trainable_params"] > 0
    members = sorted((tmp_path / "w" / "small" / "r").glob("*/members/*"))
    results = [json.loads((m / "result.json").read_text()) for m in members]
    # Two rates on seed 0, the better one again on seed 1.
    rates = [(r["config"]["optimizer"]["learning_rate"], r["seed"]) for r in results]
    assert len(rates) == 3 and {s for _, s in rates} == {0, 1}
    times = {m: (m / "result.json").stat().st_mtime_ns for m in members}
    assert cli.main([*arguments, "--scale", "small"]) == 0
    assert times == {m: (m / "result.json").stat().st_mtime_ns for m in members}
    # A metric that the task does not have is said, and the row stands as failed.
    assert cli.main([*arguments, "--scale", "paper"]) == 2
    assert "gives no metric 'rouge1'" in (tmp_path / "w" / "exp_paper.md").read_text()
    assert cli.main([*arguments, "--scale", "large"]) == 2


@pytest.mark.parametrize(
    "path",
    sorted([p for p in EXPERIMENTS.glob("*.py") if "def table(scale" in p.read_text()]),
    ids=lambda p: p.stem,
)
@pytest.mark.parametrize("scale", ["smoke", "small", "paper"])
def test_every_table_is_well_formed(path: Path, scale: str) -> None:
    """Published numbers are found, what it would run is a config that builds, LaTeX can say it."""
    from lora_jax import config as configs
    from lora_jax.experiment import from_dict, to_dict
    from lora_jax.sweeps import grid

    table = tables.load(str(path), scale)
    said = [table.title, *table.notes]
    for row in table.rows:
        said += [row.row, row.metric, *row.notes]
        if isinstance(row.work, tables.NotRun):
            said.append(row.work.reason)
        if row.published is not None:
            cited = row.published.look_up()
            assert math.isfinite(cited.value) and cited.status and cited.source
            said += [cited.source, cited.notes]
        if isinstance(row.work, tables.Trained):
            base = to_dict(from_dict(configs.load_file(row.work.config)))
            for one in row.work.grid or [{}]:
                from_dict(grid.assign_all(base, {**row.work.overrides, **one}))
    # Letters of Latin alphabets are pdflatex's own.
    assert {c for c in render._tex("".join(said)) if ord(c) >= 0x180} == set()
