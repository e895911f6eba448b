"""Configs on real data, which may lie in a folder that the environment names.

`GLUE_DIR`, `MNIST_DIR`: TFDS's glue and mnist, if they are not in the usual place. `E2E_DIR`: the
original E2E challenge's trainset.csv and testset_w_refs.csv; without it, the cleaned data of TFDS
is meant.
"""

import os
from collections.abc import Mapping
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def glue(config: Path = CONFIGS / "glue.py", **arg: object) -> str:
    """`path/of/config.py:arg`, with `data_dir` where there is one."""
    return _with_data(config, os.environ.get("GLUE_DIR"), arg)


def mnist(**arg: object) -> str:
    """`path/of/mnist.py:arg`, with `data_dir` where there is one."""
    return _with_data(CONFIGS / "mnist.py", os.environ.get("MNIST_DIR"), arg)


def e2e(model: str, **arg: object) -> str:
    """`path/of/e2e.py:arg`."""
    full = {"model": model, **arg, "folder": os.environ.get("E2E_DIR", "")}
    return f"{CONFIGS / 'e2e.py'}:{','.join(f'{k}={v}' for k, v in full.items())}"


def _with_data(config: Path, folder: str | None, arg: Mapping[str, object]) -> str:
    full = {**arg, **({"data_dir": folder} if folder else {})}
    return f"{config}:{','.join(f'{k}={v}' for k, v in full.items())}"


def e2e_notes() -> tuple[str, ...]:
    """What a table of the original challenge's numbers says where the data are others."""
    if os.environ.get("E2E_DIR"):
        return ()
    return (
        "E2E_DIR is not set: trained and scored on the cleaned data of TFDS, which the published "
        "numbers are not of; the steps are epochs of the original's 42,061 pairs",
    )


def e2e_split(name: str) -> str:
    """What the data calls "train" and "test"."""
    original = {"train": "trainset", "test": "testset_w_refs"}
    return original[name] if os.environ.get("E2E_DIR") else name
