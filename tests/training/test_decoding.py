"""Decoding with a cache against plain decoding without one."""

import itertools

import jax
import numpy as np
import pytest
import tiny

from lora_jax.errors import UserError
from lora_jax.tensors import adapt
from lora_jax.training import generate

PROMPTS = [[3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 9, 8, 7, 6, 5, 4, 3, 5, 11, 12, 13]]
EOS, PAD, NEW = 2, 0, 6


@pytest.fixture(scope="module")
def variables():
    """LoRA with factors away from zero: the cache path must see the low-rank leaves."""
    params = tiny.params()
    trainable = tiny.METHOD.init(jax.random.key(0), params)
    return tiny.METHOD.combine(params, jax.tree.map(lambda x: x + 0.2, trainable))


@pytest.fixture(scope="module")
def log_probs(variables):
    apply = jax.jit(adapt(lambda v, t: tiny.MODEL.apply(v, t)))

    def last(tokens):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(jax.nn.log_softmax(apply(variables, padded)[0, len(tokens) - 1]))

    return last


def greedy(log_probs, prompt, eos):
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(np.argmax(log_probs(tokens))))
        if tokens[-1] == eos:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def test_greedy_equals_argmax_without_cache(variables, log_probs):
    options = {"max_new_tokens": NEW, "pad_id": PAD}
    free = generate(tiny.MODEL, variables, PROMPTS, eos_id=None, **options)
    assert free == [greedy(log_probs, prompt, None) for prompt in PROMPTS]
    eos = free[0][3]  # a token that does come up
    stopped = generate(tiny.MODEL, variables, PROMPTS, eos_id=eos, **options)
    assert stopped == [greedy(log_probs, prompt, eos) for prompt in PROMPTS]
    assert len(stopped[0]) < NEW
    several = generate(tiny.MODEL, variables, PROMPTS, eos_id=(eos, 31), **options)
    assert all(len(a) <= len(b) for a, b in zip(several, stopped, strict=True))


def test_batching_changes_nothing(variables):
    options = {"max_new_tokens": NEW, "eos_id": EOS, "pad_id": PAD}
    assert generate(tiny.MODEL, variables, PROMPTS, batch_size=2, **options) == generate(
        tiny.MODEL, variables, PROMPTS, **options
    )


def beam(log_probs, prompt, eos, beams, penalty, early):
    """Beam search as transformers does it, one prompt, in lists."""
    live, done = [(0.0, ())], []
    for length in range(1, NEW + 1):
        grown = sorted(
            (
                (score + float(lp), (*seq, token))
                for score, seq in live
                for token, lp in enumerate(log_probs([*prompt, *seq]))
            ),
            reverse=True,
        )[: 2 * beams]
        for rank, (score, seq) in enumerate(grown):
            if seq[-1] == eos and rank < beams:
                done.append((score / length**penalty, seq))
        done = sorted(done, reverse=True)[:beams]
        live = [g for g in grown if g[1][-1] != eos][:beams]
        if len(done) == beams and (early or live[0][0] / length**penalty <= done[-1][0]):
            break
    else:
        done += [(score / NEW**penalty, seq) for score, seq in live]
    best = max(done)[1]
    return list(itertools.takewhile(lambda token: token != eos, best))


@pytest.mark.parametrize("early", [True, False])
def test_beams_equal_a_plain_beam_search(variables, log_probs, early):
    free = generate(tiny.MODEL, variables, PROMPTS, max_new_tokens=NEW, eos_id=None, pad_id=PAD)
    eos = free[0][2]
    found = generate(
        tiny.MODEL, variables, PROMPTS, max_new_tokens=NEW, eos_id=eos, pad_id=PAD,
        num_beams=3, length_penalty=0.8, early_stopping=early,
    )  # fmt: skip
    assert found == [beam(log_probs, prompt, eos, 3, 0.8, early) for prompt in PROMPTS]


def test_one_beam_is_greedy(variables, log_probs):
    from lora_jax.training import decoding

    eos = greedy(log_probs, PROMPTS[0], None)[2]
    tokens, padding = decoding.left_pad(PROMPTS, PAD)
    options = {
        "max_new_tokens": NEW, "ends": (eos,), "pad_id": PAD, "length_penalty": 1.0,
        "early_stopping": True,
    }  # fmt: skip
    plain = decoding._decode(
        tiny.MODEL, variables, tokens, padding, num_beams=1, beam_search=False, **options
    )
    search = decoding._decode(
        tiny.MODEL, variables, tokens, padding, num_beams=1, beam_search=True, **options
    )
    np.testing.assert_array_equal(plain, search)


def test_errors_say_what_to_do(variables):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(tiny.MODEL, variables, [[1], []], max_new_tokens=2, eos_id=2, pad_id=0)
    with pytest.raises(UserError, match="num_beams=0"):
        generate(tiny.MODEL, variables, [[1]], max_new_tokens=2, eos_id=2, pad_id=0, num_beams=0)
    assert generate(tiny.MODEL, variables, [], max_new_tokens=2, eos_id=2, pad_id=0) == []
