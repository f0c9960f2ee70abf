"""Systems that differ in how many experts a token uses and how they are weighed, each against an independent reference.

References: plain loops over tokens and experts, scipy, enumeration, and transformers' own Mixtral and DeepSeek-V3.
"""

import itertools
import math

import pytest
import torch
from scipy.optimize import minimize
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import molora
from molora.config import MoloraConfig
from molora.control import routed_layers
from molora.errors import ConfigError, RoutingError
from molora.routing.groups import align
from molora.routing.losses import Parts, switch_balance
from molora.routing.router import Router
from molora.routing.selectors import top_k, top_p
from molora.routing.sparsegen import HIGHEST, interval, lambda_sparsity, sparsegen
from molora.routing.thresholds import attention_received, capacity, dynamic_k, positive, relative
from molora.routing.types import Context, Routing
from tests.needs import stocked
from tests.recipes.test_recipes import dot, padded_inputs, shaken, softmax, watched
from tests.tiny import tiny_bert_classifier, tiny_inputs, tiny_llama, tiny_t5

HERE = Context()
TRAINING = Context(training=True)


def some_probs(rows=4, tokens=9, experts=8, spread=1.5):
    return torch.softmax(spread * torch.randn(rows, tokens, experts), -1)


def router_of(recipe, experts=8, dim=16, **changes):
    """A router as a recipe makes it, with random weights."""
    config = MoloraConfig.from_recipe(recipe)
    names = ("scorer", "link", "selector", "price", "feature")
    router = Router(dim, experts, **{name: getattr(config, name) for name in names} | changes)
    for parameter in router.scorer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return router


# --- every layer of a tiny Llama against the equation of the recipe, as a loop over tokens and experts ---------------


def best(values, k):
    return sorted(range(len(values)), key=lambda e: -values[e])[:k]


def over_sum(values, chosen):
    total = sum(values[e] for e in chosen)
    return {e: values[e] / total for e in chosen}


def sigmoids(z):
    return [1 / (1 + math.exp(-v)) for v in z]


def switch_gates(z, router):
    p = softmax(z)
    return {e: p[e] for e in best(p, 1)}


def top2_gates(z, router):
    p = softmax(z)
    return over_sum(p, best(p, 2))


def deepseek_gates(z, router):
    s, price = sigmoids(z), router.price.value.tolist()
    biased = [a - b for a, b in zip(s, price, strict=True)]
    groups = [range(4 * g, 4 * g + 4) for g in range(4)]
    score = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
    allowed = [e for g in best(score, 2) for e in groups[g]]
    chosen = sorted(allowed, key=lambda e: -biased[e])[:4]
    return {e: 2.5 * g for e, g in over_sum(s, chosen).items()}


def dynamic_gates(z, router):
    p = softmax(z)
    kept, mass = {}, 0.0
    for e in best(p, len(p)):
        kept[e] = p[e]
        mass += p[e]
        if mass >= 0.4:
            return kept
    return kept


def adamoe_gates(z, router):
    p = softmax(z)
    assert len(p) == 8
    real = [e for e in best(p, 4) if e < 4]
    return over_sum(p, real) if real else {}


def da_moe_gates(z, router):
    p = softmax(z)
    kept, mass = [], 0.0
    for e in best(p, 4):
        kept.append(e)
        mass += p[e]
        if mass >= 0.75:
            break
    return over_sum(p, kept)


def dynamoe_gates(z, router):
    p = softmax(z)
    return over_sum(p, [e for e in range(len(p)) if p[e] >= 0.5 * max(p)])


def sam_gates(z, router):
    p = softmax(z)
    group = best([p[2 * g] + p[2 * g + 1] for g in range(4)], 1)[0]
    return {2 * group: p[2 * group], 2 * group + 1: p[2 * group + 1]}


def post_moe_gates(z, router):
    p = softmax(z)
    return {e: p[e] for e in best(p, 2)}


def router_tuning_gates(z, router):
    return {e: 1.0 for e, p in enumerate(sigmoids(z)) if p > 0.5}


GATES = {
    "switch": switch_gates,
    "gshard": top2_gates,
    "mixtral": top2_gates,
    "deepseek_v3": deepseek_gates,
    "dynamic_moe": dynamic_gates,
    "adamoe": adamoe_gates,
    "da_moe": da_moe_gates,
    "dynamoe": dynamoe_gates,
    "sam_bilevel": sam_gates,
    "post_moe": post_moe_gates,
    "router_tuning": router_tuning_gates,
}


