"""Configs on real data, which may lie in a folder that the environment names.

`GLUE_DIR`: TFDS's glue, if it is not in the usual place. `E2E_DIR`: the original E2E challenge's
trainset.csv and testset_w_refs.csv; without it, the cleaned data of TFDS is meant.
"""

import os
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def glue(config: Path = CONFIGS / "glue.py", **arg: object) -> str:
    """`path/of/config.py:arg`, with `data_dir` where there is one."""
    folder = os.environ.get("GLUE_DIR")
    full = {**arg, **({"data_dir": folder} if folder else {})}
    return f"{config}:{','.join(f'{k}={v}' for k, v in full.items())}"


def e2e(model: str, **arg: object) -> str:
    """`path/of/e2e.py:arg`."""
    full = {"model": model, **arg, "folder": os.environ.get("E2E_DIR", "")}
    return f"{CONFIGS / 'e2e.py'}:{','.join(f'{k}={v}' for k, v in full.items())}"


def e2e_split(name: str) -> str:
    """What the data calls "train" and "test"."""
    original = {"train": "trainset", "test": "testset_w_refs"}
    return original[name] if os.environ.get("E2E_DIR") else name
