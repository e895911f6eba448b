"""Classifiers of images: published sizes, LeNet against convolutions, and folders of their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lora_jax as lj
from lora_jax import partition, pretrained
from lora_jax.errors import UserError
from lora_jax.models import FAMILIES, family_for
from lora_jax.models.lenet import LeNet, LeNetConfig
from lora_jax.models.mlp import Mlp, MlpConfig

SHAPES: dict[str, dict[str, Any]] = {"mlp": {"model_type": "mlp"}, "lenet": {"model_type": "lenet"}}


@pytest.mark.parametrize(("name", "count"), [("mlp", 199_210), ("lenet", 44_426)])
def test_published_sizes_and_the_table_s_shapes(name: str, count: int) -> None:
    model, params = pretrained.draw(SHAPES[name], 0)
    flat = {path: x.shape for path, x in partition.flatten(params).items()}
    assert sum(int(np.prod(s)) for s in flat.values()) == count
    specs = family_for(name).tensors(model.config)
    assert flat == {spec.path: spec.our_shape for spec in specs}
    assert family_for(name).reads == "images"
    assert FAMILIES["llama"].reads == "tokens"


def test_a_seed_decides_the_weights() -> None:
    one, same, other = (pretrained.draw(SHAPES["mlp"], s)[1] for s in (1, 1, 2))
    np.testing.assert_array_equal(one["head"]["kernel"], same["head"]["kernel"])
    assert np.abs(one["head"]["kernel"] - other["head"]["kernel"]).max() > 0.1
    kernel = one["hidden_0"]["kernel"]
    assert float(kernel.std()) == pytest.approx((2 / 784) ** 0.5, rel=0.02)
    _, half = pretrained.draw(SHAPES["mlp"], 1, dtype="bfloat16")
    assert half["head"]["kernel"].dtype == jnp.bfloat16


def test_lenet_is_two_convolutions_and_three_layers() -> None:
    """Against convolutions and pooling as flax has them."""
    params = LeNet(LeNetConfig()).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    params = jax.tree.map(lambda x: x + 0.05, params)  # no bias is zero
    x = jax.random.normal(jax.random.key(1), (3, 28, 28, 1))
    y = x
    for name, maps in (("conv_0", 1), ("conv_1", 6)):
        kernel = params[name]["kernel"].reshape(5, 5, maps, -1)
        conv = nn.Conv(kernel.shape[-1], (5, 5), padding="VALID")
        y = conv.apply({"params": {"kernel": kernel, "bias": params[name]["bias"]}}, y)
        y = nn.max_pool(nn.relu(y), (2, 2), (2, 2))
    y = y.reshape(3, -1)
    for name in ("hidden_0", "hidden_1", "head"):
        y = nn.relu(y) if name != "hidden_0" else y
        y = y @ params[name]["kernel"] + params[name]["bias"].reshape(1, -1)
    found = LeNet(LeNetConfig()).apply({"params": params}, x)
    np.testing.assert_allclose(found, y, rtol=2e-4, atol=2e-4)


def test_lora_adapts_convolutions() -> None:
    model, params = pretrained.draw(SHAPES["lenet"], 0)
    method = lj.LoRA(rank=2, alpha=4.0, targets=r"(conv|hidden)_\d$")
    trainable = method.init(jax.random.key(0), params)
    trainable = jax.tree.map(lambda x: x + 0.03, trainable)
    x = jax.random.normal(jax.random.key(1), (2, 28, 28, 1))
    found = lj.adapt(model.apply)(method.combine(params, trainable), x)
    merged = model.apply({"params": method.merge(params, trainable)}, x)
    np.testing.assert_allclose(found, merged, rtol=1e-4, atol=1e-4)
    assert np.abs(found - model.apply({"params": params}, x)).max() > 0.01


def test_a_folder_and_back(tmp_path: Any) -> None:
    shape = {"model_type": "mlp", "widths": (5,), "image_shape": (2, 3, 1), "num_labels": 3}
    model, params = pretrained.draw(shape, 0)
    lj.save_pretrained(tmp_path, model, params)
    again, loaded = lj.load_pretrained(tmp_path)
    assert again.config == model.config and again.config.widths == (5,)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    x = jax.random.normal(jax.random.key(0), (2, 2, 3, 1))
    assert again.apply({"params": loaded}, x).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MlpConfig(widths=(3, 0)), "widths"),
        (lambda: MlpConfig(image_shape=(28, 28)), "height, width, channels"),  # type: ignore
        (lambda: MlpConfig(num_labels=1), "num_labels=1"),
        (lambda: MlpConfig(unroll=2), "stacks of layers"),
        (lambda: LeNetConfig(image_shape=(27, 27, 1)), "do not fit"),
        (lambda: LeNetConfig(image_shape=(8, 8, 1)), "do not fit"),
        (lambda: pretrained.draw({"model_type": "mlp", "width": (3,)}, 0), "did you mean widths"),
    ],
)
def test_mistakes(make: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        make()
    assert Mlp(MlpConfig(image_shape=(32, 32, 3))).config.pixels == 3072
    assert LeNetConfig(image_shape=(32, 32, 3)).last_maps == (5, 5, 16)
