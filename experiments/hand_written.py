"""LoRA on a Llama written out by hand in plain JAX: what `lora_jax.adapt` is measured against.

No framework, no Module, no interpreter: `x @ W + s * (x @ A) @ B` stands in the layer itself. Norm,
gate and attention are lora_jax's own functions: what is left to differ is the interpreter, and the
head, which lora_jax takes in chunks. The trees are lora_jax's (`params` of a Llama without biases
in one stack; LoRA factors on query and value), so that both arms start from the same numbers.

Axes: B rows, T positions, D width, N query heads, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.models.activations import gated
from lora_jax.models.attention import attend
from lora_jax.models.norms import normalize

TARGETS = ("query", "value")


def norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    normed = normalize(x.astype(jnp.float32), epsilon, False).astype(x.dtype)
    return normed * scale[None, None].astype(x.dtype)


def rotate(x_BTNH: jax.Array, cos_TF: jax.Array, sin_TF: jax.Array) -> jax.Array:
    cos, sin = cos_TF[None, :, None], sin_TF[None, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


def hidden(
    config: Any, params: Any, factors: dict[str, Any], scale: float, tokens: jax.Array
) -> jax.Array:
    """Hidden states [B, T, D] after the final norm."""
    c = config
    rows, length = tokens.shape
    power = jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * (c.rope_theta**-power)[None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    causal = jnp.tril(jnp.ones((1, 1, length, length), bool))

    def layer(x: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        p, ab = inputs
        attention, mlp = p["attention"], p["mlp"]
        y = norm(x, p["attention_norm"]["scale"], c.norm_eps)

        def project(name: str, heads: int) -> jax.Array:
            out = y @ attention[name]["kernel"]
            if name in TARGETS:
                a, b = ab[name]["a"].astype(y.dtype), ab[name]["b"].astype(y.dtype)
                out = out + (scale * (y @ a)) @ b
            return out.reshape(rows, length, heads, c.head_dim)

        q = rotate(project("query", c.num_heads), cos, sin)
        k = rotate(project("key", c.num_kv_heads), cos, sin)
        v = project("value", c.num_kv_heads)
        y = attend(q, k, v, causal)
        x = x + y.reshape(rows, length, -1) @ attention["out"]["kernel"]
        y = norm(x, p["mlp_norm"]["scale"], c.norm_eps)
        inner = gated("silu")(y @ mlp["gate"]["kernel"], y @ mlp["up"]["kernel"])
        return x + inner @ mlp["down"]["kernel"], None

    x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
    stack = params[f"layers[0:{c.num_layers}]"]
    x, _ = jax.lax.scan(layer, x, (stack, factors))
    return norm(x, params["final_norm"]["scale"], c.norm_eps)


def loss(config: Any, params: Any, factors: Any, scale: float, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of every token after the first, float32, nats."""
    h_BTD = hidden(config, params, factors, scale, tokens)
    # All T positions go through the head, as a slice of the logits would be a copy of them.
    if config.tied:
        logits = jnp.einsum("btd,vd->btv", h_BTD, params["embed"]["embedding"])
    else:
        logits = h_BTD @ params["head"]["kernel"]
    logits = logits.astype(jnp.float32)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.mean(losses[:, :-1])


def factors_of(config: Any, trainable: dict[str, Any]) -> dict[str, Any]:
    """lora_jax's LoRA factors, {"query": {"a": [L, D, r], "b": [L, r, out]}, "value": …}."""
    stack = f"layers[0:{config.num_layers}]"
    return {name: trainable[f"{stack}/attention/{name}/kernel"] for name in TARGETS}


def make_step(
    config: Any, scale: float, tx: optax.GradientTransformation
) -> Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]]:
    """The jitted `step(params, (factors, opt_state), tokens) -> ((factors, opt_state), loss)`."""

    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        factors, opt_state = state
        value, grads = jax.value_and_grad(lambda f: loss(config, params, f, scale, tokens))(factors)
        updates, opt_state = tx.update(grads, opt_state, factors)
        return (optax.apply_updates(factors, updates), opt_state), value

    return jax.jit(step, donate_argnums=1)
