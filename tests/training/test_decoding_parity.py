"""Greedy and beam search, n-gram bans and the filters of sampling against transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import family_for
from lora_jax.training import Sampling, generate
from lora_jax.training.sampling import ban_repeats

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = [[3, 4, 5], [7, 3], [9, 8, 7, 6, 5, 4, 3, 9, 8, 7, 6, 5, 4, 3, 5, 11, 12, 13]]
NEW = 12


@functools.cache
def pair():
    """(transformers' Llama, ours, our params) with weights large enough for varied outputs."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" not in name:
                weight.normal_(0.0, 1.0 if "embed" in name else 1.5 / weight.shape[1] ** 0.5)
    hf = config.to_dict()
    family = family_for("llama")
    model = family.module(family.config_from_hf(hf))
    state = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    params: dict = {}
    for spec in family.tensors(model.config):
        layers = [state[name] for _, name in spec.expand()]
        layers = [x.T if spec.op == "transpose" else x for x in layers]
        *parents, last = spec.path.replace("layers/{i}", f"layers[0:{spec.layers}]").split("/")
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(np.stack(layers) if spec.layers else layers[0])
    return theirs, model, params


def expected(prompt, eos, **options):
    theirs = pair()[0]
    with torch.no_grad():
        found = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=eos,
            pad_token_id=0, **options,
        )  # fmt: skip
    new = found[0, len(prompt) :].tolist()
    return new[: new.index(eos)] if eos in new else new


@pytest.mark.parametrize(
    ("options", "eos"),
    [
        ({"no_repeat_ngram_size": 1}, 5),
        ({"no_repeat_ngram_size": 2}, 21),
        ({"no_repeat_ngram_size": 3}, None),
        ({"num_beams": 3, "length_penalty": 0.6, "early_stopping": True}, 5),
        ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": False}, 12),
        (
            {"num_beams": 4, "length_penalty": 0.8, "no_repeat_ngram_size": 2,
             "early_stopping": False}, 5,
        ),
        (
            {"num_beams": 2, "length_penalty": -0.5, "no_repeat_ngram_size": 3,
             "early_stopping": True}, 9,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_equals_transformers(options, eos):
    _, model, params = pair()
    found = generate(
        model, {"params": params}, PROMPTS, max_new_tokens=NEW, eos_id=eos, pad_id=0, **options
    )
    assert found == [expected(prompt, eos, **options) for prompt in PROMPTS]


def test_the_bans_change_the_outcome():
    """Otherwise the cases above would pass without them."""
    plain = [expected(prompt, None) for prompt in PROMPTS]
    for size in (1, 2, 3):
        assert plain != [expected(p, None, no_repeat_ngram_size=size) for p in PROMPTS]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_banned_tokens_equal_transformers(size):
    draw = np.random.default_rng(size)
    tokens = draw.integers(0, 4, (5, 12))
    start = np.array([0, 3, 7, 9, 10])
    length = 11  # the last place is not written yet
    found = ban_repeats(jnp.zeros((5, 6)), jnp.asarray(tokens), jnp.int32(length), start, size)
    rule = transformers.NoRepeatNGramLogitsProcessor(size)
    for row in range(5):
        ids = torch.tensor(tokens[row, start[row] : length])[None]
        wanted = rule(ids, torch.zeros(1, 6)) if ids.shape[1] else torch.zeros(1, 6)
        np.testing.assert_array_equal(found[row], wanted[0].numpy())


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7, 5), Sampling(1.3, 0, 0.8), Sampling(0.9, 9, 0.5), Sampling(1, 1)],
    ids=str,
)  # fmt: skip
def test_filters_equal_transformers(sampling):
    logits = np.asarray(jax.random.normal(jax.random.key(0), (6, 23))) * 2
    wanted = transformers.TemperatureLogitsWarper(float(sampling.temperature))(
        None, torch.tensor(logits)
    )
    if sampling.top_k:
        wanted = transformers.TopKLogitsWarper(sampling.top_k)(None, wanted)
    if sampling.top_p < 1:
        wanted = transformers.TopPLogitsWarper(sampling.top_p)(None, wanted)
    found = sampling.filtered(jnp.asarray(logits))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6)
    assert np.isinf(np.asarray(found)).any()
