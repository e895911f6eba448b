"""Decoding with a cache against plain decoding without one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lora_jax.errors import UserError
from lora_jax.tensors import adapt
from lora_jax.training import Sampling, beams, decoding, generate, prompts

PROMPTS = [[3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 9, 8, 7, 6, 5, 4, 3, 5, 11, 12, 13]]
EOS, PAD, NEW = 2, 0, 6
ENDS = tuple(range(20, 32))


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


def test_one_beam_is_greedy():
    """Beam search with one beam and the plain loop, over a table of bigrams."""
    table = jax.random.normal(jax.random.key(0), (9, 9)) * 3

    def next_logits(tokens, count, cache):
        return table[tokens], cache

    last, ends = jnp.array([1, 4, 7]), (3,)
    plain = decoding.follow(
        next_logits, lambda logits, *_: jnp.argmax(logits, -1), last, (), 8, ends, PAD
    )
    search = beams.Search(8, ends, PAD, 1, 1.0, True, None)
    found = search.run(next_logits, lambda scores, *_: scores, last, (), lambda cache, _: cache)
    np.testing.assert_array_equal(plain, found)


def test_a_prefix_equals_longer_prompts(variables):
    options = {"max_new_tokens": NEW, "eos_id": EOS, "pad_id": PAD}
    prefix = [5, 9, 4, 4, 8]
    whole = generate(tiny.MODEL, variables, [[*prefix, *p] for p in PROMPTS], **options)
    assert generate(tiny.MODEL, variables, PROMPTS, prefix=prefix, **options) == whole
    assert generate(tiny.MODEL, variables, PROMPTS, **options) != whole


def test_a_prompt_of_one_token(variables):
    tokens = np.array([[7], [9]], np.int32)
    found = decoding.decode(
        tiny.MODEL, variables, tokens, np.zeros(2, np.int32), max_new_tokens=NEW
    )
    whole = generate(tiny.MODEL, variables, [[7], [9]], max_new_tokens=NEW, eos_id=None, pad_id=PAD)
    assert found.tolist() == whole


def test_sampling_follows_the_model_and_the_seed(variables, log_probs):
    options = {"max_new_tokens": 2, "eos_id": None, "pad_id": PAD}
    many = [PROMPTS[0]] * 400
    found = generate(tiny.MODEL, variables, many, sampling=Sampling(2.0), **options)
    chances = np.exp(log_probs(PROMPTS[0]) / 2.0)
    counts = np.bincount([row[0] for row in found], minlength=tiny.VOCABULARY) / len(many)
    assert np.abs(counts - chances / chances.sum()).max() < 0.1  # 4 standard deviations
    assert len({tuple(row) for row in found}) > 5
    one = generate(tiny.MODEL, variables, many[:6], sampling=Sampling(2.0), **options)
    assert one == found[:6]  # whatever a prompt is batched with
    other = generate(tiny.MODEL, variables, many, sampling=Sampling(2.0, seed=1), **options)
    assert other != found
    best = generate(tiny.MODEL, variables, PROMPTS, sampling=Sampling(top_k=1), **options)
    assert best == generate(tiny.MODEL, variables, PROMPTS, **options)


@pytest.mark.parametrize("axis_name", [None, "members"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_vmap_over_members_equals_each_alone(num_beams, axis_name):
    params = tiny.params()
    members = [
        jax.tree.map(
            lambda x, i=i: x + 0.3 * jax.random.normal(jax.random.key(i), x.shape),
            tiny.METHOD.init(jax.random.key(i), params),
        )
        for i in range(3)
    ]
    tokens, padding = prompts.left_pad(PROMPTS, PAD)

    def run(trainable, axis_name=None):
        return decoding.decode(
            tiny.MODEL, tiny.METHOD.combine(params, trainable), tokens, padding,
            max_new_tokens=NEW, ends=ENDS, pad_id=PAD, num_beams=num_beams,
            no_repeat_ngram_size=2, axis_name=axis_name,
        )  # fmt: skip

    alone = jax.jit(run)
    expected = np.stack([alone(member) for member in members])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    mapped = jax.vmap(lambda t: run(t, axis_name), axis_name=axis_name)
    np.testing.assert_array_equal(jax.jit(mapped)(stacked), expected)
    # The members differ, and some rows end before others: the test would see a mix-up.
    assert len({expected[i].tobytes() for i in range(3)}) == 3
    assert np.isin(expected, ENDS).any() and not np.isin(expected, ENDS).any(-1).all()
    if axis_name:
        # No batched condition: the cache is neither selected at each step nor scattered into.
        text = str(jax.make_jaxpr(mapped)(stacked))
        assert "scatter" not in text[text.rindex("while[") :] or num_beams > 1


def test_errors_say_what_to_do(variables):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(tiny.MODEL, variables, [[1], []], max_new_tokens=2, eos_id=2, pad_id=0)
    with pytest.raises(UserError, match="num_beams=0"):
        generate(tiny.MODEL, variables, [[1]], max_new_tokens=2, eos_id=2, pad_id=0, num_beams=0)
    assert generate(tiny.MODEL, variables, [], max_new_tokens=2, eos_id=2, pad_id=0) == []
    with pytest.raises(UserError, match="exclude each other"):
        generate(
            tiny.MODEL, variables, [[1]], max_new_tokens=2, eos_id=2, pad_id=0, num_beams=2,
            sampling=Sampling(),
        )  # fmt: skip
    for options, message in (
        ({"temperature": 0.0}, "greedy is no sampling"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Sampling(**options)
