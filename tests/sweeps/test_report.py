"""The report of a sweep: paired differences with known answers, and a page that needs no file."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from lora_jax.sweeps import fields, plots, report, update_plots, updates
from lora_jax.sweeps.fields import ALPHA, RANK, RATE, TARGETS

SEED = "seed"
KEYS = [RANK, RATE, SEED, TARGETS]


def frame() -> pd.DataFrame:
    """Error = effect of the rank + effect of the rate + a seed's own: differences are exact."""
    rows = []
    for rank, rate, targets, seed in itertools.product((1, 4), (1e-3, 1e-2), ("q", "all"), (0, 1)):
        error = {1: 0.5, 4: 0.3}[rank] + {1e-3: 0.1, 1e-2: 0.0}[rate] + 0.2 * seed
        row = {"member": f"{rank}{rate}{targets}{seed}", RANK: rank, RATE: rate, TARGETS: targets}
        rows.append(
            {**row, SEED: seed, "status": "finished", "error": error + 0.01 * (targets == "q"),
             "trainable_params": rank * (2 if targets == "all" else 1), "seconds": 1.0}
        )  # fmt: skip
    lost = {**rows[0], "member": "lost", "status": "diverged", "error": float("nan")}
    return pd.DataFrame([*rows, lost])


def test_paired_differences_do_not_see_what_seeds_and_other_fields_do() -> None:
    gaps = report.differences(frame(), KEYS, "error", higher_is_better=False).set_index("field")
    assert set(gaps.index) == {RANK, RATE, TARGETS}  # seeds are repetitions
    assert gaps.loc[RANK, "against"] == 4 and gaps.loc[RANK, "value"] == 1
    for field, gap in ((RANK, 0.2), (RATE, 0.1), (TARGETS, 0.01)):
        found = gaps.loc[field]
        assert found["pairs"] == 8
        assert found[["difference", "low", "high"]].tolist() == pytest.approx([gap] * 3)
    other = report.differences(frame(), KEYS, "error", higher_is_better=True).set_index("field")
    assert other.loc[RANK, "against"] == 1


def test_fields_that_vary_together_are_one() -> None:
    """alpha = 2·rank: ranks are compared all the same, and alpha does not tell the same again."""
    coupled = frame().assign(**{ALPHA: lambda x: 2.0 * x[RANK]})
    gaps = report.differences(coupled, [ALPHA, *KEYS], "error", False).set_index("field")
    both = f"{RANK}, {ALPHA}"  # which of them it was cannot be told
    assert set(gaps.index) == {both, RATE, TARGETS}
    assert gaps.loc[both, "pairs"] == 8 and gaps.loc[both, "difference"] == pytest.approx(0.2)
    assert fields.groups(coupled, [ALPHA, RANK, RATE]) == {RANK: [RANK, ALPHA], RATE: [RATE]}


def test_only_members_alike_in_all_else_are_compared() -> None:
    """alpha = s·rank: each alpha has one rank, so alphas are compared within it alone."""
    rows = [
        {RANK: rank, ALPHA: s * rank, SEED: seed, "error": {1: 0.5, 4: 0.1}[rank] + 0.01 * s}
        for rank, s, seed in itertools.product((1, 4), (1.0, 2.0), (0, 1))
    ]
    gaps = report.differences(pd.DataFrame(rows), [RANK, ALPHA, SEED], "error", False)
    assert gaps[["field", "value", "against", "pairs"]].values.tolist() == [[ALPHA, 8.0, 4.0, 2]]
    assert gaps["difference"].tolist() == pytest.approx([0.01])
    # What is confounded because few members finished says so.
    few = pd.DataFrame([
        {RANK: rank, RATE: rate, SEED: seed, "error": rate}
        for (rank, rate), seed in itertools.product(((1, 1e-4), (4, 1e-3)), (0, 1))
    ])  # fmt: skip
    assert set(report.differences(few, [RANK, RATE, SEED], "error", False)["field"]) == {
        f"{RANK}, {RATE}"
    }


def test_settings_are_ordered_and_seeds_are_repetitions() -> None:
    table = plots.Table.of(frame(), KEYS, "error", False)
    best = table.settings()
    assert len(best) == 8 and set(best["members"]) == {2}
    first = best.iloc[0]
    assert (first[RANK], first[RATE], first[TARGETS]) == (4, 1e-2, "all")
    assert first["mean"] == pytest.approx(0.4) and first["std"] == pytest.approx(0.2 / 2**0.5)
    over = fields.best_over_others(best, [RANK])
    assert over[RANK].tolist() == [1, 4] and over["mean"].tolist() == pytest.approx([0.6, 0.4])


