"""Selectors: laws over every registered one, and each against a plain computation of its own."""

import itertools
import math
import threading

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.nn import functional as F

from molora.errors import ConfigError
from molora.prompts.contrastive import Contrastive
from molora.prompts.gathered import Gathered, bytes_of
from molora.prompts.registry import guards, prompt_selectors
from molora.prompts.scoring import Centroid, Classifier, Knn, Pilots, centres
from molora.prompts.selector import PromptSelector
from tests.prompts.planted import Planted, direction, examples

METHODS = list(prompt_selectors)
GUARDS = [None, *guards]
NAMES = ("art", "law", "news", "sport")


def fitted(method, guard="nearest", names=NAMES, embed=None, **options):
    return PromptSelector(embed or Planted(), method, guard=guard, **options).fit(examples(*names))


def asked(*clusters, number=10):
    return [text for texts in examples(*clusters, number=number, start=1000).values() for text in texts]


# --- laws over every registered name ----------------------------------------------------------------------------------


def test_the_promised_methods_are_registered():
    assert {"centroid", "knn", "pilots", "classifier", "contrastive"} <= set(METHODS)
    assert {"nearest", "mahalanobis"} <= set(guards)
    assert all(prompt_selectors.fact(name, "scores") in ("cosine", "probability") for name in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_planted_clusters_are_told_apart(method):
    selector = fitted(method, guard=None)
    for name in NAMES:
        for choice in selector.select(asked(name)):
            assert choice.names == (name,) and choice.weights == {name: 1.0}
            assert not choice.abstained and choice.familiarity is None
            assert max(choice.scores, key=choice.scores.get) == name
            assert math.isclose(sum(choice.probabilities.values()), 1.0)
            assert choice.entropy < 0.5 * math.log(4)
            assert f"'{name}'" in choice.why


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guard", GUARDS)
def test_what_is_not_allowed_does_not_exist(method, guard):
    """Choices, scores, guard, sentence and version are those of a selector that never saw the others."""
    all_four, prompts = fitted(method, guard), asked(*NAMES, "weather", number=3)
    for number in (1, 2, 3):
        for allowed in itertools.combinations(NAMES, number):
            alone = fitted(method, guard, names=allowed).select(prompts)
            assert all_four.select(prompts, allowed=set(allowed)) == alone
            assert all_four.select(prompts, allowed=[*allowed, "unknown"]) == alone
    hidden = all_four.select(prompts, allowed={"art", "law"})
    assert not any("news" in str(choice) or "sport" in str(choice) for choice in hidden)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_allowed_is_an_abstention(method):
    for allowed in ((), {"unknown"}):
        (choice,) = fitted(method).select(["law:1"], allowed=allowed)
        assert choice.abstained and not choice.weights and not choice.scores and choice.entropy == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guard", GUARDS)
def test_order_of_names_and_a_second_fit_change_nothing(method, guard):
    prompts = asked(*NAMES, number=3)
    once = fitted(method, guard).select(prompts)
    assert fitted(method, guard).select(prompts) == once
    assert fitted(method, guard, names=NAMES[::-1]).select(prompts) == once


@pytest.mark.parametrize("method", METHODS)
def test_renaming_adapters_renames_scores(method):
    texts, prompts = examples(*NAMES), asked(*NAMES, number=3)
    turned = dict(zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True))
    before = PromptSelector(Planted(), method, guard="nearest").fit(texts).select(prompts)
    after = PromptSelector(Planted(), method, guard="nearest").fit({turned[k]: v for k, v in texts.items()})
    for old, new in zip(before, after.select(prompts), strict=True):
        assert [turned[name] for name in old.names] == list(new.names)
        assert old.familiarity == new.familiarity
        for name, score in old.scores.items():
            assert new.scores[turned[name]] == pytest.approx(score, abs=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_is_scored_alone(method):
    selector, prompts = fitted(method), asked(*NAMES, number=3)
    for prompt, together in zip(prompts, selector.select(prompts), strict=True):
        (alone,) = selector.select([prompt])
        assert alone.names == together.names and alone.abstained == together.abstained
        for name, score in together.scores.items():
            assert alone.scores[name] == pytest.approx(score, abs=1e-5)
    assert selector.select([]) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_mix_weighs_the_best_by_their_shares(method):
    prompts = asked(*NAMES, number=3)
    one, two = fitted(method, temperature=0.5), fitted(method, temperature=0.5, top_k=2)
    for single, mix in zip(one.select(prompts), two.select(prompts), strict=True):
        if mix.abstained:
            continue
        best = sorted(mix.probabilities, key=mix.probabilities.get, reverse=True)[:2]
        assert len(mix.weights) == 2 and mix.names[0] == single.names[0] and set(mix.names) == set(best)
        total = sum(mix.probabilities[name] for name in best)
        assert mix.weights == pytest.approx({name: mix.probabilities[name] / total for name in best})
        shares = np.array(list(mix.probabilities.values()))
        assert mix.entropy == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-9)
    assert len(two.select(["law:1"], allowed={"law"})[0].weights) == 1  # fewer than top_k


