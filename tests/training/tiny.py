"""A two-layer Llama, a LoRA on it and random batches, shared by the tests of training."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.methods import LoRA
from lora_jax.models.llama import Llama, LlamaConfig

VOCABULARY, WIDTH, ROWS, LENGTH = 32, 16, 8, 12
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    mlp_size=24,
)
MODEL = Llama(CONFIG)
METHOD = LoRA(rank=4, alpha=8, targets=r"attention/(query|value)$", train=(r"final_norm/scale$",))


@functools.cache
def params():
    variables = jax.jit(MODEL.init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))
    # Larger than the usual start, so that argmaxes and gradients are not all alike.
    return jax.tree.map(lambda x: x * 3.0 if x.ndim > 1 else x, variables["params"])


def batch(seed, rows=ROWS):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(5, LENGTH + 1, rows)
    places = np.arange(LENGTH)[None]
    inside = places < lengths[:, None]
    tokens = draw.integers(3, VOCABULARY, (rows, LENGTH))
    return {
        "tokens": np.where(inside, tokens, 0).astype(np.int32),
        "loss_mask": (inside & (places >= 2)).astype(np.float32),
        "positions": np.broadcast_to(places, (rows, LENGTH)).astype(np.int32),
        "segment_ids": inside.astype(np.int32),
    }


class Head:
    """A model with a head in the least code: the mean of a row of `table` a token."""

    @staticmethod
    def apply(variables, tokens, attention_mask=None, token_type_ids=None):
        rows_BTC = variables["table"][jnp.asarray(tokens)]
        mask_BT1 = jnp.asarray(attention_mask, jnp.float32)[..., None]
        return jnp.sum(rows_BTC * mask_BT1, 1) / jnp.sum(mask_BT1, 1)


class Batches:
    """An endless iterator whose state is a number, as Grain's is JSON."""

    def __init__(self, poison_at=None, stop_at=None):
        self.at, self.poison_at, self.stop_at = 0, poison_at, stop_at

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        if self.stop_at is not None and self.at > self.stop_at:
            raise StopIteration
        made = batch(self.at)
        if self.at == self.poison_at:
            made["loss_mask"] = made["loss_mask"] * np.float32("nan")
        return made

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = json.loads(json.dumps(state))["at"]


def same(a, b):
    """Bitwise equality of two trees."""
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves_a) == len(leaves_b)
    for x, y in zip(leaves_a, leaves_b, strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def close(a, b, rtol=2e-4, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)