@pytest.mark.proves(
    *("switch", "gshard", "mixtral", "deepseek_v3", "dynamic_moe", "adamoe", "da_moe", "dynamoe"),
    *("sam_bilevel", "post_moe", "router_tuning"),
)
@pytest.mark.parametrize("name", sorted(GATES))
@torch.no_grad()
def test_layers_equal_the_equation(name):
    model = stocked(shaken(name, tiny_llama()))
    sizes, uses, largest = set(), set(), 0.0
    for _, layer, x, y in watched(model, padded_inputs(model)):
        bank, router = layer.molora_bank["default"], layer.molora_router["default"]
        pairs = [tuple(t.double() for t in bank.pair(e)) for e in range(bank.num_experts)]
        sizes.add(bank.num_experts)
        rows = router.scorer.weight.double()
        for token, out in zip(x.flatten(0, 1).double(), y.flatten(0, 1).double(), strict=True):
            gates = GATES[name]([dot(row, token) for row in rows], router)
            uses.add(len(gates))
            if name == "deepseek_v3":
                gates[16] = 1.0  # the shared expert
            change = sum(2.0 * g * (pairs[e][1] @ (pairs[e][0] @ token)) for e, g in gates.items())
            change = change + torch.zeros_like(out)
            largest = max(largest, float(change.abs().max()))
            torch.testing.assert_close(out, layer.base_layer.weight.double() @ token + change, atol=1e-5, rtol=1e-5)
    assert largest > 0.01, "the experts do next to nothing, so the comparison would be empty"
    if name == "dynamoe":
        assert sizes == {2, 8}
    if name in ("dynamic_moe", "adamoe", "da_moe", "dynamoe", "router_tuning"):
        assert len(uses) > 2, f"the number of experts hardly moves: {uses}"


# --- Switch, GShard, Mixtral ------------------------------------------------------------------------------------------


@pytest.mark.proves("switch")
def test_switch_keeps_the_probability_because_one_would_teach_nothing():
    """Top-1 over its own sum is the constant 1, whose gradient is exactly 0; the raw probability has one."""
    x = torch.randn(2, 5, 16)
    for normalise, learns in (("none", True), ("sum1", False)):
        router = router_of("switch", selector={"name": "top_k", "k": 1, "normalise": normalise})
        (router(x, HERE).gates * torch.randn(8)).sum().backward()
        assert bool(router.scorer.weight.grad.abs().max() > 0) is learns


@pytest.mark.proves("switch")
def test_switch_jitter_acts_in_training_only():
    router, x = router_of("switch"), torch.randn(2, 5, 16)
    assert torch.equal(router(x, HERE).scores, x @ router.scorer.weight.t())
    noisy = router(x, TRAINING).scores
    assert not torch.equal(noisy, router(x, HERE).scores)
    bound = 0.01 * x.abs() @ router.scorer.weight.t().abs()
    assert ((noisy - router(x, HERE).scores).abs() <= bound + 1e-6).all()


@pytest.mark.proves("gshard")
def test_gshard_keeps_the_second_expert_with_twice_its_weight():
    scores = torch.tensor([1.0, 0.3, -2.0, -3.0])
    probs = torch.softmax(scores, -1).expand(1, 40000, 4)
    gates = top_k(probs, TRAINING, k=2, second="random")[0]
    first, second = torch.softmax(scores[:2], -1).tolist()
    assert gates[:, 0].unique().tolist() == pytest.approx([first])  # the first stays, with the weight it had
    assert gates[:, 1].unique().tolist() == pytest.approx([0.0, second]) and gates[:, 2:].eq(0).all()
    kept = float((gates[:, 1] > 0).float().mean())
    assert abs(kept - 2 * second) < 4 * math.sqrt(2 * second * (1 - 2 * second) / 40000)
    assert (top_k(probs, HERE, k=2, second="random")[0, :, 1] > 0).all()  # in use it always stays
    even = torch.full((1, 50, 4), 0.25)
    assert (top_k(even, TRAINING, k=2, second="random") > 0).sum(-1).eq(2).all()  # 2 g_2 = 1: never dropped


@pytest.mark.proves("gshard", "switch", "mixtral")
def test_random_choices_are_made_in_training_only():
    for name, differs in (("gshard", True), ("switch", True), ("mixtral", False)):
        model = shaken(name, tiny_llama()).train()
        inputs = tiny_inputs(model)
        runs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            runs.append(model(**inputs).logits.detach())
            molora.drop_aux(model)
        assert torch.equal(*runs) is not differs
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.proves("mixtral")
def test_mixtral_weights_are_a_softmax_over_the_chosen_scores():
    router, x = router_of("mixtral"), torch.randn(3, 7, 16)
    routing = router(x, HERE)
    top = routing.scores.topk(2, -1)
    expected = torch.zeros_like(routing.scores).scatter(-1, top.indices, torch.softmax(top.values, -1))
    torch.testing.assert_close(routing.gates, expected)


@pytest.mark.proves("mixtral")
def test_mixtral_loss_is_half_of_that_of_transformers():
    """Theirs does not divide the load by k: 2 at perfect balance, where ours is 1. Padding counts in neither."""
    router, x = router_of("mixtral"), torch.randn(3, 7, 16)
    valid = torch.rand(3, 7) < 0.7
    for ctx, mask in ((HERE, None), (Context(valid=valid), valid.long())):
        routing = router(x, ctx)
        theirs = load_balancing_loss_func((routing.scores.flatten(0, 1),), 8, 2, mask)
        torch.testing.assert_close(2 * switch_balance(routing, ctx), theirs)


# --- DeepSeek-V3 ------------------------------------------------------------------------------------------------------


