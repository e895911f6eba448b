"""Progress bars are drawn where they can be."""

from __future__ import annotations

from typing import Any

import pytest

from lora_jax import progress


@pytest.mark.parametrize(("notebook", "widgets"), [(False, False), (True, False), (True, True)])
def test_a_notebook_without_widgets_has_no_bars(
    notebook: bool, widgets: bool, monkeypatch: Any, capsys: Any
) -> None:
    """rich warns there at each redraw; one line says what is missing instead."""
    console = type("Console", (), {"is_jupyter": notebook})()
    monkeypatch.setattr(progress, "get_console", lambda: console)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: widgets or None)
    progress._possible.cache_clear()
    try:
        assert progress.drawable(True) == progress.drawable(True) == (widgets or not notebook)
        assert not progress.drawable(False)
        said = capsys.readouterr().out
        assert said.count("pip install ipywidgets") == int(notebook and not widgets)
    finally:
        progress._possible.cache_clear()
