"""Fake CPU devices and strict JAX settings, set before anything imports jax."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real test data; tests that need it are skipped where it is missing."""
    default = pathlib.Path(__file__).parents[2] / "shared"
    folder = pathlib.Path(os.environ.get("LORA_JAX_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set LORA_JAX_TEST_DATA")
    return folder