@pytest.mark.parametrize("method", METHODS)
def test_scores_turn_into_shares_as_their_kind_says(method):
    (choice,) = fitted(method, temperature=0.3, guard=None).select(["law:777"])
    scores = np.array(list(choice.scores.values()), dtype=np.float64)
    if prompt_selectors.fact(method, "scores") == "probability":
        assert scores.sum() == pytest.approx(1.0, abs=1e-6)
        scores = np.log(np.maximum(scores, 1e-30))
    expected = np.exp(scores / 0.3) / np.exp(scores / 0.3).sum()
    assert list(choice.probabilities.values()) == pytest.approx(list(expected), rel=1e-5)


# --- each method by itself --------------------------------------------------------------------------------------------


def groups(*clusters, number=12):
    return [Planted()(texts) for texts in examples(*clusters, number=number).values()]


def test_centroids_are_cosines_with_the_mean():
    method, parts, asking = Centroid(), groups("a", "b", "c"), Planted()(asked("a", "b"))
    method.fit(parts)
    for row, prompt in enumerate(asking.double()):
        for column, part in enumerate(parts):
            mean = sum(part.double()) / len(part)
            expected = float(prompt @ mean / (prompt.norm() * mean.norm()))
            assert float(method.score(asking)[row, column]) == pytest.approx(expected, abs=1e-6)


def test_knn_votes_by_inverse_distance():
    method, parts, asking = Knn(neighbours=5), groups("a", "b", "c"), Planted(noise=2.0)(asked("a", "b"))
    method.fit(parts)
    for row, prompt in enumerate(asking.double()):
        all_of = [(float((prompt - one).norm()), column) for column, part in enumerate(parts) for one in part.double()]
        votes = [0.0, 0.0, 0.0]
        for distance, column in sorted(all_of)[:5]:
            votes[column] += 1 / (distance + 1e-3)
        expected = [vote / sum(votes) for vote in votes]
        assert method.score(asking)[row].tolist() == pytest.approx(expected, abs=1e-4)


def test_knn_of_one_neighbour_gives_an_example_its_own_adapter():
    method, parts = Knn(neighbours=1), groups("a", "b", "c")
    method.fit(parts)
    for column, part in enumerate(parts):
        assert (method.score(part).argmax(-1) == column).all()
        assert torch.equal(method.score(part).amax(-1), torch.ones(len(part)))


def test_one_pilot_is_the_centroid():
    parts, asking = groups("a", "b", "c"), Planted()(asked("a", "b"))
    one, centroid = Pilots(number=1), Centroid()
    one.fit(parts)
    centroid.fit(parts)
    torch.testing.assert_close(one.score(asking), centroid.score(asking))


