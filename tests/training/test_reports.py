"""Where a run's numbers go."""

import sys

import pytest

from lora_jax.training import reports


@pytest.fixture
def other_torch(tmp_path, monkeypatch):
    """A stand-in for torch to import, in place of an installed one; tensorboardX is unloaded."""
    (tmp_path / "torch.py").write_text("Tensor = int\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    yield
    sys.modules.pop("torch", None)


def test_torch_is_not_imported_to_write_events(tmp_path, other_torch):
    with reports.Reporter(tmp_path / "run", start=0, steps=1, progress=False) as reporter:
        reporter.log(1, {"loss": 2.0})
    assert "torch" not in sys.modules
    import torch

    assert torch.Tensor is int  # whoever needs it has it
    assert reports.read_metrics(tmp_path / "run" / reports.METRICS_FILE) == [
        {"step": 1, "loss": 2.0}
    ]
    assert any((tmp_path / "run" / "tensorboard").iterdir())
