"""Tiny models with sites, and the papers' models as shapes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.models import family_for
from lora_jax.models.bert import Bert, BertConfig
from lora_jax.models.gpt2 import GPT2, GPT2Config
from lora_jax.models.llama import Llama, LlamaConfig
from lora_jax.pretrained.assemble import abstract_params

V, L, D, B, T = 31, 2, 16, 2, 6
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(4, V, (B, T))
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "num_layers": L, "num_heads": 4, "mlp_size": 20,
    "max_positions": 24,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": Llama(LlamaConfig(**SIZES, num_kv_heads=2, head_dim=4, tied=True)),
    "mistral": Llama(LlamaConfig(**SIZES, num_kv_heads=2, head_dim=4, tied=True, window=5)),
    "gpt2": GPT2(GPT2Config(**SIZES)),
    "bert": Bert(BertConfig(**SIZES, head="classification", num_labels=3)),
    "bert bare": Bert(BertConfig(**SIZES)),
}


@functools.cache
def params_of(name: str) -> Any:
    """Parameters large enough that every module matters."""
    model = MODELS[name]
    shapes = jax.eval_shape(model.init, KEY, TOKENS)["params"]
    rng = np.random.default_rng(1)

    def leaf(path: Any, like: Any) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.asarray(rng.normal(1.0, 0.3, like.shape), jnp.float32)
        fan = {"kernel": 1.5 / like.shape[-2] ** 0.5 if like.ndim > 1 else 1.0}
        deviation = {**fan, "bias": 0.3, "embedding": 1.0}[path[-1].key]
        return jnp.asarray(rng.normal(0.0, deviation, like.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.partial(jax.jit, static_argnames=("model", "options"))
def _run(model: Any, variables: Any, tokens: Any, arrays: Any, options: Any) -> Any:
    return lj.adapt(model.apply)(variables, tokens, **arrays, **dict(options))


def run(name: str, variables: Any, tokens: Any = TOKENS, static: Any = (), **arrays: Any) -> Any:
    """What the model gives, adapted and compiled."""
    return _run(MODELS[name], variables, tokens, arrays, tuple(dict(static).items()))


def moved(trainable: Any, by: float = 0.3, seed: int = 2) -> Any:
    """The tree with noise in every array."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + by * rng.normal(size=x.shape).astype(np.float32), trainable)


def near(a: Any, b: Any, tolerance: float = 2e-5) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=tolerance * float(np.abs(b).max()), rtol=0)


def differ(a: Any, b: Any) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(a - b).max() > 0.01 * b.std()


def shapes(kind: str, d: int, layers: int, vocabulary: int, positions: int) -> Any:
    """The parameters of a bare "gpt2", "bert" or "roberta" of these sizes, as shapes."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": d, "num_layers": layers, "num_heads": d // 64,
        "max_positions": positions,
    }  # fmt: skip
    if kind == "gpt2":
        config: Any = GPT2Config(**common)
    else:
        more = {"model_type": kind, "pad_id": 1, "num_token_types": 1 if kind == "roberta" else 2}
        config = BertConfig(**common, mlp_size=4 * d, **more)
    return abstract_params(family_for(config.model_type).tensors(config))


PAPERS = {
    "GPT-2 M": ("gpt2", 1024, 24, 50257, 1024),
    "GPT-2 L": ("gpt2", 1280, 36, 50257, 1024),
    "GPT-3": ("gpt2", 12288, 96, 50257, 2048),
    "RoBERTa-base": ("roberta", 768, 12, 50265, 514),
    "RoBERTa-large": ("roberta", 1024, 24, 50265, 514),
    "BERT-large": ("bert", 1024, 24, 30522, 512),
}


def count(paper: str, method: Any) -> int:
    """Trainable parameters of the method on a model of a paper, of shapes alone."""
    return method.count(shapes(*PAPERS[paper])).total
