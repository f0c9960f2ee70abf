"""Guards keep their promise of few false abstentions, catch what is unlike, and know when they cannot."""

import functools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn import functional as F

from molora.errors import ConfigError
from molora.prompts.guard import Mahalanobis, Nearest
from molora.prompts.registry import guards, prompt_selectors
from molora.prompts.selector import PromptSelector
from tests.prompts.planted import Planted, direction, examples

SPECS = {
    "nearest": {"name": "nearest"},
    "nearest to one": {"name": "nearest", "neighbours": 1},
    "nearest, few ranked": {"name": "nearest", "ranked": 15},
    "nearest by adapter": {"name": "nearest", "scope": "adapter"},
    "mahalanobis": {"name": "mahalanobis"},
}


def drawn(generator, centre, number, noise=0.5):
    return F.normalize(centre + noise * torch.randn(number, 8, generator=generator), dim=-1)


@functools.cache
def p_values(name, trials=1200):
    """p-values of prompts drawn like the examples; each trial draws 38 examples of two kinds and one prompt anew."""
    generator, found = torch.Generator().manual_seed(0), []
    centres = torch.stack([direction("a", 8), direction("b", 8)])
    for _ in range(trials):
        owner = torch.randint(2, (39,), generator=generator)
        vectors = drawn(generator, centres[owner], 39)
        guard = guards.build(SPECS[name])
        guard.fit([vectors[:38][owner[:38] == i] for i in (0, 1)])
        found += guard.judge(vectors[38:]).familiarity
    return np.array(found)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_false_abstentions_keep_to_the_rate(name, rate):
    """P(p <= rate) <= rate for prompts drawn like the examples, over draws of both; and not far below it."""
    found = p_values(name)
    false = int((found <= rate).sum())
    # an exact guard fails this once in 10,000 seeds
    assert false <= scipy.stats.binom.ppf(0.9999, len(found), rate)
    if name in ("nearest", "nearest to one"):  # 38 ranked examples can reach any multiple of 1 / 39
        assert false >= scipy.stats.binom.ppf(0.0001, len(found), math.floor(rate * 39) / 39)


def test_the_promise_by_adapter_holds_for_a_rare_one():
    """Prompts of an adapter with 19 examples beside one with 300: by pool it may be refused often, by adapter not."""
    generator, false = torch.Generator().manual_seed(1), {"pool": 0, "adapter": 0}
    trials = 300
    for _ in range(trials):
        groups = [
            drawn(generator, direction("a", 8), 100, noise=0.05),
            drawn(generator, direction("b", 8), 19, noise=0.8),
        ]
        prompt = drawn(generator, direction("b", 8), 1, noise=0.8)
        for scope in false:
            guard = Nearest(rate=0.1, scope=scope)
            guard.fit(groups)
            false[scope] += guard.judge(prompt).refuses(0)
    assert false["adapter"] <= scipy.stats.binom.ppf(0.9999, trials, 0.1)
    assert false["pool"] > 0.25 * trials  # the pool's promise is an average, which the common adapter fills


@pytest.mark.parametrize("name", SPECS)
def test_what_is_unlike_is_refused(name):
    generator = torch.Generator().manual_seed(2)
    guard = guards.build({**SPECS[name], "rate": 0.1})
    guard.fit([drawn(generator, direction(one, 8), 60, noise=0.1) for one in "ab"])
    judged = guard.judge(drawn(generator, -direction("a", 8) - direction("b", 8), 50, noise=0.1))
    assert not judged.is_blind and all(judged.refuses(row) for row in range(50))


def test_nearest_is_full_conformal_prediction():
    """Against plain loops: put the prompt among the examples, score everyone against everyone else, and rank."""
    generator = torch.Generator().manual_seed(3)
    for neighbours, number in ((1, 7), (3, 9), (3, 3), (5, 4)):
        examples_ = drawn(generator, direction("a", 8), number)
        guard = Nearest(neighbours=neighbours)
        guard.fit([examples_])
        for prompt in drawn(generator, direction("a", 8), 6, noise=0.9):
            every = torch.cat([examples_, prompt[None]]).double()
            k = min(neighbours, number - 1)
            scores = []
            for i in range(number + 1):
                others = [float(every[i] @ every[j]) for j in range(number + 1) if j != i]
                scores.append(sum(sorted(others)[-k:]))
            expected = sum(score <= scores[-1] for score in scores) / (number + 1)
            assert guard.judge(prompt[None]).familiarity[0] == pytest.approx(expected)


