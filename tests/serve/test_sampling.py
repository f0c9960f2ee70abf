"""Tokens are drawn as transformers would draw them, each row by its own request alone."""

import math

import pytest
import scipy.stats
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from molora.serve.engine.sampling import NUCLEUS, Sampler, draw
from molora.serve.request import Sampling, ServeError, Token

PROMPT = [3, 5, 5, 7]


def logits_of(size, seed=0, spread=3.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def probabilities(sampler, logits):
    """Return (V,) what a sampler draws from."""
    ids, sums = sampler.distribution(logits)
    kept = torch.diff(sums, prepend=sums.new_zeros(1)) / sums[-1]
    full = torch.zeros(logits.shape[-1], dtype=torch.float64)
    full[torch.arange(len(kept)) if ids is None else ids] = kept
    return full


def by_transformers(asked, logits, seen):
    """Return (V,) what transformers draws from."""
    steps = LogitsProcessorList()
    if asked.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(asked.repetition_penalty))
    steps.append(TemperatureLogitsWarper(float(asked.temperature)))
    if asked.top_k:
        steps.append(TopKLogitsWarper(asked.top_k))
    if asked.top_p < 1:
        steps.append(TopPLogitsWarper(asked.top_p))
    if asked.min_p:
        steps.append(MinPLogitsWarper(asked.min_p))
    return steps(torch.tensor([seen]), logits[None].clone())[0].double().softmax(-1)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 1.7, "top_k": 5},
        {"top_k": 10_000},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"top_p": 0.999, "temperature": 2.0},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 1.3, "repetition_penalty": 1.8},
        {"repetition_penalty": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize(("size", "spread"), [(40, 3.0), (4 * NUCLEUS, 3.0), (4 * NUCLEUS, 0.1)])
def test_the_distribution_is_that_of_transformers(asked, size, spread):
    asked, logits = Sampling(**asked), logits_of(size, seed=size, spread=spread)
    sampler = Sampler(asked, PROMPT)
    sampler.note(11)
    expected = by_transformers(asked, logits, [*PROMPT, 11])
    torch.testing.assert_close(probabilities(sampler, logits), expected, rtol=1e-4, atol=1e-9)


def test_tokens_of_equal_scores_at_the_edge_of_top_k_all_stay():
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0])
    assert probabilities(Sampler(Sampling(top_k=2), []), logits).count_nonzero() == 3


@pytest.mark.parametrize("asked", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.05, "temperature": 1.5}], ids=str)
def test_draws_follow_the_distribution(asked):
    asked, logits = Sampling(seed=5, **asked), logits_of(12, spread=1.0)
    sampler = Sampler(asked, [])
    drawn = torch.tensor([sampler(logits).id for _ in range(4000)])
    expected = by_transformers(asked, logits, [0])
    counts = drawn.bincount(minlength=12).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert scipy.stats.chisquare(counts[kept], expected[kept] * len(drawn)).pvalue > 1e-3


def test_a_seed_draws_the_same_in_any_company():
    rows = [logits_of(50, seed=i, spread=1.0) for i in range(20)]
    alone = Sampler(Sampling(seed=9), PROMPT)
    expected = [alone(row).id for row in rows]
    mine, other, greedy = Sampler(Sampling(seed=9), PROMPT), Sampler(Sampling(seed=8), []), Sampler(Sampling(0), [])
    together = [draw([greedy, mine, other], torch.stack([row * 2, row, row])) for row in rows]
    assert [tokens[1].id for tokens in together] == expected
    assert [tokens[2].id for tokens in together] != expected
    unseeded = [[Sampler(Sampling(), [])(row).id for row in rows] for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_greedy_rows_take_the_likeliest_token():
    logits = torch.stack([logits_of(30, seed=i) for i in range(5)])
    samplers = [Sampler(Sampling(temperature=0.0), []) for _ in range(5)]
    assert draw(samplers, logits) == [Token(id) for id in logits.argmax(-1).tolist()]
    mixed = [Sampler(Sampling(temperature=0.0, logprobs=0 if i % 2 else None), []) for i in range(5)]
    assert [token.id for token in draw(mixed, logits)] == logits.argmax(-1).tolist()


def test_penalties_and_bias_are_closed_forms():
    logits = logits_of(10)
    asked = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((2, 4.0), (3, -100.0)))
    sampler = Sampler(asked, [1, 1])  # the prompt counts for the repetition penalty alone
    for token in (4, 4, 6):
        sampler.note(token)
    expected = logits.double().clone()
    expected[4] -= 0.5 + 2 * 0.25
    expected[6] -= 0.5 + 0.25
    expected[2] += 4
    expected[3] -= 100
    torch.testing.assert_close(probabilities(sampler, logits), expected.softmax(-1), rtol=1e-5, atol=1e-9)
    greedy = Sampler(Sampling(temperature=0.0, logit_bias=((7, 100.0),)), [])
    assert greedy(logits).id == 7


