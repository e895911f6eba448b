"""Llama against transformers: logits, hidden states and gradients, in float32.

Weights are scaled so that every block changes the output: with transformers' own initialisation the
residual stream is nearly the embedding, and a wrong mask or rotation would pass.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import FAMILIES, family_for

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAST = {"xla_backend_optimization_level": 0}  # compiling is most of the time here
BASE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "odd_head": (
        "Llama",
        {
            "head_dim": 10,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0},
        },
    ),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
}


@pytest.fixture(params=CASES, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, Any, Any]:
    """(transformers' model, our model, our params, the family) of one case."""
    kind, options = CASES[request.param]
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**BASE | options, attn_implementation="eager")
    )
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" in name:
                weight.normal_(1.0, 0.3)
            elif weight.ndim == 1:
                weight.normal_(0.0, 0.3)
            else:
                weight.normal_(0.0, 1.0 if "embed" in name else 1.5 / weight.shape[1] ** 0.5)
    hf = theirs.config.to_dict()
    family = family_for(hf["model_type"])
    config = family.config_from_hf(hf)
    state = {name: t.detach().numpy() for name, t in theirs.state_dict().items()}
    return theirs.eval(), family.module(config), to_ours(family, config, state), family


def to_ours(family: Any, config: Any, state: dict[str, np.ndarray]) -> dict[str, Any]:
    """Tensors under Hugging Face names -> our nested tree, by the family's table."""
    tree: dict[str, Any] = {}
    for spec in family.tensors(config):
        arrays = [state[name] for _, name in spec.expand()]
        assert all(a.shape == spec.shape for a in arrays), spec
        arrays = [a.T if spec.op == "transpose" else a for a in arrays]
        path = spec.path.replace("layers/{i}", f"layers[0:{spec.layers}]")
        *parents, leaf = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = jnp.asarray(np.stack(arrays) if spec.layers else arrays[0])
    return tree


def assert_near(ours: Any, theirs: Any, what: str) -> None:
    """Equal to within 1e-4 of the reference's standard deviation."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.std(), what


def tokens_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE["vocab_size"], (2, 37))


def positions_of(mask: np.ndarray) -> np.ndarray:
    """Positions as transformers' generate counts them: from the first token that is not padding."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def run(model: Any, params: Any, tokens: Any, mask: Any, positions: Any) -> tuple[Any, Any]:
    """(logits, hidden states), compiled once a case."""
    return model.apply({"params": params}, tokens, mask, positions, output_hidden_states=True)


def test_logits_and_hidden_states(pair: tuple) -> None:
    theirs, model, params, _ = pair
    tokens = tokens_of()
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens), output_hidden_states=True)
    mask = np.ones_like(tokens)
    logits, hidden = run(model, params, tokens, mask, positions_of(mask))
    assert_near(logits, reference.logits, "logits")
    assert hidden.shape[0] == model.config.num_layers + 1
    for layer, (ours, expected) in enumerate(zip(hidden, reference.hidden_states, strict=True)):
        assert_near(ours, expected, f"hidden state {layer}")


def test_logits_and_gradients_without_a_mask(pair: tuple) -> None:
    theirs, model, params, family = pair
    tokens = tokens_of()
    weights = np.random.default_rng(1).normal(size=(2, 37, BASE["vocab_size"])).astype(np.float32)
    theirs.zero_grad()
    reference = theirs(torch.tensor(tokens)).logits
    (reference * torch.tensor(weights)).sum().backward()
    expected = to_ours(
        family, model.config, {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    )

    def loss(p: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": p}, tokens)
        return jnp.sum(logits * weights), logits

    ours, logits = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)(params)
    assert_near(logits, reference.detach(), "logits")
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for path, gradient in jax.tree_util.tree_leaves_with_path(ours):
        node = expected
        for key in path:
            node = node[key.key]
        assert_near(gradient, node, jax.tree_util.keystr(path))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair: tuple, side: str) -> None:
    theirs, model, params, _ = pair
    tokens = tokens_of(2)
    mask = np.ones_like(tokens)
    mask[1, (slice(0, 9) if side == "left" else slice(28, None))] = 0
    positions = positions_of(mask)
    with torch.no_grad():
        reference = theirs(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
        ).logits.numpy()
    ours = np.asarray(run(model, params, tokens, mask, positions)[0])
    assert_near(ours[mask == 1], reference[mask == 1], f"{side}-padded logits")


def test_config_survives_the_round_trip(pair: tuple) -> None:
    theirs, model, _, family = pair
    written = family.config_to_hf(model.config)
    assert family.config_from_hf(written) == model.config
    read = type(theirs.config)(**written)
    assert family.config_from_hf(read.to_dict()) == model.config


def test_table_names_every_tensor(pair: tuple) -> None:
    theirs, model, _, family = pair
    names = [name for spec in family.tensors(model.config) for _, name in spec.expand()]
    assert sorted(names) == sorted(name for name, _ in theirs.named_parameters())


def test_registry_lists_the_cases() -> None:
    assert {"llama", "mistral", "qwen2"} <= set(FAMILIES)
