"""The quick sweep of configs/ is what its docstring says: 24 members, paired over seeds."""

from lora_jax import config
from lora_jax.sweeps import grid

FILE = "configs/sweep_quick.py"


def test_its_members() -> None:
    combos = grid.cross(grid.generators(FILE))
    found = grid.unique(grid.members(config.load_file(FILE), combos))
    assert len(found) == 24
    assert {m.experiment.method.alpha / m.experiment.method.rank for m in found} == {2.0}
    for member in found:
        e = member.experiment
        assert e.data.seed == e.seed and e.training.steps == 160 and e.data.task.name == "sst2"
    short = config.load_file(f"{FILE}:steps=2,data_dir=somewhere")
    assert short["data"]["source"]["data_dir"] == "somewhere" and short["training"]["steps"] == 2