@pytest.mark.proves("deepseek_v3")
@torch.no_grad()
def test_deepseek_v3_routes_as_transformers_does():
    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5
    )
    theirs = DeepseekV3TopkRouter(config)
    assert theirs.norm_topk_prob and theirs.num_experts == 16
    ours = router_of("deepseek_v3", experts=16, price={"name": "sign"})
    ours.price.value.normal_(std=0.2)
    theirs.weight.copy_(ours.scorer.weight)
    theirs.e_score_correction_bias.copy_(-ours.price.value)
    x = torch.randn(2, 50, 16)
    scores, weights, indices = theirs(x)
    expected = torch.zeros_like(scores).scatter(-1, indices, weights).view(2, 50, 16)
    torch.testing.assert_close(ours(x, HERE).gates, expected)
    unpriced = router_of("deepseek_v3", experts=16, price=None)
    unpriced.scorer.load_state_dict(ours.scorer.state_dict())
    same = (unpriced(x, HERE).selected == ours(x, HERE).selected).all(-1)
    assert 0.02 < same.float().mean() < 0.98  # the price changes many choices,
    torch.testing.assert_close(unpriced(x, HERE).gates[same], ours(x, HERE).gates[same])  # and no weight


@pytest.mark.proves("deepseek_v3")
@torch.no_grad()
def test_deepseek_v3_price_evens_out_a_skewed_load():
    """Toy of the specification: 16 experts, 4 chosen, offsets that send most tokens to a few experts."""
    router = router_of("deepseek_v3", experts=16, price={"name": "sign", "rate": 1e-2})
    offsets = torch.linspace(-1.0, 1.0, 16)
    router.scorer.weight[:, 0] = offsets

    def violation():
        x = torch.randn(1, 512, 16)
        x[..., 0] = 1.0
        selected = router(x, TRAINING).selected
        router.price.observe(selected, torch.ones(1, 512))
        load = selected.float().mean((0, 1))
        return float(load.max() / load.mean() - 1)

    before = sum(violation() for _ in range(5)) / 5
    router.price.chosen = None
    for _ in range(150):
        violation()
        router.price.settle()
    after = sum(violation() for _ in range(5)) / 5
    assert before > 0.6 and after < 0.35, (before, after)


def test_kernels_leave_decisions_that_they_do_not_know_to_the_router():
    plain = [{}, {"k": 3, "normalise": "sumk"}, {"clamp": True, "k": 9}, {"weight": "const", "omega": 0.5}]
    other = [
        *({"scale": 2.5}, {"n_group": 4, "topk_group": 2}, {"pin": "last"}, {"pin": "hard"}, {"second": "random"}),
        {"explore": 0.1},
    ]
    for options, known in (*((o, True) for o in plain), *((o, False) for o in other)):
        router = Router(16, 8, selector={"name": "top_k", **options})
        assert (router.plain_form() is not None) is known, options
    for selector in ("positive", "relative", "per_expert", "dynamic_k", "sparsegen"):
        assert Router(16, 8, selector=selector).plain_form() is None
    for link in ("relu", "identity", "l2_relu", "relu_rms", "sigmoid"):
        assert Router(16, 8, link=link).plain_form() is None
    assert Router(16, 8, scorer="mixture").plain_form() is None
    assert Router(16, 8, null=2, selector={"name": "top_k", "normalise": "real"}).plain_form() is None


def test_groups_that_cannot_hold_the_choice_are_refused():
    p = some_probs()
    for options, message in (
        ({"n_group": 3}, "n_group=3 with 8"),
        ({"n_group": 4, "topk_group": 5}, "topk_group=5 of 4"),
        ({"n_group": 4, "k": 3}, "k experts in 1 of 4 groups of 2, got k=3"),
        ({"group_score": "mean"}, "group_score='mean' is unknown; known: max, top2, sum"),
    ):
        with pytest.raises(ConfigError, match=message):
            top_k(p, HERE, **options)


@pytest.mark.parametrize("score", ["max", "top2", "sum"])
def test_groups_against_enumeration(score):
    p = some_probs(experts=6)
    gates = top_k(p, HERE, k=2, n_group=2, topk_group=1, group_score=score, normalise="none")
    rules = {"max": max, "sum": sum, "top2": lambda g: sum(sorted(g)[-2:])}
    for row, out in zip(p.flatten(0, 1).tolist(), gates.flatten(0, 1).tolist(), strict=True):
        halves = (row[:3], row[3:])
        group = 0 if rules[score](halves[0]) > rules[score](halves[1]) else 1
        chosen = [e + 3 * group for e in best(halves[group], 2)]
        assert out == pytest.approx([row[e] if e in chosen else 0.0 for e in range(6)])
    everything = top_k(p, HERE, k=2, n_group=3, topk_group=3, group_score=score)
    assert torch.equal(everything, top_k(p, HERE, k=2))


# --- Dynamic MoE, AdaMoE ----------------------------------------------------------------------------------------------


@pytest.mark.proves("dynamic_moe")
def test_dynamic_moe_keeps_the_shortest_prefix_that_reaches_p():
    p = some_probs(rows=20, spread=2.0)
    counts = []
    for mass in (0.0, 0.1, 0.4, 0.7, 0.9, 1.0):
        gates = top_p(p, HERE, p=mass)
        kept = gates > 0
        assert torch.equal(gates[kept], p[kept])  # raw weights
        if 0 < mass < 1:
            least = gates.masked_fill(~kept, 2).amin(-1)
            total = gates.sum(-1)
            assert (total >= mass - 1e-6).all()
            assert (total - least < mass + 1e-6).all()  # without the last one it would fall short
        counts.append(kept.sum(-1))
    assert all((a <= b).all() for a, b in itertools.pairwise(counts))
    assert counts[0].eq(1).all() and counts[-1].eq(8).all()


