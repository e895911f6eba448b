"""LoRA through the scanned Llama: equal to merged weights, and the frozen part stays out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models.llama import Llama, LlamaConfig

CONFIG = dict(
    vocab_size=31, hidden_size=12, num_layers=3, num_heads=3, num_kv_heads=1, head_dim=4,
    mlp_size=20, tied=True,
)  # fmt: skip
TOKENS = jnp.array([[1, 5, 7, 2], [3, 4, 30, 0]])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_logits_and_gradients_equal_the_merged_model(remat):
    model = Llama(LlamaConfig(**CONFIG, remat=remat))
    params = model.init(jax.random.key(0), TOKENS)["params"]
    method = lj.LoRA(rank=((r"layers/1/", 1), (".*", 3)), targets=(r"attention/", r"mlp/", "embed"))
    trainable = method.init(jax.random.key(1), params)
    start = lj.adapt(model.apply)(method.combine(params, trainable), TOKENS)
    base = model.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(start, base, atol=1e-6)  # B is zero (A for the embedding)
    keys = iter(jax.random.split(jax.random.key(2), 100))
    ranks = method.ranks(params)

    def moved(path, ab):
        live = jnp.arange(3)[None] < jnp.array(ranks[path])[:, None]  # padding stays zero
        live = live if ab["a"].ndim == 3 else live[0]
        noise = {k: 0.3 * jax.random.normal(next(keys), x.shape) for k, x in ab.items()}
        mask = {"a": live[..., None, :], "b": live[..., :, None]}
        return {k: jnp.where(mask[k], ab[k] + noise[k], 0.0) for k in ab}

    trainable = {path: moved(path, ab) for path, ab in trainable.items()}

    def ours(t):
        return lj.adapt(model.apply)(method.combine(params, t), TOKENS)

    def merged(t):
        return model.apply({"params": method.merge(params, t)}, TOKENS)

    want = merged(trainable)
    assert np.abs(want - base).max() > 0.1
    np.testing.assert_allclose(ours(trainable), want, atol=2e-5 * float(jnp.abs(want).max()))
    got, expected = (
        jax.jit(jax.grad(lambda t, f=f: jnp.sum(f(t) ** 2)))(trainable) for f in (ours, merged)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5 * float(jnp.abs(b).max()))
