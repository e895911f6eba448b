"""The table of methods: what it says is so, and the README has it."""

from __future__ import annotations

import pathlib

import pytest

import lora_jax as lj
from lora_jax import cli
from lora_jax.methods import METHODS, Method, table

ROWS = {row.name: row for row in table.rows()}


def test_the_readme_has_the_table():
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    found = readme.split(table.BEGIN)[1].split(table.END)[0].strip()
    assert found == table.markdown(), "write what `lora-jax list methods` prints into README.md"


def test_every_method_is_in_it_with_all_that_it_says(capsys):
    assert {n for n, c in METHODS.items() if c.__module__.startswith("lora_jax.")} == set(ROWS)
    assert all(row.trains for row in ROWS.values())
    assert {n for n, row in ROWS.items() if not row.source} == {"full", "head_only"}
    assert ROWS["lora"].source == (("Hu et al.", "2021", "2106.09685"),)
    assert ROWS["ft_top"].source == (("Li and Liang", "2021", "2101.00190"),)
    assert ROWS["olora"].source[0][0] == "Büyükakyüz"
    assert (ROWS["dora"].peft, ROWS["vera"].peft, ROWS["lora_xs"].peft) == (
        "LORA, use_dora", "VERA", "",
    )  # fmt: skip
    assert cli.main(["list", "methods"]) == 0
    assert capsys.readouterr().out.strip() == table.markdown()


@pytest.mark.parametrize("name", ROWS)
def test_what_merges_merges(name):
    """A method that acts on activations says that it cannot, whatever it gets."""
    if not ROWS[name].merges:
        assert ROWS[name].inference != "none"
        with pytest.raises(lj.UserError, match="cannot be merged"):
            METHODS[name]().merge({}, {})
        return
    assert ROWS[name].inference == "none"
    assert METHODS[name].merge is not Method.merge  # that it does is tested with each method