@pytest.mark.proves("adamoe")
def test_adamoe_weights_of_real_experts_sum_to_one_or_nothing():
    router = router_of("adamoe", experts=4, dim=16, null=4)
    routing = router(torch.randn(8, 60, 16), HERE)
    assert routing.gates.shape == (8, 60, 4) and routing.scores.shape == routing.selected.shape == (8, 60, 8)
    assert routing.selected.sum(-1).eq(4).all()
    real = routing.selected[..., :4]
    assert torch.equal(routing.gates > 0, real)
    total = routing.gates.sum(-1)
    torch.testing.assert_close(total, real.any(-1).float())
    assert 0 < (~real.any(-1)).float().mean() < 0.2, "both kinds of tokens must be met"


@pytest.mark.proves("adamoe")
def test_adamoe_uses_k_e_over_e_plus_m_real_experts_at_random_scores():
    gates = top_k(torch.rand(1, 20000, 8), HERE, k=4, normalise="real", real=4)
    mean = (gates[..., :4] != 0).sum(-1).float().mean()
    assert abs(float(mean) - 4 * 4 / 8) < 0.03


@pytest.mark.proves("adamoe")
def test_adamoe_loss_does_not_tell_null_experts_apart():
    router = router_of("adamoe", experts=4, null=4)
    routing = router(torch.randn(2, 30, 16), HERE)
    value = switch_balance(routing, HERE, null="tied")
    f = routing.selected.float().mean((0, 1)) / 4
    f[4:] = f[4:].mean()
    torch.testing.assert_close(value, 8 * (f * routing.probs.mean((0, 1))).sum())
    # which null expert is chosen does not matter to f
    swapped = routing.choices.clone()
    swapped[..., 4:] = swapped[..., [7, 6, 5, 4]]
    other = Routing(routing.scores, routing.probs, routing.gates, None, swapped)
    torch.testing.assert_close(switch_balance(other, HERE, null="tied"), value)
    assert not torch.allclose(switch_balance(other, HERE), switch_balance(routing, HERE))


# --- DA-MoE -----------------------------------------------------------------------------------------------------------


def importance_by_hand(x, valid):
    """Attention received from the other real tokens, in float64 loops."""
    length, dim = x.shape
    real = [t for t in range(length) if valid[t]]
    received = [0.0] * length
    for q in real:
        others = [t for t in real if t != q]
        if others:
            given = softmax([dot(x[q], x[t]) / math.sqrt(dim) for t in others])
            for t, a in zip(others, given, strict=True):
                received[t] += a / len(real)
    return received


@pytest.mark.proves("da_moe")
def test_da_moe_gives_more_experts_to_tokens_that_are_looked_at():
    x, p = torch.randn(3, 7, 8), some_probs(3, 7)
    valid = torch.ones(3, 7).bool()
    valid[1, 4:], valid[2, 1:] = False, False
    ctx = Context(valid=valid, causal=False)
    got = attention_received(x, valid)
    gates = dynamic_k(p, ctx, max_k=4, hidden=x)
    counts = set()
    for row in range(3):
        received = importance_by_hand(x[row].double(), valid[row].tolist())
        assert got[row].tolist() == pytest.approx(received, abs=1e-6)
        for token in range(7):
            if not valid[row, token]:
                continue
            most = max(received)
            k = max(1, math.ceil(4 * received[token] / most - 1e-4)) if most else 1
            counts.add(k)
            chosen = best(p[row, token].tolist(), k)
            expected = [float(p[row, token, e]) if e in chosen else 0.0 for e in range(8)]
            assert gates[row, token].tolist() == pytest.approx(expected)
    assert len(counts) >= 3
    junk = torch.where(valid[..., None], x, 50 * torch.randn_like(x))
    torch.testing.assert_close(dynamic_k(p, ctx, max_k=4, hidden=junk)[valid], gates[valid])


@pytest.mark.proves("da_moe")
@torch.no_grad()
def test_da_moe_falls_back_to_confidence_where_tokens_look_back_only():
    x, p = torch.randn(3, 7, 8), some_probs(3, 7)
    for ctx in (HERE, TRAINING):
        gates = dynamic_k(p, ctx, max_k=3, p=0.75, hidden=x)
        nucleus = top_p(p, HERE, p=0.75)
        torch.testing.assert_close(gates, torch.where(top_k(p, HERE, k=3) > 0, nucleus, torch.zeros_like(p)))
    assert dynamic_k(p, HERE, max_k=3).ne(dynamic_k(p, Context(causal=False), max_k=3, hidden=x)).any()

    seen = {}
    for build in (tiny_llama, tiny_bert_classifier, tiny_t5):
        model = shaken("da_moe", build())
        contexts = []
        model.base_model.trace.readers.append(lambda site, routing, ctx, c=contexts: c.append((site.stack, ctx.causal)))
        model(**tiny_inputs(model))
        seen[build.__name__] = set(contexts)
    assert seen["tiny_llama"] == {("main", True)} and seen["tiny_bert_classifier"] == {("main", False)}
    assert seen["tiny_t5"] == {("encoder", False), ("cross", False), ("main", True)}