class Calls(TorchDispatchMode):
    """Counts the operations inside."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count one."""
        self.number += 1
        return function(*args, **(kwargs or {}))


def test_a_thousand_biases_are_those_of_a_loop_and_one_operation():
    """What one request asks must not hold up the others of its batch."""
    logits, rng = logits_of(3000), torch.Generator().manual_seed(1)
    biases = [(7 * i % 3000, float(torch.rand((), generator=rng) * 200 - 100)) for i in range(1024)]
    biases += [(5, 0.1), (5, 0.7)]  # twice the same
    expected = logits.clone()
    for token, bias in biases:
        expected[token] += bias
    sampler = Sampler(Sampling(temperature=0.0, logit_bias=tuple(biases)), [])
    with Calls() as calls:
        assert sampler(logits).id == int(expected.argmax())
    assert calls.number < 20
    assert torch.equal(sampler._shaped(logits), expected)


def test_nothing_ends_before_min_tokens():
    logits = torch.tensor([0.0, 9.0, 8.0, 1.0])
    sampler = Sampler(Sampling(temperature=0.0, min_tokens=2, stop_token_ids=(2,)), [], eos_ids=[1])
    assert [sampler(logits).id for _ in range(3)] == [3, 3, 1]
    assert sampler.ends == {1, 2}
    assert Sampler(Sampling(ignore_eos=True, stop_token_ids=(2,)), [], eos_ids=[1]).ends == {2}


@pytest.mark.parametrize("asked", [{"temperature": 0.0}, {"temperature": 0.2, "top_k": 3, "logit_bias": ((1, 50.0),)}])
def test_logprobs_are_those_of_the_model_itself(asked):
    logits = logits_of(20)
    expected = logits.log_softmax(-1)
    token = Sampler(Sampling(logprobs=4, **asked), [])(logits)
    assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-5)
    best = expected.topk(4)
    assert [id for id, _ in token.top] == best.indices.tolist()
    assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    only = Sampler(Sampling(logprobs=0, **asked), [])(logits)
    assert only.top == () and math.isfinite(only.logprob)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize(
    "asked", [{"temperature": 0.0}, {"temperature": 0.0, "logprobs": 1}, {}, {"min_p": 0.1}, {"top_p": 0.5}], ids=str
)
def test_a_row_that_is_no_number_fails_alone(asked, wrong):
    logits = torch.stack([logits_of(10), logits_of(10)])
    logits[0, 3] = wrong
    samplers = [Sampler(Sampling(**asked), []), Sampler(Sampling(temperature=0.0), [])]
    bad, good = draw(samplers, logits)
    assert isinstance(bad, ServeError) and bad.code == "not_finite"
    assert good.id == int(logits[1].argmax())


def test_a_row_that_cannot_be_drawn_fails_alone():
    lost = Sampling(temperature=0.0, stop_token_ids=(-100_000,), min_tokens=2)  # admission refuses such tokens
    bad, good = draw([Sampler(lost, []), Sampler(Sampling(seed=1), [])], torch.stack([logits_of(10)] * 2))
    assert isinstance(bad, ServeError) and bad.code == "engine_error"
    assert isinstance(good, Token)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-320])
def test_nearly_no_temperature_takes_the_likeliest_token(temperature):
    logits = torch.tensor([1.0, 5.0, 2.0, 0.0])
    assert [Sampler(Sampling(temperature=temperature, seed=seed), [])(logits).id for seed in range(5)] == [1] * 5


def test_half_precision_is_drawn_in_full():
    logits = logits_of(30).bfloat16()
    token = Sampler(Sampling(logprobs=1, seed=1), [])(logits)
    assert token.logprob == pytest.approx(float(logits.float().log_softmax(-1)[token.id]), abs=1e-5)