def test_pilots_by_mean_and_by_max_differ_where_an_adapter_owns_scattered_pilots():
    """Adapter a owns pilots at 0 and 90 degrees, b one at 40: a prompt at 0 is a's by max and b's by mean."""

    def at(degrees):
        return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])

    parts = [torch.stack([at(0), at(0), at(90), at(90)]), torch.stack([at(40)])]
    found = {}
    for mode in ("mean", "max"):
        method = Pilots(number=2, mode=mode)
        method.fit(parts)
        assert len(method.pilots) == 3
        found[mode] = method.score(at(0)[None])[0].tolist()
    assert found["mean"] == pytest.approx([0.5, math.cos(math.radians(40))], abs=1e-6)
    assert found["max"] == pytest.approx([1.0, math.cos(math.radians(40))], abs=1e-6)


def test_centres_find_planted_clusters():
    vectors = torch.cat(groups("a", "b", "c"))
    found = F.normalize(centres(vectors, 3), dim=-1)
    for name in "abc":
        assert float((found @ direction(name)).max()) > 0.97
    assert len(centres(vectors[:1].repeat(5, 1), 3)) == 1  # copies make one centre


def objective(flat, x, y, sizes, l2):
    """The same loss in numpy, with its gradient."""
    number = len(sizes)
    weight, bias = flat[: number * x.shape[1]].reshape(number, -1), flat[number * x.shape[1] :]
    logits = x @ weight.T + bias
    logits = logits - logits.max(1, keepdims=True)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    each = 1 / (number * sizes[y])
    loss = -(each * np.log(shares[np.arange(len(y)), y])).sum() + l2 / 2 * (flat**2).sum()
    shares[np.arange(len(y)), y] -= 1
    slope = shares * each[:, None]
    return loss, np.concatenate([(slope.T @ x).ravel(), slope.sum(0)]) + l2 * flat


def test_the_classifier_reaches_the_one_minimum():
    parts = [groups(name, number=n)[0] for name, n in (("a", 5), ("b", 20), ("c", 9))]
    method = Classifier(l2=1e-3)
    method.fit(parts)
    x, sizes = torch.cat(parts).double().numpy(), np.array([5.0, 20.0, 9.0])
    y = np.repeat(np.arange(3), [5, 20, 9])
    flat = np.concatenate([method.weight.numpy().ravel(), method.bias.numpy()])
    loss, slope = objective(flat, x, y, sizes, 1e-3)
    assert np.abs(slope).max() < 1e-6
    other = scipy.optimize.minimize(
        objective, np.ones_like(flat), (x, y, sizes, 1e-3), "BFGS", jac=True, options={"gtol": 1e-9, "maxiter": 2000}
    )
    assert loss == pytest.approx(other.fun, rel=1e-8)
    np.testing.assert_allclose(flat, other.x, atol=2e-5)


def test_contrastive_reaches_a_stationary_point_below_the_centroids():
    parts = [groups(name, number=n)[0] for name, n in (("a", 5), ("b", 20), ("c", 9))]
    method, centroid = Contrastive(tau=0.2), Centroid()
    method.fit(parts)
    centroid.fit(parts)

    def loss(directions):
        """In loops, over raw directions of any length."""
        total = 0.0
        for column, part in enumerate(parts):
            for x in part.double().numpy():
                cosines = directions @ x / np.linalg.norm(directions, axis=1)
                total -= (cosines[column] / 0.2 - np.log(np.exp(cosines / 0.2).sum())) / (3 * len(part))
        return total

    found = method.directions.double().numpy()
    assert loss(found) < loss(centroid.centroids.double().numpy()) - 1e-3
    slope = scipy.optimize.approx_fprime(found.ravel(), lambda flat: loss(flat.reshape(found.shape)), 1e-6)
    assert np.abs(slope).max() < 1e-5


def test_contrastive_has_the_floor_of_bounded_cosines():
    """Two adapters with opposite examples: at temperature 1 the share of the right one is 1 / (1 + e^-2), never 1."""
    one = direction("a")[None]
    selector = PromptSelector(Planted(), {"name": "contrastive", "tau": 1.0}, guard=None)
    (choice,) = selector.fit_vectors({"a": one, "b": -one}).select_vectors(one)
    assert choice.probabilities["a"] == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "no adapter to choose from"),
        ({"a": []}, "'a' has no examples"),
        ({"a": "text"}, "list of texts"),
        ({"a": ["x", "  "]}, "list of texts"),
        ({"a": ["x", 3]}, "list of texts"),
        ({3: ["x"]}, "is no text"),
    ],
)
def test_examples_that_are_none_are_refused(texts, message):
    with pytest.raises(ConfigError, match=message):
        PromptSelector(Planted()).fit(texts)