# --- DynaMoE and other thresholds -------------------------------------------------------------------------------------


@pytest.mark.proves("dynamoe")
def test_dynamoe_counts_follow_the_token_where_a_percentile_would_not():
    p = some_probs(rows=20, spread=2.0)
    gates = relative(p, HERE, rho=0.5, max_k=4, normalise="sum1")
    for row, out in zip(p.flatten(0, 1).tolist(), gates.flatten(0, 1).tolist(), strict=True):
        kept = [e for e in best(row, 4) if row[e] >= 0.5 * max(row)]
        assert out == pytest.approx([row[e] / sum(row[i] for i in kept) if e in kept else 0.0 for e in range(8)])
    assert (gates > 0).sum(-1).unique().tolist() == [1, 2, 3, 4]
    percentile = p > p.quantile(0.7, dim=-1, keepdim=True)
    assert percentile.sum(-1).unique().numel() == 1, "a percentile over one token's experts is a constant number"
    assert torch.equal(relative(p, HERE, rho=0.0), p)
    assert torch.equal(relative(p, HERE, rho=1.0) > 0, top_k(p, HERE, k=1) > 0)
    assert (relative(p, HERE, rho=1.0, min_k=3) > 0).sum(-1).eq(3).all()


def test_positive_and_per_expert_thresholds():
    scores = torch.randn(2, 30, 5)
    gates = positive(torch.relu(scores), HERE, scores=scores)
    assert torch.equal(gates, scores.clamp_min(0))
    listed = [0.1, 0.3, 0.5, 0.7, 0.9]
    router = Router(16, 5, link="sigmoid", selector={"name": "per_expert", "threshold": listed}, price="sign")
    router.price.value.copy_(torch.tensor([0.0, 0.1, -0.1, 0.0, 0.2]))
    routing = router(torch.randn(2, 30, 16), HERE)
    limit = torch.tensor(listed) + router.price.value
    assert torch.equal(routing.gates, torch.where(routing.probs > limit, routing.probs, torch.zeros(())))
    with pytest.raises(ConfigError, match=r"one finite threshold, or 4 of them"):
        Router(16, 4, selector={"name": "per_expert", "threshold": listed})
    with pytest.raises(ConfigError, match=r"0 <= min_k <= max_k and max_k >= 1, got min_k=3, max_k=2"):
        relative(scores.softmax(-1), HERE, min_k=3, max_k=2)


# --- LD-MoLE ----------------------------------------------------------------------------------------------------------


def quadratic_program(u, lam):
    """argmin over the simplex of |g - u|^2 - lam |g|^2, by scipy."""
    result = minimize(
        lambda g: ((g - u) ** 2).sum() - lam * (g**2).sum(),
        x0=[1 / len(u)] * len(u),
        jac=lambda g: 2 * (g - u) - 2 * lam * g,
        bounds=[(0, None)] * len(u),
        constraints={"type": "eq", "fun": lambda g: g.sum() - 1, "jac": lambda g: [1.0] * len(g)},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return torch.tensor(result.x)


@pytest.mark.proves("ld_mole")
def test_ld_mole_gates_solve_the_quadratic_program():
    for lam in (-3.0, -0.5, 0.0, 0.6, 0.9):
        u = torch.randn(6, dtype=torch.float64)
        got = sparsegen(u, torch.tensor(lam, dtype=torch.float64))
        torch.testing.assert_close(got, quadratic_program(u.numpy(), lam), atol=1e-6, rtol=0)


@pytest.mark.proves("ld_mole")
def test_ld_mole_closed_forms():
    u = torch.randn(200, 8, dtype=torch.float64)
    lam = torch.rand(200, dtype=torch.float64) * 3 - 2.01
    g = sparsegen(u, lam)
    assert (g >= 0).all() and (g > 0).any(-1).all()
    torch.testing.assert_close(g.sum(-1), torch.ones_like(lam))
    torch.testing.assert_close(sparsegen(u + 7.3, lam), g)  # a common shift changes nothing
    torch.testing.assert_close(sparsegen(u / (1 - lam)[:, None], torch.zeros_like(lam)), g)  # sparsemax(u / (1 - lam))
    flat = sparsegen(u, torch.full_like(lam, -1e9))
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 8), atol=1e-8, rtol=0)
    for k in (1, 2, 5):
        low, high = interval(u, k)
        for share in (0.02, 0.5, 0.98):
            inside = low + share * (high - low)
            assert (sparsegen(u, inside) > 0).sum(-1).eq(k).all()
        assert (sparsegen(u, low - 1e-6) > 0).sum(-1).gt(k).all()
    equal = sparsegen(torch.tensor([1.0, 1.0, 0.0]), torch.tensor(0.9))
    torch.testing.assert_close(equal, torch.tensor([0.5, 0.5, 0.0]))


