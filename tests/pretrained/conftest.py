"""Fixtures around a tiny random Llama."""

from __future__ import annotations

import numpy as np
import pytest
from random_llama import random_model

from lora_jax.pretrained import save_pretrained


@pytest.fixture
def tiny(tmp_path):
    """(folder, model, params)."""
    model, params = random_model()
    save_pretrained(tmp_path / "base", model, params)
    return tmp_path / "base", model, params


@pytest.fixture
def tokens() -> np.ndarray:
    return np.arange(14, dtype=np.int32).reshape(2, 7) * 5 % 32