def test_all_problems_of_a_selector_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        PromptSelector(Planted(), "centroids", guard={"name": "nearest", "rat": 1}, top_k=0, temperature=-1, limit=0)
    for part in ("did you mean 'centroid'", "no option 'rat'", "top_k", "temperature", "limit"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "knn", "neighbours": 0},
        {"name": "pilots", "mode": "median"},
        {"name": "pilots", "number": 0},
        {"name": "classifier", "l2": 0},
        {"name": "contrastive", "tau": 0},
    ],
)
def test_options_out_of_range_are_refused(spec):
    with pytest.raises(ConfigError, match=spec["name"]):
        PromptSelector(Planted(), spec)


def test_calls_that_cannot_be_meant_are_refused():
    selector = PromptSelector(Planted())
    with pytest.raises(ConfigError, match="not fitted"):
        selector.select(["x"])
    selector.fit(examples("a", "b"))
    with pytest.raises(ConfigError, match="list of prompts"):
        selector.select("x")
    with pytest.raises(ConfigError, match="set of names"):
        selector.select(["x"], allowed="a")
    with pytest.raises(ConfigError, match="use the embedder of the examples"):
        selector.select_vectors(torch.ones(1, 3))


def test_copies_count_once_and_the_limit_spreads():
    copies = PromptSelector(Planted()).fit({"a": ["a:1", "a:2", "a:1"] * 5, "b": ["b:1"]})
    assert [len(group) for group in copies.groups] == [2, 1]
    few = PromptSelector(Planted(), limit=3).fit({"a": [f"a:{i}" for i in range(9)]})
    assert torch.equal(few.groups[0], Planted()(["a:0", "a:3", "a:6"]))


def test_many_sets_of_allowed_adapters_are_kept_within_bounds(monkeypatch):
    monkeypatch.setattr("molora.prompts.parts.MOST_PARTS", 2)
    selector = fitted("centroid")
    for allowed in itertools.combinations(NAMES, 2):
        assert selector.select(["law:1"], allowed=allowed) == selector.select(["law:1"], allowed=allowed)
        assert len(selector._parts) <= 2


def counting(selector, monkeypatch):
    """Note the sets of adapters that a selector is fitted on."""
    made, fit = [], selector._fit
    monkeypatch.setattr(selector, "_fit", lambda names, groups: made.append(names) or fit(names, groups))
    return made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guard", list(guards))
def test_every_set_is_fitted_once_and_its_examples_rest_within_the_memory(method, guard, monkeypatch):
    """Tenants of all rights ask in turn, three times: the answers are the same, and nothing is fitted anew."""
    selector = fitted(method, guard)
    sets = [set(some) for some in itertools.combinations(NAMES, 2)]
    expected = [fitted(method, guard, names=sorted(some)).select(["law:1", "art:3"]) for some in sets]
    for some in sets:
        selector.select(["law:1"], some)
    sizes = [(awake, rest) for _, awake, rest in selector._parts._parts.values()]
    most = sum(rest for _, rest in sizes) + 2 * max(awake - rest for awake, rest in sizes)  # two awake, the others not
    monkeypatch.setattr("molora.prompts.parts.MOST_BYTES", most)
    selector.fit(examples(*NAMES))
    made = counting(selector, monkeypatch)
    for _ in range(2):
        for some, choices in zip(sets, expected, strict=True):
            assert selector.select(["law:1", "art:3"], some) == choices
            parts = selector._parts
            told = sum(bytes_of(part, selector.groups) for part, _, _ in parts._parts.values())
            assert told <= parts.bytes <= parts.most_bytes
    assert len(made) == len(set(made)) == len(sets)