@pytest.mark.proves("ld_mole")
def test_ld_mole_gradients_are_exact():
    u = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    lam = (torch.rand(7, dtype=torch.float64) - 0.3).requires_grad_()
    assert torch.autograd.gradcheck(sparsegen, (u, lam), eps=1e-7, atol=1e-6)
    for row in range(7):
        jacobian = torch.autograd.functional.jacobian(lambda v, r=row: sparsegen(v, lam[r].detach()), u[row].detach())
        on = (sparsegen(u[row], lam[row]) > 0).double()
        k = on.sum()
        expected = (torch.diag(on) - torch.outer(on, on) / k) / (1 - lam[row].detach())
        torch.testing.assert_close(jacobian, expected)


@pytest.mark.proves("ld_mole")
def test_ld_mole_starts_dense_and_its_own_loss_trains_lambda_alone():
    router = Router(64, 8, selector={"name": "sparsegen", "hidden_size": 256})
    x = torch.randn(4, 10, 64)
    routing = router(x, HERE)
    lam = routing.notes["lambda"]
    assert lam.shape == (4, 10) and (lam <= HIGHEST).all() and abs(float(lam.detach().mean()) + 1.59) < 0.3
    assert (routing.gates > 0).float().mean() > 0.55  # most of the 8
    for row, value, gates in zip(
        routing.scores.flatten(0, 1), lam.flatten(), routing.gates.flatten(0, 1).detach(), strict=True
    ):
        expected = quadratic_program(row.detach().double().numpy(), float(value))
        torch.testing.assert_close(gates.double(), expected, atol=1e-4, rtol=0)
        break
    loss = lambda_sparsity(routing, HERE, k=2)
    ranked = routing.scores.detach().sort(-1, descending=True).values
    low = 1 - (ranked[..., 0] + ranked[..., 1] - 2 * ranked[..., 2])
    torch.testing.assert_close(loss, torch.relu(low - lam).mean())
    loss.backward()
    assert router.scorer.weight.grad is None and router.selector.mlp[0].weight.grad.abs().max() > 0
    # following it leads to at most two experts per token
    optimizer = torch.optim.Adam(router.selector.parameters(), lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        lambda_sparsity(router(x, HERE), HERE, k=2).backward()
        optimizer.step()
    assert (router(x, HERE).gates > 0).sum(-1).float().mean() < 2.2


@pytest.mark.proves("ld_mole")
def test_ld_mole_shares_one_network_per_input_size():
    model = molora.wrap(tiny_llama(), "ld_mole")
    sizes = {}
    for layer in routed_layers(model).values():
        sizes.setdefault(layer.d_in, set()).add(id(layer.molora_router["default"].selector.mlp))
    assert {size: len(found) for size, found in sizes.items()} == {32: 1, 48: 1}
    owned = [name for name in model.state_dict() if "selector.mlp.0.weight" in name]
    assert len(owned) == 2
    apart = molora.wrap(tiny_llama(), "ld_mole", selector={"share": False})
    assert len([name for name in apart.state_dict() if "selector.mlp.0.weight" in name]) == 14


@pytest.mark.proves("ld_mole")
def test_ld_mole_balance_reads_the_gates():
    router = Router(16, 8, selector="sparsegen")
    routing = router(torch.randn(3, 20, 16), HERE)
    f = (routing.gates > 0).float().mean((0, 1))
    expected = 8 * (f / f.sum() * routing.gates.mean((0, 1))).sum()
    torch.testing.assert_close(switch_balance(routing, HERE, of="gates"), expected)
    even = torch.full((1, 4, 8), 1 / 8)
    assert float(switch_balance(Routing(even, even, even), HERE, of="gates")) == pytest.approx(1.0)


# --- SAM --------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("sam_bilevel")
def test_sam_alignment_is_zero_iff_the_best_experts_lie_in_the_group():
    router = router_of("sam_bilevel")
    routing = router(torch.randn(5, 40, 16), HERE)
    aligned = []
    for row in range(5):
        for token in range(40):
            p = routing.probs[row, token].tolist()
            chosen = [e for e in range(8) if routing.gates[row, token, e] > 0]
            outside = [e for e in range(8) if e not in chosen]
            by_hand = sum(max(0.0, p[e] - min(p[c] for c in chosen)) for e in outside)
            one = Routing(
                *(t[row : row + 1, token : token + 1] for t in (routing.scores, routing.probs, routing.gates))
            )
            value = float(align(one, HERE, parts=Parts(router, None)))
            assert value == pytest.approx(by_hand, abs=1e-6)
            aligned.append(set(best(p, 2)) == set(chosen))
            assert (value == 0) is aligned[-1]
    assert 0.1 < sum(aligned) / len(aligned) < 0.9
    whole = align(routing, HERE, parts=Parts(router, None))
    assert whole > 0 and whole.requires_grad


@pytest.mark.proves("sam_bilevel")
def test_sam_alignment_trains_routers_towards_one_group():
    router, x = router_of("sam_bilevel"), torch.randn(2, 60, 16)
    optimizer = torch.optim.Adam(router.parameters(), lr=2e-2)

    def share():
        routing = router(x, HERE)
        top = routing.probs.topk(2, -1).indices // 2
        return float((top[..., 0] == top[..., 1]).float().mean())

    before = share()
    for _ in range(80):
        optimizer.zero_grad()
        align(router(x, HERE), HERE, parts=Parts(router, x)).backward()
        optimizer.step()
    assert share() > before + 0.2


# --- Post-MoE, and labels in general ----------------------------------------------------------------------------------


@pytest.mark.proves("post_moe")
def test_post_moe_puts_the_labelled_expert_in_the_place_of_the_last():
    p = some_probs(3, 11, 6)
    labels = torch.randint(-1, 6, (3, 11))
    ctx = Context(training=True, expert_ids=labels)
    gates = top_k(p, ctx, k=2, normalise="none", pin="last")
    replaced = 0
    for row, label, out in zip(p.flatten(0, 1).tolist(), labels.flatten().tolist(), gates.flatten(0, 1), strict=True):
        chosen = best(row, 2)
        if label >= 0 and label not in chosen:
            chosen, replaced = [chosen[0], label], replaced + 1
        assert out.tolist() == pytest.approx([row[e] if e in chosen else 0.0 for e in range(6)])
    assert replaced > 5
    plain = top_k(p, HERE, k=2, normalise="none")
    assert torch.equal(top_k(p, Context(expert_ids=labels), k=2, normalise="none", pin="last"), plain)  # in use
    assert torch.equal(top_k(p, TRAINING, k=2, normalise="none", pin="last"), plain)  # without labels
    row_wise = top_k(p, Context(training=True, expert_ids=labels[:, :1]), k=2, normalise="none", pin="last")
    same = Context(training=True, expert_ids=labels[:, :1].expand(3, 11))
    assert torch.equal(row_wise, top_k(p, same, k=2, normalise="none", pin="last"))
    with pytest.raises(RoutingError, match="expert id 11 is out of range; there are 6 experts"):
        top_k(p, Context(training=True, expert_ids=0 * labels + 11), k=2, pin="last")


@pytest.mark.proves("post_moe")
def test_post_moe_acts_in_the_last_two_blocks_and_reads_labels_in_training_only():
    model = shaken("post_moe", tiny_llama(num_hidden_layers=4))
    numbers = {}
    for path, layer in routed_layers(model).items():
        numbers.setdefault(int(path.split(".")[2]), set()).add(layer.molora_bank["default"].num_experts)
    assert numbers == {0: {1}, 1: {1}, 2: {12}, 3: {12}}
    inputs = tiny_inputs(model)
    labels = torch.tensor([5, 11])
    with molora.record(model) as log:
        model.train()(**inputs, expert_ids=labels)
    chosen = [routing.selected for routing in log.values() if routing.num_experts == 12]
    assert chosen and all(c[row, :, label].all() for c in chosen for row, label in enumerate(labels.tolist()))
    assert all(c.sum(-1).eq(2).all() for c in chosen)
    model.eval()
    with torch.no_grad():
        told, plain = model(**inputs, expert_ids=labels).logits, model(**inputs).logits
    assert torch.equal(told, plain)


def test_a_hard_pin_gives_the_labelled_expert_alone_with_weight_one():
    """ProMoE's unconditional expert; tokens without a label choose as usual."""
    p, labels = some_probs(2, 6, 5), torch.tensor([[3, -1, 0, -1, -1, 4], [-1, -1, -1, -1, 2, 2]])
    for training in (True, False):
        gates = top_k(p, Context(training=training, expert_ids=labels), k=1, normalise="none", pin="hard")
        pinned = labels >= 0
        one_hot = torch.nn.functional.one_hot(labels.clamp_min(0), 5).float()
        assert torch.equal(gates[pinned], one_hot[pinned])
        assert torch.equal(gates[~pinned], top_k(p, HERE, k=1, normalise="none")[~pinned])


def test_exploration_is_uniform_and_in_training_only():
    p = torch.softmax(torch.tensor([5.0, 0, 0, 0, 0]), -1).expand(1, 20000, 5)
    counts = (top_k(p, TRAINING, k=1, explore=0.5, normalise="none") > 0).float().mean((0, 1))
    expected = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1])
    torch.testing.assert_close(counts, expected, atol=0.02, rtol=0)
    whole = (top_k(p, TRAINING, k=2, explore=1.0) > 0).float().mean((0, 1))
    torch.testing.assert_close(whole, torch.full((5,), 0.4), atol=0.02, rtol=0)
    assert torch.equal(top_k(p, HERE, k=1, explore=0.5), top_k(p, HERE, k=1))
    with pytest.raises(ConfigError, match="0 <= explore <= 1, got 2"):
        top_k(p, HERE, explore=2)


