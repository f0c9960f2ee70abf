"""Local routing consistency against binomials, plain loops and known optima; routing vectors against cosines."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import normalize

from molora.errors import ConfigError
from molora.routing.diagnostics import congestion_coefficient
from molora.routing.locality import RoutingEmbedder, cache_hits, routing_vectors, segment_routing_performance
from molora.routing.types import Routing


def random_stream(tokens, experts, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    return torch.zeros(tokens, experts).scatter(1, scores.topk(k).indices, 1.0)


def test_srp_of_one_token_and_of_constant_routing_is_one():
    assert segment_routing_performance(random_stream(50, 8, 2), 1).value == 1
    constant = torch.zeros(40, 8)
    constant[:, [1, 5]] = 1
    srp = segment_routing_performance(constant, 16)
    assert srp.value == 1 and srp.cache_multiple == 1


@pytest.mark.parametrize(("window", "known"), [(4, 0.464), (16, 0.321), (64, 0.253)])
def test_srp_of_independent_uniform_routing_is_the_binomial_value(window, known):
    p = 2 / 16
    weights = [math.comb(window, j) * p**j * (1 - p) ** (window - j) for j in range(window + 1)]
    expected = max(
        2 * sum(j * weights[j] for j in range(c, window + 1)) / (window * (sum(weights[c:]) + p))
        for c in range(1, window + 1)
    )
    assert expected == pytest.approx(known, abs=6e-4)
    found = segment_routing_performance(random_stream(40_000, 16, 2), window).value
    assert found == pytest.approx(expected, abs=4e-3) and found >= 2 * p / (1 + p) - 4e-3


def test_srp_equals_its_definition_by_a_plain_loop():
    active = random_stream(30, 5, 2, seed=3)
    window, best = 4, 0.0
    counts = [int(active[t : t + window, e].sum()) for t in range(30 - window + 1) for e in range(5)]
    for c in range(1, window + 1):
        on = [n for n in counts if n >= c]
        best = max(best, 2 * sum(on) / (window * len(on) + sum(counts)))
    assert segment_routing_performance(active, window).value == pytest.approx(best)
    with pytest.raises(ConfigError, match="window must be from 1 to the 30"):
        segment_routing_performance(active, 31)


def best_possible(stream, capacity):
    """Most hits any sequence of evictions reaches, by trying them all; an expert may also pass by (one per token)."""
    best, states = 0, {(): 0}
    seen = set()
    for expert in stream:
        free = expert not in seen and len(seen) < capacity
        seen.add(expert)
        after = {}
        for held, hits in states.items():
            if expert in held:
                options = [(held, hits + 1)]
            elif len(held) < capacity:
                options = [(tuple(sorted((*held, expert))), hits + free)]
            else:
                options = [(tuple(sorted({*held, expert} - {out})), hits + free) for out in (*held, expert)]
            for state, value in options:
                after[state] = max(after.get(state, -1), value)
        states = after
        best = max(states.values())
    return best / len(stream)


@pytest.mark.parametrize("seed", range(6))
def test_belady_is_the_optimum_and_the_others_are_below(seed):
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(0, 5, (14,), generator=generator).tolist()
    active = torch.nn.functional.one_hot(torch.tensor(stream), 5)
    optimum = best_possible(stream, 2)
    assert cache_hits(active, 2) == pytest.approx(optimum)
    for policy, window in itertools.product(("sch", "lru"), (1, 3, 14)):
        assert cache_hits(active, 2, policy=policy, window=window) <= optimum + 1e-9


def test_sch_is_no_upper_bound_on_block_traces_but_belady_is():
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for _ in range(40):  # blocks of 32 tokens over 4 of 16 experts, 2 per token
        four = torch.randperm(16, generator=generator)[:4]
        for _ in range(32):
            row = torch.zeros(16)
            row[four[torch.randperm(4, generator=generator)[:2]]] = 1
            blocks.append(row)
    active = torch.stack(blocks)
    figures = {policy: cache_hits(active, 2, policy=policy, window=8) for policy in ("lru", "sch", "belady")}
    assert figures["lru"] == pytest.approx(0.488, abs=0.03)
    assert figures["sch"] == pytest.approx(0.546, abs=0.03)
    assert figures["belady"] == pytest.approx(0.670, abs=0.03)
    wide = {policy: cache_hits(active, 4, policy=policy, window=128) for policy in ("lru", "sch", "belady")}
    assert wide["sch"] < wide["lru"] <= wide["belady"] + 1e-9
    assert cache_hits(active, 16) == 1
    with pytest.raises(ConfigError, match="policy 'fifo' is unknown; known: sch, belady, lru"):
        cache_hits(active, 2, policy="fifo")


def test_routing_vectors_are_the_probs_of_the_last_real_token():
    probs = [torch.softmax(torch.randn(2, 5, 3), -1), torch.softmax(torch.randn(2, 5, 4), -1)]
    log = {str(i): Routing(p.log(), p, p) for i, p in enumerate(probs)}
    valid = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    expected = torch.stack([torch.cat([p[0, 2] for p in probs]), torch.cat([p[1, 4] for p in probs])])
    torch.testing.assert_close(routing_vectors(log, valid), expected)


def test_moee_similarities():
    hidden, routing = torch.randn(6, 8, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64)
    embedder = RoutingEmbedder(alpha=0.7).fit(hidden, routing)
    same = embedder.similarity((hidden, routing), (hidden, routing))
    torch.testing.assert_close(same.diagonal(), torch.full((6,), 1.7, dtype=torch.float64))
    both = embedder.concat(hidden, routing)
    torch.testing.assert_close(embedder.concat(hidden[:2], routing[:2]), both[:2])  # no neighbour matters any more
    h, r = both[:, :8], both[:, 8:]
    parts = h.norm(dim=1)[:, None] * h.norm(dim=1) * (normalize(h) @ normalize(h).T)
    parts = parts + r.norm(dim=1)[:, None] * r.norm(dim=1) * (normalize(r) @ normalize(r).T)
    torch.testing.assert_close(
        normalize(both) @ normalize(both).T, parts / (both.norm(dim=1)[:, None] * both.norm(dim=1))
    )
    with pytest.raises(ConfigError, match="fit the embedder"):
        RoutingEmbedder().concat(hidden, routing)


def test_congestion_is_recovered_at_an_interior_equilibrium():
    load = torch.tensor([0.5, 0.3, 0.2, 0.0])
    quality = 2.0 + 5.0 * load
    quality[3] = -9.0  # not in use, so it tells nothing
    assert congestion_coefficient(quality, load) == pytest.approx(5.0)
    with pytest.raises(ConfigError, match="at least two experts"):
        congestion_coefficient(quality, torch.tensor([0.25, 0.25, 0.25, 0.25]))
