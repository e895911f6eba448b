"""BitFit, the last layers, the head: which leaves train, and how many parameters that is."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from site_models import (
    KEY,
    MODELS,
    PAPERS,
    TOKENS,
    count,
    moved,
    near,
    params_of,
    run,
    shapes,
)

import lora_jax as lj
from lora_jax import partition
from lora_jax.methods import METHODS
from lora_jax.methods.partial import BitFit, HeadOnly, TopLayers

HEAD = r"^head/"


def test_counts_of_the_papers() -> None:
    assert count("RoBERTa-base", BitFit()) == 102_144  # 12 (3d + d + d + 4d + d + d) + d
    assert count("GPT-2 M", lj.FullFineTuning()) == 354_823_168  # published 354.92M
    assert count("GPT-2 L", lj.FullFineTuning()) == 774_030_080
    top = TopLayers(layers=2)
    cut = jax.eval_shape(top.arrange, shapes(*PAPERS["GPT-2 M"]))
    assert top.count(cut).total == 25_192_448  # 2 (12 d² + 13 d), published 25.19M


def test_bitfit_on_gpt3_is_not_the_papers_formula() -> None:
    """12·d·L gives the published 14.2M; a block has 11·d biases, and the last norm d more."""
    d, layers = 12288, 96
    assert 12 * d * layers == 14_155_776
    assert count("GPT-3", BitFit()) == 11 * d * layers + d == 12_988_416


def test_bitfit_finds_the_biases_of_an_nnx_model() -> None:
    _, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    assert set(BitFit().init(KEY, state)) == {"bias/value"}


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (BitFit(), {"bias"}),
        (BitFit(train=(r"bias$", HEAD)), {"bias", "head"}),
        (HeadOnly(), {"head"}),
    ],
    ids=["bitfit", "bitfit and head", "head only"],
)
def test_only_what_is_named_trains(method: lj.FullFineTuning, wanted: set[str]) -> None:
    params = params_of("bert")
    trainable = method.init(KEY, params)
    for path in partition.flatten(params):
        named = ("bias" in wanted and path.endswith("bias")) or (
            "head" in wanted and path.startswith("head/")
        )
        assert (path in trainable) == named, path
    # They are the model's own leaves: unchanged at the start, and merged exactly.
    frozen = method.frozen(params)
    start = run("bert", method.combine(frozen, trainable))
    near(start, run("bert", {"params": params}), 1e-6)
    after = moved(trainable)
    merged = method.merge(frozen, after)
    near(run("bert", {"params": merged}), run("bert", method.combine(frozen, after)), 1e-6)


def test_the_last_layers_are_a_stack_of_their_own() -> None:
    params, method = params_of("gpt2"), TopLayers(layers=1, train=("^final_norm/",))
    with pytest.raises(lj.UserError, match="cut it first"):
        method.init(KEY, params)
    cut = method.arrange(params)
    near(run("gpt2", {"params": cut}), run("gpt2", {"params": params}), 1e-5)
    trainable = method.init(KEY, cut)
    assert {p.split("/")[0] for p in trainable} == {"layers[1:2]", "final_norm"}
    layer = sum(x[0].size for x in jax.tree.leaves(params["layers[0:2]"]))
    assert method.count(cut).total == layer + 2 * 16

    def loss(t: dict) -> jax.Array:
        variables = method.combine(method.frozen(cut), t)
        return (MODELS["gpt2"].apply(variables, TOKENS) ** 2).mean()

    gradients = jax.jit(jax.grad(loss))(trainable)
    for path, gradient in gradients.items():
        if not path.endswith("key/bias"):  # softmax does not see what all keys share
            assert np.abs(gradient).max() > 1e-6, path


def test_where_it_makes_no_sense() -> None:
    llama = params_of("llama")
    with pytest.raises(lj.UserError, match="this model has none"):
        BitFit().init(KEY, llama)
    with pytest.raises(lj.UserError, match="no head of its own"):
        HeadOnly().init(KEY, llama)
    with pytest.raises(lj.UserError, match="layers=3"):
        TopLayers(layers=3).arrange(llama)
    with pytest.raises(lj.UserError, match="needs layers in a stack"):
        TopLayers().arrange({"w": np.ones((2, 2))})


def test_methods_are_found_by_looking() -> None:
    names = {"lora", "full", "bitfit", "ft_top", "head_only", "adapter_h", "prefix_tuning"}
    assert names <= set(METHODS)
    assert METHODS["ft_top"] is TopLayers and TopLayers.name == "ft_top"