# --- cosine scores, a mixture of routers ------------------------------------------------------------------------------


@pytest.mark.proves("cosine_st_moe")
@torch.no_grad()
def test_cosine_scores_see_angles_in_a_small_space():
    router = router_of("cosine_st_moe")
    scorer, x = router.scorer, torch.randn(2, 6, 16)
    assert scorer.project.shape == (64, 16)
    scorer.log_temperature.fill_(math.log(0.3))
    routing = router(x, HERE)
    P, c = scorer.project.double(), scorer.weight.double()
    for token, out in zip(x.flatten(0, 1).double(), routing.scores.flatten(0, 1), strict=True):
        view = P @ token
        expected = [float(view @ row / (view.norm() * row.norm())) / 0.3 for row in c]
        assert out.tolist() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(router(3.7 * x, HERE).gates, routing.gates)  # z(a x) = z(x)
    scorer.log_temperature.zero_()  # temperature 1
    assert router(50 * torch.randn(40, 50, 16), HERE).probs.max() <= math.e / (math.e + 7 / math.e) + 1e-6


@pytest.mark.proves("mixture_of_routers")
@torch.no_grad()
def test_mixture_of_routers_closed_forms():
    x = torch.randn(3, 8, 16)
    for mode in ("prob", "logit"):
        router = router_of("mixture_of_routers", scorer={"name": "mixture", "routers": 3, "mode": mode})
        scorer, routing = router.scorer, router(x, HERE)
        for token, out in zip(x.flatten(0, 1).double(), routing.probs.flatten(0, 1), strict=True):
            m = softmax([dot(row, token) for row in scorer.main])
            z = [[dot(row, token) for row in sub] for sub in scorer.weight]
            if mode == "prob":
                expected = [sum(m[j] * softmax(z[j])[e] for j in range(3)) for e in range(8)]
            else:
                expected = softmax([sum(m[j] * z[j][e] for j in range(3)) for e in range(8)])
            assert out.tolist() == pytest.approx(expected, abs=1e-5)
        plain = Router(16, 8, selector={"name": "top_k", "k": 2})
        plain.scorer.weight.copy_(scorer.weight[1])
        scorer.main.zero_()
        scorer.weight.copy_(scorer.weight[1:2].expand(3, -1, -1))  # identical sub-routers are one router
        torch.testing.assert_close(router(x, HERE).gates, plain(x, HERE).gates)


