"""A tiny model of each family, with weights large enough that every block matters."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models import prompt_length
from lora_jax.models.bert import Bert, BertConfig
from lora_jax.models.gpt2 import GPT2, GPT2Config
from lora_jax.models.llama import Llama, LlamaConfig

V, L, D, B, T = 37, 3, 16, 2, 7
TOKENS = np.random.default_rng(0).integers(4, V, (B, T))
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "num_layers": L, "num_heads": 4, "mlp_size": 20,
    "max_positions": 24,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": Llama(
        LlamaConfig(**SIZES, num_kv_heads=2, head_dim=6, attention_bias=True, tied=True)
    ),
    "gpt2": GPT2(GPT2Config(**SIZES)),
    "bert": Bert(BertConfig(**SIZES, head="lm", num_token_types=2)),
    "roberta": Bert(BertConfig(**SIZES, head="classification", model_type="roberta", pad_id=3)),
}


def draw(model: Any, seed: int = 1) -> Any:
    """Parameters of the shapes that the model's init has."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(seed)

    def leaf(path: Any, like: Any) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.asarray(rng.normal(1.0, 0.3, like.shape), jnp.float32)
        kernel = like.shape[-2] if like.ndim > 1 else 1
        deviation = {"kernel": 1.5 / kernel**0.5, "bias": 0.3, "embedding": 1.0}
        return jnp.asarray(rng.normal(0.0, deviation[path[-1].key], like.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def params_of(name: str) -> Any:
    return draw(MODELS[name])


@functools.partial(
    jax.jit,
    static_argnames=("model", "method", "output_hidden_states", "deterministic"),
)
def apply(model: Any, params: Any, tokens: Any = TOKENS, sites: Any = None, **options: Any) -> Any:
    variables = {"params": params} | ({"sites": sites} if sites else {})
    return model.apply(variables, tokens, **options)


@functools.partial(jax.jit, static_argnames=("model", "first"))
def step(model: Any, params: Any, sites: Any, cache: Any, index: Any, tokens: Any, first: bool,
         **options: Any) -> Any:  # fmt: skip
    """One call with a cache. A prompt site is written by the call with a concrete index 0."""
    variables = {"params": params} | ({"sites": sites} if sites else {})
    index = 0 if first else index
    return model.apply(variables, tokens, cache=cache, cache_index=index, **options)


def decode(
    model: Any, params: Any, sites: Any = None, pad: int = 0, long_mask: bool = False
) -> Any:
    """Logits of TOKENS from a prefill of 3 and single steps, `pad` tokens left-padded."""
    prompt = prompt_length({"sites": sites} if sites else {})
    tokens = np.pad(TOKENS, ((0, 0), (pad, 0)))
    slots = pad + T + 2
    mask = np.zeros((B, slots + (prompt if long_mask else 0)), np.int32)
    mask[:, pad : pad + T] = 1
    positions = np.maximum(np.arange(pad + T) - pad, 0)[None].repeat(B, 0)
    cache = model.init_cache(B, prompt + slots, "float32")
    parts = []
    for start, stop in [(0, pad + 3), *((i, i + 1) for i in range(pad + 3, pad + T))]:
        part = {"positions": positions[:, start:stop], "attention_mask": mask}
        rows = tokens[:, start:stop]
        logits, cache = step(model, params, sites, cache, start, rows, start == 0, **part)
        parts.append(logits)
    return jnp.concatenate(parts, axis=1)[:, pad:]


def near(a: Any, b: Any, tolerance: float = 2e-5) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=tolerance * max(float(b.std()), 1e-9), rtol=0)


def differ(a: Any, b: Any) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(a - b).max() > 0.01 * b.std()


def cut(tree: Any, *edges: int) -> Any:
    """Parameters or sites with the whole stack cut into segments."""
    rest = {k: v for k, v in tree.items() if k != f"layers[0:{L}]"}
    for low, high in itertools.pairwise(edges):
        part = jax.tree.map(lambda a, s=slice(low, high): a[s], tree[f"layers[0:{L}]"])
        rest[f"layers[{low}:{high}]"] = part
    return rest


# What a method might put at a site.


def scaled(params: Any, x: jax.Array, **context: Any) -> jax.Array:
    return x * params["factor"]


def replaced(params: Any, x: jax.Array, *, inputs: jax.Array) -> jax.Array:
    return inputs * params["factor"]


def prefix(params: Any, k: jax.Array, v: jax.Array, **context: Any) -> tuple[Any, Any]:
    def before(new_PKH: jax.Array, old: jax.Array) -> jax.Array:
        rows = jnp.broadcast_to(new_PKH[None], (old.shape[0], *new_PKH.shape))
        return jnp.concatenate([rows, old], axis=1)

    return before(params["key"], k), before(params["value"], v)


def prompt(params: Any, x: jax.Array, tokens: Any, **context: Any) -> jax.Array:
    rows = jnp.broadcast_to(params["prompt"][None], (x.shape[0], *params["prompt"].shape))
    return jnp.concatenate([rows, x], axis=1)