def test_thousands_of_sets_take_no_more_than_they_may(monkeypatch):
    names = [f"n{i:02d}" for i in range(40)]
    groups = {name: F.normalize(torch.randn(30, 64, generator=torch.Generator().manual_seed(i)), dim=-1)
              for i, name in enumerate(names)}  # fmt: skip
    selector = PromptSelector(Planted(), "knn").fit_vectors(groups)
    made, prompt = counting(selector, monkeypatch), groups["n00"][:1]
    sets = [set(names[i : i + 5]) | {names[j]} for i in range(0, 30) for j in range(36, 40)]
    for _ in range(2):
        for some in sets:
            selector.select_vectors(prompt, some)
    assert len(sets) == 120 and len(made) == 120  # with 64 kept, each would have been made twice
    monkeypatch.setattr("molora.prompts.parts.MOST_BYTES", 100_000)
    selector.fit_vectors(groups)
    for some in sets:
        selector.select_vectors(prompt, some)
        held = sum(bytes_of(part, selector.groups) for part, _, _ in selector._parts._parts.values())
        assert held <= selector._parts.bytes <= 100_000 + 6 * 30 * 64 * 4 * 2  # the last one is kept in any case
    assert 1 <= len(selector._parts) < 120


def test_who_asks_for_a_set_that_is_being_fitted_waits_for_it(monkeypatch):
    selector, go, begun = fitted("centroid"), threading.Event(), threading.Event()
    made, fit = [], selector._fit

    def slow(names, groups):
        made.append(names)
        begun.set()
        assert go.wait(30)
        return fit(names, groups)

    monkeypatch.setattr(selector, "_fit", slow)
    found = []
    ask = [threading.Thread(target=lambda: found.append(selector.select(["law:1"], {"law", "art"})[0].version))
           for _ in range(4)]  # fmt: skip
    for thread in ask:
        thread.start()
    assert begun.wait(30)
    go.set()
    for thread in ask:
        thread.join(30)
    assert len(made) == 1 and len(found) == 4 and len(set(found)) == 1


def test_a_set_that_could_not_be_fitted_is_tried_again(monkeypatch):
    selector = fitted("centroid")
    with monkeypatch.context() as patch:
        patch.setattr(selector, "_fit", lambda names, groups: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            selector.select(["law:1"], {"law", "art"})
    assert selector.select(["law:1"], {"law", "art"})[0].names == ("law",)


def test_bytes_are_those_of_every_storage_once():
    matrix = torch.zeros(4, 6)
    thing = Gathered([matrix[:2], matrix[2:]])
    assert bytes_of(thing) == 4 * 6 * 4 and bytes_of(thing, [matrix]) == 0
    assert torch.equal(thing.rows(), matrix) and len(thing) == 4
    assert bytes_of(thing, [matrix]) == 4 * 6 * 4
    assert bytes_of({"a": [thing, thing.rows()], "b": "text"}, [matrix]) == 4 * 6 * 4
    thing.rest()
    assert bytes_of(thing, [matrix]) == 0 and torch.equal(thing.rows(), matrix)


def test_a_new_fit_forgets_what_was_fitted_on_parts():
    selector = fitted("centroid")
    before = selector.select(["law:1"], allowed={"law", "news"})
    selector.fit(examples("law", "news", number=5))
    after = selector.select(["law:1"], allowed={"law", "news"})
    assert before[0].version != after[0].version and before[0].scores != after[0].scores


def test_selecting_while_it_is_fitted_anew_sees_the_old_or_the_new():
    both = [PromptSelector(Planted()).fit(examples(*NAMES, number=n)) for n in (10, 30)]
    sets = [None, {"law"}, {"law", "art"}, {"news", "art", "sport"}]
    expected = [{str(one.select(["law:700"], allowed)[0]) for one in both} for allowed in sets]
    selector, found = PromptSelector(Planted()).fit(examples(*NAMES, number=10)), [set(), set(), set(), set()]

    def ask(i):
        for _ in range(20):
            found[i].add(str(selector.select(["law:700"], sets[i])[0]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for number in (30, 10, 30, 10):
        selector.fit(examples(*NAMES, number=number))
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert all(seen and seen <= known for seen, known in zip(found, expected, strict=True))
