"""Sizes that match a budget: the best of all sizes, tried one by one."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.methods import METHODS
from lora_jax.models import FAMILIES
from lora_jax.pretrained.assemble import abstract_params
from lora_jax.pretrained.load import build_model, family_of


@pytest.fixture(scope="module")
def bert():
    """Shapes of a six-layer BERT with a classification head."""
    hf = {
        "model_type": "bert", "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 6,
        "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 32,
        "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    }  # fmt: skip
    model = build_model(hf, {"head": "classification", "num_labels": 2})
    return abstract_params(family_of(model).tensors(model.config))


SIZED = {
    "lora": {"train": ("^head/",)}, "dora": {}, "vera": {}, "loha": {}, "lora_xs": {},
    "adalora": {"target_rank": 3}, "ft_top": {"train": ("^head/",)}, "adapter_h": {},
    "adapter_d": {"drop": 2}, "prefix_tuning": {"hidden": 7}, "p_tuning_v2": {},
    "prompt_tuning": {}, "prefix_embedding": {"infix": 2}, "lora_prefix_layer": {"prefix": 3},
    "subspace": {"projection": "sparse", "train": ("^head/",), "train_counts": True},
}  # fmt: skip


@pytest.mark.parametrize("name", SIZED)
def test_the_size_is_the_best_of_all(name, bert):
    method = METHODS[name](**SIZED[name])

    def count(size):
        sized = method.with_size(size)
        return sized.count(jax.eval_shape(sized.arrange, bert)).total

    sizes = {"ft_top": range(1, 7), "subspace": (900, 901, 4000)}.get(name, (1, 2, 7, 8))
    counts = {size: count(size) for size in sizes}
    for size, n in counts.items():
        assert lj.match_budget(method, bert, n) == size
        gap = counts.get(size + 1, n) - n
        if gap > 2:  # between two sizes the nearer one
            assert lj.match_budget(method, bert, n + gap // 3) == size
            assert lj.match_budget(method, bert, n + gap - 1) == size + 1
    smallest = lj.match_budget(method, bert, 1)
    assert smallest == 1 or name == "subspace"
    if name == "subspace":  # above what its head has
        assert count(smallest) == smallest
        with pytest.raises(lj.UserError, match="must be above"):
            count(smallest - 1)


@pytest.mark.parametrize(
    ("name", "largest"), [("pissa", 24), ("olora", 24), ("lora_xs", 24), ("lora_ga", 12),
                          ("eva", 24), ("ft_top", 6)],
)  # fmt: skip
def test_more_than_the_largest_size_gives_the_largest(name, largest, bert):
    """Matrices of 24 by 24 have no more directions, and the model no more layers."""
    assert lj.match_budget(METHODS[name](), bert, 10**9) == largest


def test_published_budgets():
    """LoRA on query and value in tables 2 and 4 of its paper: parameters in millions, and r."""
    for d, layers, millions, rank in (
        (768, 12, 0.3, 8), (1024, 24, 0.8, 8), (12288, 96, 4.7, 1), (12288, 96, 37.7, 8),
    ):  # fmt: skip
        kernel = {"kernel": jax.ShapeDtypeStruct((layers, d, d), np.float32)}
        params = {f"layers[0:{layers}]": {"attention": {"query": kernel, "value": kernel}}}
        assert lj.match_budget(lj.LoRA(), params, round(millions * 1e6)) == rank


@pytest.mark.parametrize(
    ("method", "n", "message"),
    [
        (lj.FullFineTuning(), 100, "'full' has no size"),
        (METHODS["galore"](), 100, "'galore' has no size"),
        (lj.LoRA(rank=(("query", 2),)), 100, "a set of rules"),
        (lj.LoRA(targets="querry"), 100, "matches nothing"),
        (lj.LoRA(), 0, "at least 1"),
    ],
)
def test_what_has_no_answer_says_why(method, n, message, bert):
    with pytest.raises(lj.UserError, match=message):
        lj.match_budget(method, bert, n)


def test_every_size_field_is_a_field_with_a_number():
    assert "bert" in FAMILIES
    without = {n for n, cls in METHODS.items() if cls.size_field is None}
    assert without == {"full", "bitfit", "head_only", "ia3", "galore"}
    for name in set(METHODS) - without:
        method = METHODS[name]()
        assert getattr(method.with_size(5), method.size_field) == 5