def made(table: pd.DataFrame) -> pd.DataFrame:
    """Updates of two modules in two layers; those of one member are missing."""
    rows = []
    for _, row in table.iloc[1:].iterrows():
        for layer, module in itertools.product((0, 1), ("attention/query", "mlp/up")):
            size = row[RATE] * (layer + 1)
            rows.append(
                {"member": row["member"], "layer": layer, "module": module, "rank": row[RANK],
                 "scale": 2.0, "norm": size, "relative_norm": size / 3, "stable_rank": 1.0,
                 "effective_rank": 1.0,
                 "singular_values": [size / k for k in range(1, row[RANK] + 1)]}
            )  # fmt: skip
    return pd.DataFrame(rows)


OF_METRIC = {
    "error_over_method_rank", "error_over_optimizer_learning_rate", "error_over_method_targets",
    "best_rate_per_rank", "targets_ranked", "error_over_parameters", "paired_differences",
}  # fmt: skip
OF_UPDATES = {"update_size", "rank_used", "update_size_per_layer", "update_spectra"}


def test_the_page_holds_its_plots(tmp_path: Path) -> None:
    summary = {"members": "<17>", "versions": {"jax": "1"}}
    path = report.write(frame(), made(frame()), KEYS, "error", False, summary, tmp_path)
    images = {p.stem for p in tmp_path.glob("*.png")}
    assert images == OF_METRIC | OF_UPDATES
    page = path.read_text()
    assert page.count("data:image/png;base64,") == len(images) and "&lt;17&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)


def test_what_a_plot_of_updates_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    monkeypatch.setattr(
        plots, "save", lambda figure, folder, name, text: shown.update({name: figure})
    )
    table = plots.Table.of(frame(), KEYS, "error", False)
    update_plots.draw(table, made(frame()), tmp_path)
    _, sizes = shown["update_size"].axes
    points = sorted(x for c in sizes.collections for x, _ in c.get_offsets())
    assert len(points) == 15 and points[0] == pytest.approx(1.5e-3 / 3)  # one member has none
    panels = shown["update_size_per_layer"].axes
    assert len(panels) == 3 and "error 0.3" in panels[0].get_title(loc="left")
    assert {tuple(line.get_ydata()) for line in panels[0].lines} == {(1e-2 / 3, 2e-2 / 3)}
    spectrum = shown["update_spectra"].axes[0].lines[0]
    assert spectrum.get_ydata()[1] == pytest.approx(0.75e-2)  # halfway between the two layers
    assert update_plots.draw(table, pd.DataFrame(), tmp_path) == []
    # Beside a W that is zero no update has a relative size.
    update_plots.draw(table, made(frame()).assign(relative_norm=float("nan")), tmp_path)
    shown["update_size"].savefig(tmp_path / "nan.png")


def test_many_lines_are_the_best_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    monkeypatch.setattr(
        plots, "save", lambda figure, folder, name, text: shown.update({name: (figure, text)})
    )
    rows = [
        {"member": f"{rank}{rate}{d}", RANK: rank, RATE: rate, "method.dropout": d,
         "error": d + rate}
        for rank, rate, d in itertools.product((1, 2, 4), (1e-3, 1e-2, 1e-1), (0.1, 0.2, 0.3))
    ]  # fmt: skip
    plots.draw(
        plots.Table.of(pd.DataFrame(rows), [RANK, RATE, "method.dropout"], "error", False), tmp_path
    )
    figure, text = shown["error_over_method_rank"]
    lines = [c.lines[0] for c in figure.axes[0].containers]
    assert len(lines) == 3 and "at the best method.dropout" in text
    assert lines[0].get_ydata().tolist() == pytest.approx([0.101] * 3)


def test_none_is_a_value_among_words(tmp_path: Path) -> None:
    rows = [{"model.quantize": q, "error": e, "status": "finished"} for q, e in
            ((None, 0.1), ("nf4", 0.3), ("int8", 0.2))]  # fmt: skip
    table = plots.Table.of(pd.DataFrame(rows), ["model.quantize"], "error", False)
    assert plots.draw(table, tmp_path)


