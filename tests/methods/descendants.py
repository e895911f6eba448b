"""A toy model in few equations and one instance of each descendant of LoRA, for their tests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax import methods
from lora_jax.methods import adalora, eva, galore, lora_ga, lora_xs, relora, vera

KEY = jax.random.key(0)
L, D, H, V = 3, 6, 10, 8
LAYERS = f"layers[0:{L}]"
QUERY, VALUE, DOWN = (
    f"{LAYERS}/{name}/kernel" for name in ("attention/query", "attention/value", "mlp/down")
)
BOTH = r"attention/(query|value)$"
TOKENS = np.random.default_rng(0).integers(0, V, (2, 5))


def toy_params(dtype: Any = jnp.float32) -> Any:
    """A stack of layers with two square and two other kernels, an embedding and a head."""
    rng = np.random.default_rng(1)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, 1.5 / shape[-2] ** 0.5, shape), dtype)

    kernel = {
        "attention": {n: {"kernel": random(L, D, D)} for n in ("query", "value")},
        "mlp": {"up": {"kernel": random(L, D, H)}, "down": {"kernel": random(L, H, D)}},
    }
    head = {"kernel": random(D, V), "bias": jnp.zeros(V, dtype)}
    return {"embed": {"embedding": random(V, D)}, LAYERS: kernel, "head": head}


def toy(variables: Any, tokens: jax.Array, **_: Any) -> jax.Array:
    """Logits [B, T, V]."""
    p = variables["params"]

    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        a, m = w["attention"], w["mlp"]
        x = x + jnp.tanh(x @ a["query"]["kernel"]) * (x @ a["value"]["kernel"])
        return x + jnp.tanh(x @ m["up"]["kernel"]) @ m["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, jnp.take(p["embed"]["embedding"], tokens, axis=0), p[LAYERS])
    return x @ p["head"]["kernel"] + p["head"]["bias"][None, None]


def batch(seed: int = 0) -> dict[str, Any]:
    tokens = np.random.default_rng(seed).integers(0, V, (2, 5)).astype(np.int32)
    return {"tokens": tokens, "loss_mask": np.ones((2, 5), np.float32)}


def toy_loss(variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """As the losses of training: (sum, weight)."""
    logits = lj.adapt(toy)(variables, batch["tokens"])[:, :-1]
    chosen = jnp.take_along_axis(logits, jnp.asarray(batch["tokens"])[:, 1:, None], -1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits, -1) - chosen), jnp.float32(chosen.size)


@jax.jit
def logits(variables: Any) -> jax.Array:
    return lj.adapt(toy)(variables, TOKENS)


@functools.cache
def prepared(name: str) -> Any:
    """The method of that name in METHODS, after it has looked at data."""
    return METHODS[name].prepare(lj.adapt(toy), toy_params(), [batch(i) for i in range(2)])


METHODS: dict[str, Any] = {
    "lora_plus": methods.METHODS["lora_plus"](rank=2, alpha=3.0, lr_ratio=4.0),
    "dora": methods.METHODS["dora"](rank=2, alpha=3.0),
    "lora_fa": methods.METHODS["lora_fa"](rank=2, alpha=3.0, projection_seed=3),
    "vera": vera.VeRA(rank=4, targets=(BOTH, "mlp/"), d_initial=0.5),
    "ia3": methods.METHODS["ia3"](targets=(r"value$", r"mlp/down$")),
    "pissa": methods.METHODS["pissa"](rank=2, alpha=3.0),
    "olora": methods.METHODS["olora"](rank=2, alpha=3.0, targets=(BOTH, "mlp/")),
    "loha": methods.METHODS["loha"](rank=2, alpha=3.0, targets=(BOTH, "mlp/up")),
    "lokr": methods.METHODS["lokr"](rank=1, alpha=3.0, targets=(BOTH, "mlp/")),
    "adalora": adalora.AdaLoRA(rank=3, target_rank=1, alpha=3.0, total_steps=10),
    "lora_xs": lora_xs.LoRAXS(rank=2, alpha=3.0),
    "eva": eva.EVA(rank=2, alpha=3.0, batches=2),
    "lora_ga": lora_ga.LoRAGA(rank=2, alpha=3.0, scaling="rslora", batches=2),
    "relora": relora.ReLoRA(rank=2, alpha=3.0, every=2, warmup=1),
    "galore": galore.GaLore(rank=2, every=2, train=("kernel$",)),
}


def moved(trainable: Any, seed: int = 1, size: float = 0.2) -> Any:
    """The tree with noise on every entry."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(size * rng.normal(size=x.shape), x.dtype), trainable
    )
