"""Folders that transformers wrote, and folders written for transformers."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from random_llama import TINY, random_model

from lora_jax.pretrained import load_pretrained, save_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_is_saved(tmp_path, tokens, tied):
    model, params = random_model(tie_word_embeddings=tied)
    save_pretrained(tmp_path / "m", model, params)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want = theirs(torch.tensor(tokens, dtype=torch.long)).logits.detach().numpy()
    got = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_saves_is_loaded(tmp_path, tokens, dtype):
    torch.manual_seed(0)
    config = {k: v for k, v in TINY.items() if k not in ("model_type", "rope_theta")}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path / "m", max_shard_size="8KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    model, params = load_pretrained(tmp_path / "m")
    want = theirs.float()(torch.tensor(tokens, dtype=torch.long)).logits.detach().numpy()
    got = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