@pytest.mark.proves("mixture_of_routers")
@torch.no_grad()
def test_mixture_of_routers_entropy_lies_between_its_parts():
    router, x = router_of("mixture_of_routers"), torch.randn(5, 30, 16)
    scorer = router.scorer
    assert scorer.weight.shape == (4, 8, 16)
    m = torch.softmax(x @ scorer.main.t(), -1)
    parts = torch.softmax(torch.einsum("bsd,med->bsme", x, scorer.weight), -1)

    def entropy(p):
        return -(p * p.clamp_min(1e-30).log()).sum(-1)

    inner = (m * entropy(parts)).sum(-1)
    whole = entropy(router(x, HERE).probs)
    assert (inner <= whole + 1e-5).all() and (whole <= inner + entropy(m) + 1e-5).all()
    # a one-hot main router is that sub-router
    scorer.main.zero_()
    scorer.main[2, 0], x[..., 0] = 1e4, 1.0
    torch.testing.assert_close(router(x, HERE).probs, torch.softmax(x @ scorer.weight[2].t(), -1), atol=1e-5, rtol=1e-4)
    # sub-routers are drawn apart
    fresh = Router(16, 8, scorer="mixture").scorer.weight
    assert all(not torch.allclose(fresh[i], fresh[j]) for i, j in itertools.combinations(range(4), 2))
    assert fresh.abs().max() <= 1 / 4  # each as a linear router on 16 inputs


# --- Router-Tuning ----------------------------------------------------------------------------------------------------


@pytest.mark.proves("router_tuning")
def test_router_tuning_trains_routers_only_through_hard_gates():
    model = stocked(molora.wrap(tiny_llama(), "router_tuning")).train()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("molora_router" in name for name in trained)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = tiny_inputs(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with molora.record(model) as log:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(set(routing.gates.unique().tolist()) <= {0.0, 1.0} for routing in log.values())
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(trained)


@pytest.mark.proves("router_tuning")
def test_router_tuning_gradient_passes_the_threshold_as_it_is():
    router, x = router_of("router_tuning", experts=4), torch.randn(2, 9, 16)
    weights = torch.randn(4)
    routing = router(x, HERE)
    assert torch.equal(routing.gates, (torch.sigmoid(x @ router.scorer.weight.t()) > 0.5).float())
    (got,) = torch.autograd.grad((routing.gates * weights).sum(), router.scorer.weight)
    soft = torch.sigmoid(x @ router.scorer.weight.t())
    (expected,) = torch.autograd.grad((soft * weights).sum(), router.scorer.weight)
    torch.testing.assert_close(got, expected)
    assert not router.sparse, "kernels may not leave out the gradient of gates that are off"


@pytest.mark.proves("router_tuning")
def test_router_tuning_capacity_loss():
    router, x = router_of("router_tuning", experts=4), torch.randn(3, 20, 16)
    valid = torch.rand(3, 20) < 0.6
    ctx = Context(valid=valid)
    routing = router(x, ctx)
    on = float(routing.gates.detach()[valid].mean())
    for target in (0.1, on, 0.9):
        assert float(capacity(routing, ctx, target=target)) == pytest.approx(max(0.0, on - target), abs=1e-6)
    optimizer = torch.optim.Adam(router.parameters(), lr=5e-2)
    for _ in range(60):
        optimizer.zero_grad()
        capacity(router(x, HERE), HERE, target=0.3).backward()
        optimizer.step()
    assert float(router(x, HERE).gates.mean()) < 0.35