AXES = {
    "none among numbers": {"optimizer.clip_norm": (None, 1.0), RANK: (1, 2)},
    "ranks by rules": {RANK: (2, '[["query", 4], [".*", 2]]'), RATE: (1e-3, 1e-2)},
    "two regexes": {
        TARGETS: ('["^layers/0/attention/query/kernel$", "^layers_1^/v$"]', "all-linear"),
        RANK: (1, 2),
    },
    "yes and no": {"data.packing": (True, False)},
    "one alone": {ALPHA: (1.0, 2.0, 4.0)},
    "no field": {RANK: (4,)},
}


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_any_field_has_a_page(axes: dict[str, tuple], tmp_path: Path) -> None:
    rows = [
        {"member": str(i), **dict(zip(axes, values, strict=True)), "error": 0.1 * i}
        for i, values in enumerate(itertools.product(*axes.values()))
    ]
    table = pd.DataFrame(rows)
    size = table.assign(**{RANK: 2, RATE: 1e-3})
    page = report.write(table, made(size), list(axes), "error", False, {}, tmp_path).read_text()
    for key in plots.Table.of(table, list(axes), "error", False).fields:
        assert (tmp_path / f"error_over_{key.replace('.', '_')}.png").exists()
        assert (report.differences(table, list(axes), "error", False)["field"] == key).any()
    assert "^layers_1^/v$" in page or TARGETS not in axes  # in full, however long


def test_an_infinite_metric_is_no_value(tmp_path: Path) -> None:
    table = frame().iloc[:-1].astype({"error": float})
    table.loc[0, "error"] = float("inf")
    gaps = report.differences(table, KEYS, "error", False)
    assert gaps.set_index("field").loc[RANK, "pairs"] == 7
    assert report.write(table, made(table), KEYS, "error", False, {}, tmp_path).exists()


def test_targets_that_begin_alike_have_a_bar_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    monkeypatch.setattr(
        plots, "save", lambda figure, folder, name, text: shown.update({name: figure})
    )
    rows = [{"member": x, TARGETS: "layers/.*/attention/(query|value|key)/" + x, "error": e}
            for x, e in (("a", 0.1), ("b", 0.3))]  # fmt: skip
    plots.draw(plots.Table.of(pd.DataFrame(rows), [TARGETS], "error", False), tmp_path)
    bars = shown["targets_ranked"].axes[0].patches
    assert len({bar.get_y() for bar in bars}) == 2


def test_what_other_members_set_is_read_from_a_members_config(tmp_path: Path) -> None:
    members = [
        SimpleNamespace(name="a", overrides={RANK: 4}),
        SimpleNamespace(name="b", overrides={RATE: 0.5, "method.lr_ratio": 2.0}),
    ]
    configs = [
        {"method": {"rank": 4}, "optimizer": {"learning_rate": 0.1}},
        {"method": {"rank": 8, "lr_ratio": 2.0}, "optimizer": {"learning_rate": 0.5}},
    ]
    for member, config in zip(members, configs, strict=True):
        (tmp_path / member.name).mkdir()
        result = {"status": "finished", "metrics": {"error": 0.1}, "seconds": 1.0, "config": config}
        (tmp_path / member.name / "result.json").write_text(json.dumps(result))
    found = report.table(members, tmp_path)
    assert list(found)[:5] == ["member", RANK, RATE, "method.lr_ratio", "status"]
    assert found[RANK].tolist() == [4, 8] and found[RATE].tolist() == [0.1, 0.5]
    assert pd.isna(found["method.lr_ratio"][0])


def test_a_sweep_without_the_metric_draws_nothing(tmp_path: Path) -> None:
    nothing = frame().drop(columns="error")
    report.write(nothing, made(frame()), KEYS, "error", False, {}, tmp_path)
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "report.html").exists()


def test_updates_are_those_of_the_evaluation_that_was_kept(tmp_path: Path) -> None:
    row = {"path": "layers/1/mlp/up", "rank": 1, "scale": 2.0, "singular_values": [1.0]}
    numbers = ("norm", "relative_norm", "stable_rank", "effective_rank")
    for keep, name in (("best", "a"), ("last", "b")):
        (tmp_path / name).mkdir()
        result = {"best_step": 2, "config": {"training": {"keep": keep}}}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
        lines = [{"step": s, "matrices": [{**row, **dict.fromkeys(numbers, s)}]} for s in (2, 4)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "spectra.jsonl").write_text(text)
    members = [SimpleNamespace(name=name) for name in ("a", "b", "still running")]
    found = updates.updates(members, tmp_path)
    assert found["step"].tolist() == found["norm"].tolist() == [2, 4]
    assert found["layer"].tolist() == [1, 1] and set(found["module"]) == {"mlp/up"}
    assert updates.means(found)["update.scale"].tolist() == [2.0, 2.0]