def test_nearest_in_pieces_is_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    groups, prompts = [drawn(generator, direction("a", 8), 40)], drawn(generator, direction("a", 8), 9, noise=1.0)
    whole = Nearest()
    whole.fit(groups)
    monkeypatch.setattr("molora.prompts.guard.PIECE", 60)
    pieces = Nearest()
    pieces.fit(groups)
    assert pieces.judge(prompts) == whole.judge(prompts)


def test_mahalanobis_is_the_plain_formula():
    generator = torch.Generator().manual_seed(5)
    groups = [drawn(generator, direction(name, 8), 31) for name in "ab"]
    prompts = drawn(generator, direction("a", 8), 5, noise=0.9)
    guard = Mahalanobis(shrink=0.2)
    guard.fit(groups)
    learnt, held = [g[0::2].double().numpy() for g in groups], [g[1::2].double().numpy() for g in groups]
    means = [part.mean(0) for part in learnt]
    apart = np.concatenate([part - mean for part, mean in zip(learnt, means, strict=True)])
    covariance = apart.T @ apart / (len(apart) - 2)
    covariance = 0.8 * covariance + 0.2 * np.trace(covariance) / 8 * np.eye(8)
    inverse = np.linalg.inv(covariance)

    def distance(x):
        return min((x - mean) @ inverse @ (x - mean) for mean in means)

    ranked = [distance(x) for part in held for x in part]
    for prompt, found in zip(prompts.double().numpy(), guard.judge(prompts).familiarity, strict=True):
        expected = (1 + sum(one >= distance(prompt) for one in ranked)) / (len(ranked) + 1)
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", list(guards))
def test_with_too_few_examples_a_guard_is_blind_and_says_so(name):
    rate, enough = 0.1, {"nearest": 9, "mahalanobis": 18}[name]
    for number, blind in ((1, True), (2, True), (enough - 1, True), (enough, False), (enough + 1, False)):
        texts = examples("law", number=number)
        selector = PromptSelector(Planted(), guard={"name": name, "rate": rate}).fit(texts)
        (choice,) = selector.select(["weather:7"])
        assert selector.whole.guard.is_blind is blind
        assert choice.abstained is not blind
        assert ("too few examples" in choice.why) is blind
        assert 0 < choice.familiarity <= 1 and choice.rate == rate


@pytest.mark.parametrize("method", list(prompt_selectors))
@pytest.mark.parametrize("guard", list(guards))
def test_each_selector_abstains_with_each_guard(method, guard):
    selector = PromptSelector(Planted(), method, guard={"name": guard, "rate": 0.05}).fit(
        examples("art", "law", "news")
    )
    for choice in selector.select([f"weather{i}:1" for i in range(20)]):
        if choice.abstained:
            assert not choice.weights and choice.familiarity <= 0.05 and "base model" in choice.why
    refused = sum(c.abstained for c in selector.select([f"weather{i}:1" for i in range(20)]))
    like = sum(c.abstained for c in selector.select([f"law:{i}" for i in range(500, 540)]))
    assert refused >= 18 and like <= 8


def test_a_guard_judges_by_what_is_allowed():
    """A prompt about law is like the examples of all, and unlike those of art and news."""
    selector = PromptSelector(Planted()).fit(examples("art", "law", "news"))
    assert not selector.select(["law:500"])[0].abstained
    assert selector.select(["law:500"], allowed={"art", "news"})[0].abstained


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "nearest", "rate": 0},
        {"name": "nearest", "rate": 1},
        {"name": "nearest", "scope": "all"},
        {"name": "nearest", "neighbours": 0},
        {"name": "nearest", "ranked": 0},
        {"name": "mahalanobis", "rate": 2.0},
        {"name": "mahalanobis", "shrink": 0},
    ],
)
def test_options_out_of_range_are_refused(spec):
    with pytest.raises(ConfigError, match=spec["name"]):
        guards.build(spec)
