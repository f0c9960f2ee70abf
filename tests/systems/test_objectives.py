"""ReMix, THOR, T2MIR, VQMoE, S2MoE and CompeteSMoE against their equations, as plain loops over tokens and experts."""

import copy
import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

import molora
from molora.control import routed_layers, trace_of
from molora.experts.bank import ExpertBank
from molora.routing import policy
from molora.routing.branches import Branches
from molora.routing.competition import Competition, responses
from molora.routing.features import Place
from molora.routing.losses import Parts, losses
from molora.routing.momentum import Momentum, task_contrast
from molora.routing.objectives import symmetric_kl
from molora.routing.router import Router
from molora.routing.types import Context, Memory, Routing
from molora.routing.views import Codebook, NoisyView, commitment, output_contrast
from molora.routing.weighted import WeightedLoss
from tests.needs import config_of
from tests.tiny import tiny_inputs, tiny_llama

D, E = 8, 4


def wrapped(recipe, **changes):
    """A recipe on a tiny Llama, with random experts and routers."""
    model = molora.wrap(tiny_llama(), recipe, **changes)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def first_layer(model):
    return next(iter(routed_layers(model).values()))


def pairs_of(layer):
    """(A, B) of each expert, in float64, with the scale in B."""
    bank = layer.molora_bank["default"]
    return [(A.double(), bank.scaling * B.double()) for A, B in map(bank.pair, range(bank.num_experts))]


def lora(pair, x):
    return pair[1] @ (pair[0] @ x)


def top(values, k):
    return sorted(range(len(values)), key=lambda e: -values[e])[:k]


def check_layer(layer, x, change, ctx=None):
    """Compare a layer on x (B, S, d) with `change(x_token, row, token)` added to the base, token by token."""
    with torch.no_grad():
        y = layer(x)
    weight, largest = layer.base_layer.weight.double(), 0.0
    for row, token in itertools.product(range(x.shape[0]), range(x.shape[1])):
        hidden = x[row, token].double()
        delta = change(hidden, row, token)
        largest = max(largest, float(delta.abs().max()))
        torch.testing.assert_close(y[row, token].double(), weight @ hidden + delta, atol=1e-5, rtol=1e-5)
    assert largest > 0.01


def linear_probs(scorer, x):
    return torch.softmax(scorer.weight.double() @ x, 0)


# --- ReMix ------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("remix")
def test_remix_equals_its_equation():
    model = wrapped("remix")
    layer = first_layer(model)
    experts, scorer = pairs_of(layer), layer.molora_router["default"].scorer
    assert len(experts) == 8 and layer.molora_bank["default"].scaling == 2 / (4 * 8)

    def change(x, row, token):
        return sum(lora(experts[e], x) for e in top(linear_probs(scorer, x).tolist(), 4))

    check_layer(layer, torch.randn(2, 3, 32), change)


@pytest.mark.proves("remix")
def test_remix_with_all_experts_is_one_stacked_lora_without_router_gradient():
    model = wrapped("remix", selector={"k": 8}, target_modules=["up_proj"]).train()
    bank = first_layer(model).molora_bank["default"]
    config = LoraConfig(r=64, lora_alpha=64 * bank.scaling, target_modules=["up_proj"])
    reference = get_peft_model(tiny_llama(), config).eval()
    for name, module in reference.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            A, B = routed_layers(model)[name].molora_bank["default"].stack()
            module.lora_A["default"].weight.data.copy_(A)
            module.lora_B["default"].weight.data.copy_(B)
    inputs = tiny_inputs(model)
    torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits, atol=2e-6, rtol=1e-5)
    molora.objective_loss(model, {**inputs, "labels": inputs["input_ids"]}).backward()
    for layer in routed_layers(model).values():
        assert layer.molora_router["default"].scorer.weight.grad.abs().max() == 0
        assert layer.molora_bank["default"].A.grad.abs().max() > 0


@pytest.mark.proves("remix")
def test_remix_does_not_move_a_router_whose_experts_do_nothing():
    model = molora.wrap(tiny_llama(), "remix").train()
    inputs = tiny_inputs(model)
    molora.objective_loss(model, {**inputs, "labels": inputs["input_ids"]}).backward()
    for layer in routed_layers(model).values():
        assert layer.molora_router["default"].scorer.weight.grad.abs().max() < 1e-7
        assert layer.molora_bank["default"].Bt.grad.abs().max() > 0


@pytest.mark.proves("remix")
def test_the_gradient_of_remix_is_unbiased_in_a_whole_model(monkeypatch):
    """n = 4, k = 2, one layer, one row: all pairs of draws, weighed by their probability, give the gradient of E[L]."""
    changes = {"experts": {"num": 4, "rank": 2, "scaling": 3.0}, "selector": {"k": 2}, "granularity": "prompt"}
    model = molora.wrap(tiny_llama(num_hidden_layers=1), "remix", target_modules=["up_proj"], **changes).train()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spread = 0.2 if "router" in name else 1.0
            parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    trace_of(model).plans["default"].objective.forwards = 2
    inputs = tiny_inputs(model, batch=1, length=4)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :2] = -100
    layer = first_layer(model)
    weight = layer.molora_router["default"].scorer.weight
    seen = {}
    handle = layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach()))
    draws = list(itertools.permutations(range(4), 2))
    with torch.no_grad():
        sets = {frozenset(draw): None for draw in draws}
        for pair in sets:  # what each set costs, with the gates pinned
            gates = torch.tensor([float(e in pair) for e in range(4)])
            with molora.pin(model, gates):
                sets[pair] = model(**inputs).loss.double()
    handle.remove()
    q = torch.softmax(seen["x"][0, :2].double().mean(0) @ weight.double().t(), -1)  # the prompt
    log_q = {(a, b): (q[a] * q[b] / (1 - q[a])).log() for a, b in draws}
    expected = sum(log_q[draw].exp() * sets[frozenset(draw)] for draw in draws)
    (exact,) = torch.autograd.grad(expected, weight, retain_graph=True)
    wanted = []
    monkeypatch.setattr(
        policy,
        "gumbel",
        lambda like, generator=None: 100 * F.one_hot(torch.tensor(wanted.pop(0)), 4).float().cumsum(0)[-1:],
    )

    def forced(first, second):
        """Noise that makes `first` the best and `second` the next."""
        return [first, first, first, second]

    total = torch.zeros_like(weight)
    for one, two in itertools.combinations(
        draws, 2
    ):  # a pair of equal draws says nothing, and both orders say the same
        model.zero_grad()
        wanted[:] = [forced(*one), forced(*two)]
        molora.objective_loss(model, inputs).backward()
        total += 2 * (log_q[one] + log_q[two]).exp().detach().float() * weight.grad
    torch.testing.assert_close(total, exact, atol=2e-6, rtol=1e-3)
    assert exact.abs().max() > 1e-2


# --- THOR -------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("thor")
def test_the_distance_of_thor_is_half_of_both_divergences():
    first, second = torch.randn(2, 50, 7, dtype=torch.float64)
    log_p, log_q = torch.log_softmax(first, -1), torch.log_softmax(second, -1)
    both = F.kl_div(log_q, log_p, log_target=True, reduction="none") + F.kl_div(
        log_p, log_q, log_target=True, reduction="none"
    )
    torch.testing.assert_close(symmetric_kl(first, second).double(), 0.5 * both.sum(-1), atol=1e-5, rtol=1e-5)
    assert symmetric_kl(first, first + 3.0).abs().max() < 1e-6  # p = q
    assert symmetric_kl(first, second).min() > 0


@pytest.mark.proves("thor")
def test_the_loss_of_thor_is_two_tasks_and_the_distance():
    model = wrapped("thor").train()
    inputs = tiny_inputs(model)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][0, :4] = -100
    seen = []
    model.base_model.model.register_forward_hook(lambda _, args, out: seen.append(out))
    loss = molora.objective_loss(model, inputs)
    assert len(seen) == 2 and not torch.equal(seen[0].logits, seen[1].logits)
    expected, counted = seen[0].loss + seen[1].loss, 0
    distance = 0.0
    for row, token in itertools.product(range(2), range(6)):
        if inputs["labels"][row, token + 1] != -100:
            p, q = (torch.softmax(out.logits[row, token], -1) for out in seen)
            distance = distance + 0.5 * ((p - q) * (p.log() - q.log())).sum()
            counted += 1
    assert counted == 9
    torch.testing.assert_close(loss, expected + 5.0 * distance / counted, atol=1e-5, rtol=1e-5)


@pytest.mark.proves("thor")
def test_one_expert_leaves_twice_the_task_to_thor():
    model = wrapped("thor", experts={"num": 1}).train()
    inputs = tiny_inputs(model)
    inputs["labels"] = inputs["input_ids"]
    with pytest.warns(UserWarning, match="objective 'consistency'"):
        once = model(**inputs).loss
    torch.testing.assert_close(molora.objective_loss(model, inputs), 2 * once)


# --- T2MIR ------------------------------------------------------------------------------------------------------------


def clean_probs(net, x, k):
    """Gates of one T2MIR router without noise: softmax over the k best scores."""
    inner, outer = net.inner, net.outer
    hidden = torch.tanh(inner.weight.double() @ x + inner.bias.double())
    z = (outer.weight.double() @ hidden + outer.bias.double()).tolist()
    best = top(z, k)
    total = sum(math.exp(z[e]) for e in best)
    return {e: math.exp(z[e]) / total for e in best}


@pytest.mark.proves("t2mir")
def test_t2mir_equals_its_equation():
    layer = first_layer(wrapped("t2mir"))
    experts, router = pairs_of(layer), layer.molora_router["default"]
    x = torch.randn(2, 4, 32)
    token_net, task_net = router.branches[0].scorer.clean, router.branches[1].scorer.inner.clean

    def change(hidden, row, token):
        gates = clean_probs(token_net, hidden, 2)
        for e, gate in clean_probs(task_net, x[row].double().mean(0), 2).items():
            gates[e] = gates.get(e, 0.0) + gate
        return sum(gate * lora(experts[e], hidden) for e, gate in gates.items())

    check_layer(layer, x, change)


@pytest.mark.proves("t2mir")
def test_the_task_router_of_t2mir_reads_the_prompt_alone():
    model = wrapped("t2mir")
    ids = tiny_inputs(model)["input_ids"]
    labels, gates = ids.clone(), []
    labels[:, :3] = -100
    for other in (ids, torch.cat([ids[:, :3], ids[:, 3:].flip(1)], 1)):
        with molora.record(model) as log, torch.no_grad():
            model(input_ids=other, labels=torch.where(labels == -100, labels, other))
        gates.append([routing.branches[1].gates for routing in log.values()])
    for one, two in zip(*gates, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.proves("t2mir")
def test_the_noise_of_t2mir_and_its_load_follow_the_noisy_score():
    """CV^2 of the smooth load, `Phi((clean - threshold) / sigma)`, with the threshold of the *noisy* others."""
    model = wrapped("t2mir")
    router = first_layer(model).molora_router["default"]
    x = torch.randn(2, 6, 32)
    routing = router(x, Context(training=True)).branches[0]
    clean, sigma, noisy = routing.notes["clean"], routing.notes["noise"], routing.scores
    torch.testing.assert_close(sigma, F.softplus(x @ router.branches[0].scorer.size.t()) + 0.01)
    load = [0.0] * 8
    for row, token in itertools.product(range(2), range(6)):
        for e in range(8):
            others = sorted((float(noisy[row, token, j]) for j in range(8) if j != e), reverse=True)
            z = (float(clean[row, token, e]) - others[1]) / float(sigma[row, token, e])
            load[e] += 0.5 * (1 + math.erf(z / 2**0.5)) / 12
    mean = sum(load) / 8
    expected = sum((value - mean) ** 2 for value in load) / 8 / mean**2
    found = WeightedLoss({"name": "variation", "of": "load", "weight": 1.0})(routing, Context(), 1)
    assert abs(found.item() - expected) < 1e-4 * max(1.0, expected)


def contrast(query, key, compare, tasks=None):
    """The loss on rows of scores (B, E), with a slow copy that says `key`."""
    router = Router(D, E, scorer="momentum", granularity="prompt")
    router.scorer.compare.data = compare
    routing = Routing(query[:, None], query[:, None], query[:, None], notes={"key": key[:, None]})
    ctx = Context(task_ids=tasks)
    return task_contrast(routing, ctx, parts=Parts(router, torch.zeros(len(query), 3, D)))


@pytest.mark.proves("t2mir")
def test_the_task_contrast_of_t2mir_in_closed_form():
    query, key, compare = torch.randn(6, E), torch.randn(6, E), torch.randn(E, E)
    chance = contrast(query, key, torch.zeros(E, E))
    torch.testing.assert_close(chance, torch.tensor(math.log(3)))  # ln(B / 2)
    total = 0.0
    for own, other in ((0, 3), (3, 0)):
        for i in range(3):
            logits = [float(query[own + i] @ compare @ key[other + j]) for j in range(3)]
            total -= logits[i] - math.log(sum(math.exp(v) for v in logits))
    torch.testing.assert_close(contrast(query, key, compare), torch.tensor(total / 6))
    # with tasks: a pair of two tasks does not count, another row of the task is no negative
    found = contrast(query, key, compare, torch.tensor([0, 0, 1, 0, 0, 2]))
    logits = [float(query[i] @ compare @ key[3 + j]) for i in range(2) for j in (i, 2)]
    back = [float(query[3 + i] @ compare @ key[j]) for i in range(2) for j in (i, 2)]
    each = [math.log(1 + math.exp(v[2 * i + 1] - v[2 * i])) for v in (logits, back) for i in range(2)]
    torch.testing.assert_close(found, torch.tensor(sum(each) / 4))
    assert contrast(query[:5], key[:5], compare) == 0  # an odd batch has no halves


@pytest.mark.proves("t2mir")
def test_the_slow_copy_of_t2mir_moves_once_per_step():
    scorer = Momentum(D, E, scorer="linear", rate=0.25)
    x, start = torch.randn(2, 1, D), scorer.slow.weight.clone()
    scorer.inner.weight.data += 1.0
    for _ in range(3):  # micro-batches, or the recompute of a checkpoint
        notes = {}
        scorer(x, Context(training=True), notes=notes)
        torch.testing.assert_close(notes["key"], x @ start.t())
    scorer.settle()
    torch.testing.assert_close(scorer.slow.weight, start + 0.25)
    scorer.settle()
    scorer(x, Context(), notes={})
    scorer.settle()
    torch.testing.assert_close(scorer.slow.weight, start + 0.25)
    scorer.requires_grad_(True)
    scorer.freeze()
    assert not scorer.slow.weight.requires_grad and scorer.inner.weight.requires_grad


# --- VQMoE ------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("vqmoe")
def test_vqmoe_equals_its_equation():
    layer = first_layer(wrapped("vqmoe"))
    experts, router = pairs_of(layer), layer.molora_router["default"]
    book = router.branches[1].scorer
    assert book.weight.shape == (512, 32)

    def change(x, row, token):
        p = linear_probs(router.branches[0].scorer, x).tolist()
        best = top(p, 2)
        mix = torch.softmax(router.weigh.weight.double() @ x, 0)
        first = sum(p[e] / sum(p[b] for b in best) * lora(experts[e], x) for e in best)
        codes = book.weight.double()
        nearest = min(range(512), key=lambda j: float(((x - codes[j]) ** 2).sum()))
        pulled = x + 0.05 * (codes[nearest] - x)
        h = F.layer_norm(pulled, (32,), book.norm.weight.double(), book.norm.bias.double())
        return mix[0] * first + mix[1] * lora(experts[nearest % 8], h)

    check_layer(layer, torch.randn(2, 4, 32), change)


def coded(x, codes=12):
    """A codebook's scores, notes and router for x."""
    book, notes = Codebook(D, E, codes=codes), {}
    return book, notes, book(x, Context(), x=x, notes=notes)


@pytest.mark.proves("vqmoe")
def test_a_state_on_a_code_costs_nothing_and_keeps_its_code_under_small_noise():
    book = Codebook(D, E, codes=12)
    which = torch.randint(0, 12, (2, 5))
    x, router = book.weight.detach()[which], Router(D, E, scorer={"name": "codebook", "codes": 12})
    apart = torch.cdist(book.weight, book.weight).fill_diagonal_(torch.inf).min()
    noise = torch.randn(2, 5, D)
    noise *= 0.49 * apart / noise.norm(dim=-1, keepdim=True)
    for states in (x, x + noise):
        notes = {}
        scores = book(states, Context(), x=states, notes=notes)
        assert torch.equal(scores.argmax(-1), which % E)
        torch.testing.assert_close(notes["code"], x)
    routing = Routing(scores, scores, scores, notes={"code": x})
    assert commitment(routing, Context(), parts=Parts(router, x)) == 0


@pytest.mark.proves("vqmoe")
def test_the_commitment_of_vqmoe_and_its_gradients():
    x = torch.randn(2, 3, D, requires_grad=True)
    book, notes, scores = coded(x)
    routing = Routing(scores, scores, scores, notes=notes)
    ctx = Context(valid=torch.tensor([[True, True, False], [True, True, True]]))
    loss = commitment(routing, ctx, beta=0.25, parts=Parts(Router(D, E), x))
    code, real = notes["code"].detach(), ctx.valid.float()[..., None]
    torch.testing.assert_close(loss, 1.25 * (((x - code) ** 2).mean(-1) * real[..., 0]).sum() / 5)
    dx, dv = torch.autograd.grad(loss, (x, notes["code"]), retain_graph=True)
    torch.testing.assert_close(dv, 2 * (code - x) * real / D / 5)
    torch.testing.assert_close(dx, 0.25 * 2 * (x - code) * real / D / 5)
    # straight-through: the view passes the gradient of x on as if it were x, and none to the codes
    weight = torch.randn(2, 3, D)
    (through,) = torch.autograd.grad((notes["view"] * weight).sum(), x, retain_graph=True)
    y = (x + 0.05 * (code - x)).detach().requires_grad_()
    (plain,) = torch.autograd.grad((book.norm(y) * weight).sum(), y)
    torch.testing.assert_close(through, plain)
    assert torch.autograd.grad(notes["view"].sum(), book.weight, allow_unused=True) == (None,)


# --- S2MoE ------------------------------------------------------------------------------------------------------------


def top_two(scorer, experts, x, read=None):
    p = linear_probs(scorer, x if read is None else read).tolist()
    best = top(p, 2)
    return sum(p[e] / sum(p[b] for b in best) * lora(experts[e], x) for e in best)


@pytest.mark.proves("s2moe")
def test_s2moe_in_evaluation_is_its_sparse_mixture():
    layer = first_layer(wrapped("s2moe"))
    experts, scorer = pairs_of(layer), layer.molora_router["default"].branches[0].scorer
    check_layer(layer, torch.randn(2, 4, 32), lambda x, row, token: top_two(scorer, experts, x))


@pytest.mark.proves("s2moe")
def test_s2moe_in_training_mixes_both_views():
    layer = first_layer(wrapped("s2moe"))
    experts, router, x = pairs_of(layer), layer.molora_router["default"], torch.randn(2, 4, 32)
    router.branches[1].scorer.variance.fill_(4.0)
    memory = Memory()
    memory.seed = 3
    ctx = Context(training=True, memory=memory)
    with torch.no_grad():
        routing, bank = router(x, ctx), layer.molora_bank["default"]
        (none, gates), (view, others) = routing.passes
        y = bank(x, gates) + bank(view, others)
        again = router(x, ctx).passes[1][0]
    assert none is None and torch.equal(view, again), "the recompute of a checkpoint must draw the same noise"
    for row, token in itertools.product(range(2), range(4)):
        hidden, noisy = x[row, token].double(), view[row, token].double()
        gamma = torch.sigmoid(router.weigh.weight.double() @ hidden + router.weigh.bias.double())
        scorer = router.branches[0].scorer
        expected = gamma * top_two(scorer, experts, hidden) + (1 - gamma) * top_two(scorer, experts, noisy)
        torch.testing.assert_close(y[row, token].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.proves("s2moe")
def test_the_noise_of_s2moe_follows_averages_of_earlier_steps():
    scorer, x = NoisyView(D, E, size=0.5, momentum=0.9), 3 * torch.randn(4, 50, D) + 1
    valid = torch.rand(4, 50) < 0.7
    ctx, seen = Context(training=True, valid=valid), {}
    scorer(x, ctx, x=x, notes=seen, generator=None)
    one = (seen["view"] / x - 1).flatten()  # no statistics yet: only the factor is noisy
    assert abs(one.std().item() - 0.5) < 0.05 and abs(one.mean().item()) < 0.05 and scorer.variance.eq(0).all()
    scorer.settle()
    real = x[valid]
    torch.testing.assert_close(scorer.mean, real.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scorer.variance, real.var(0, unbiased=False), atol=1e-4, rtol=1e-4)
    zero = torch.zeros(4, 50, D)
    scorer(zero, ctx, x=zero, notes=seen, generator=None)  # of x = 0 only the second noise is left
    torch.testing.assert_close(seen["view"].flatten(0, 1).std(0), 0.5 * scorer.variance.sqrt(), atol=0.3, rtol=0.1)
    for _ in range(2):
        scorer.settle()
    assert scorer.steps == 2  # the third call had nothing to move by
    torch.testing.assert_close(scorer.mean, real.mean(0) / 2, atol=1e-5, rtol=1e-4)
    notes = {}
    torch.testing.assert_close(scorer(x, Context(), x=x, notes=notes, generator=None), scorer.inner(x, Context()))
    assert not notes and scorer.seen is None, "evaluation is the mean of the view, x, and counts nothing"


@pytest.mark.proves("s2moe")
def test_the_contrast_of_s2moe_in_closed_form():
    router = Branches(D, E, branches=[{"scorer": "linear"}, {"scorer": "noisy_view", "like": 0}], mix="gate")
    bank = ExpertBank(D, 6, [2] * E)
    router.reads(bank)
    x, ctx = torch.randn(2, 5, D), Context(training=True, valid=torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    parts = Parts(router, x)
    # experts that give nothing cannot be told apart: chance, over 5 and 3 tokens
    at_chance = output_contrast(router(x, ctx), ctx, parts=parts)
    torch.testing.assert_close(at_chance, torch.tensor((5 * math.log(5) + 3 * math.log(3)) / 8))
    nn.init.normal_(bank.Bt)
    routing = router(x, ctx)
    found = output_contrast(routing, ctx, temperature=0.5, parts=parts)
    one, two = (bank(x if view is None else view, gates).double() for view, gates in routing.passes)
    total = 0.0
    for row, tokens in ((0, 5), (1, 3)):
        for left, right in ((one, two), (two, one)):
            for i in range(tokens):
                logits = [float(F.cosine_similarity(left[row, i], right[row, j], dim=0)) / 0.5 for j in range(tokens)]
                total += math.log(sum(math.exp(v) for v in logits)) - logits[i]
    torch.testing.assert_close(found.double(), torch.tensor(total / 16, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    assert output_contrast(router(x, Context()), Context(), parts=parts) == 0


# --- CompeteSMoE ------------------------------------------------------------------------------------------------------


def competing(**options):
    """A router of CompeteSMoE that always competes, and its experts."""
    options = {"scorer": "linear", "rate": 1.0, "warmup": 0.0} | options
    router = Router(D, E, scorer={"name": "competition", **options}, selector={"name": "top_k", "k": 2})
    bank = ExpertBank(D, 6, [2] * E, scaling=1.5)
    nn.init.normal_(bank.Bt)
    router.reads(bank)
    return router, bank


@pytest.mark.proves("compete_smoe")
def test_compete_smoe_equals_its_equation_outside_of_competition():
    layer = first_layer(wrapped("compete_smoe"))
    experts, scorer = pairs_of(layer), layer.molora_router["default"].scorer.inner
    check_layer(layer, torch.randn(2, 4, 32), lambda x, row, token: top_two(scorer, experts, x))


@pytest.mark.proves("compete_smoe")
@pytest.mark.parametrize("kind", ["softplus", "norm", "rank"])
def test_on_a_competing_step_the_best_responses_act(kind):
    router, bank = competing(response=kind)
    x = torch.randn(2, 3, D)
    routing = router(x, Context(training=True))
    for row, token in itertools.product(range(2), range(3)):
        a = []
        for e in range(E):
            A, B = bank.pair(e)
            out = 1.5 * (B @ (A @ x[row, token]))
            a.append({"softplus": F.softplus(out).mean(), "norm": out.norm(), "rank": (A @ x[row, token]).norm()}[kind])
        best = top([float(v) for v in a], 2)
        expected = torch.zeros(E)
        for e in best:
            expected[e] = a[e] / sum(a[b] for b in best)
        torch.testing.assert_close(routing.gates[row, token], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            routing.notes["target"][row, token], torch.softmax(torch.stack(a), 0), atol=1e-5, rtol=1e-4
        )
    # experts of uneven ranks, and with one A for all, respond by the same rule
    for uneven in (ExpertBank(D, 6, [1, 3, 2]), ExpertBank(D, 6, [2, 2, 2], form="shared_a")):
        nn.init.normal_(uneven.Bt)
        found = responses(uneven, x, kind, 3)
        A, B = uneven.pair(2)
        out = uneven.scaling * (B @ (A @ x[1, 1]))
        last = {"softplus": F.softplus(out).mean(), "norm": out.norm(), "rank": (A @ x[1, 1]).norm()}[kind]
        torch.testing.assert_close(found[1, 1, 2], last)


@pytest.mark.proves("compete_smoe")
def test_the_router_of_compete_smoe_learns_what_won():
    router, bank = competing()
    x, weight = torch.randn(2, 3, D), router.scorer.inner.weight
    routing = router(x, Context(training=True))
    loss = losses.get("match")(routing, Context(), kind="mse")
    own = torch.softmax(x @ weight.t(), -1)
    a = responses(bank, x, "softplus", E)
    torch.testing.assert_close(loss, ((own - torch.softmax(a, -1)) ** 2).mean())
    grads = torch.autograd.grad(loss, (weight, bank.Bt, bank.A), allow_unused=True, retain_graph=True)
    assert grads[0].abs().max() > 0 and grads[1] is None and grads[2] is None, "the target gets no gradient"
    # the gates of this step come from the experts, and train them, not the router
    grads = torch.autograd.grad(routing.gates.square().sum(), (weight, bank.Bt), allow_unused=True)
    assert grads[0] is None and grads[1].abs().max() > 0


@pytest.mark.proves("compete_smoe")
def test_losses_of_compete_smoe_are_those_of_the_kind_of_step():
    found = {}
    for rate in (0.0, 1.0):
        router, _ = competing(rate=rate)
        x = torch.randn(2, 3, D)
        routing = router(x, Context(training=True))
        for spec in config_of("compete_smoe").losses:
            value = WeightedLoss(spec)(routing, Context(), 1, Parts(router, x)) / spec["weight"]
            found[spec["name"], rate] = value.item()
    assert found["match", 0.0] == found["diversity", 0.0] == found["router_z", 1.0] == 0
    assert all(found[key] != 0 for key in found if key not in {("match", 0.0), ("diversity", 0.0), ("router_z", 1.0)})


@pytest.mark.proves("compete_smoe")
def test_layers_compete_as_often_as_asked_and_never_more_at_once():
    def layers(count=20, **options):
        return [Competition(D, E, place=Place("", index=i, count=count), **options) for i in range(count)]

    def steps(scorers, number):
        for step in range(number):
            for scorer in scorers:
                scorer.steps.fill_(step)
            yield [scorer.competes(0.5) for scorer in scorers]

    few = torch.tensor(list(steps(layers(rate=0.07), 150))).float()
    assert few.sum(1).max() == 2 and few.sum(0).min() > 0
    free = torch.tensor(list(steps(layers(rate=0.07, at_most=20), 150))).float()
    assert abs(free.mean().item() - 0.07) < 4 * math.sqrt(0.07 * 0.93 / 3000)
    assert not any(scorer.competes(0.049) for scorer in layers(rate=1.0))  # 5 % of warm-up
    other = torch.tensor(list(steps(layers(rate=0.07, seed=1), 150))).float()
    assert not torch.equal(few, other)


@pytest.mark.proves("compete_smoe")
def test_a_step_is_counted_once_and_evaluation_never_competes():
    router, _ = competing()
    x = torch.randn(2, 3, D)
    for _ in range(3):
        router(x, Context(training=True))
    router.scorer.settle()
    router.scorer.settle()
    assert router.scorer.steps == 1
    plain = router(x, Context())
    torch.testing.assert_close(plain.probs, torch.softmax(x @ router.scorer.inner.weight.t(), -1))
    assert plain.notes is None
    model = wrapped("compete_smoe", scorer={"rate": 1.0}).train()
    molora.set_progress(model, 0.5)
    noted = []
    with molora.record(model) as log:
        model(**tiny_inputs(model))
        noted = [routing.notes for routing in log.values()]
    assert sum("target" in notes for notes in noted) == 2 and sum("quiet" in notes for notes in noted) == 12
    molora.settle(copy.deepcopy(model))
    assert all(layer.molora_router["default"].scorer.steps == 0 for layer in routed_layers(model).values())
    molora.settle(model)
    assert all(layer.molora_router["default"].scorer.steps == 1 for layer in routed_layers(model).values())


@pytest.mark.proves("compete_smoe")
def test_fresh_experts_respond_alike():
    """F2: with B = 0 every response is ln 2, so that competition before the warm-up would teach nothing."""
    router, bank = competing()
    nn.init.zeros_(bank.Bt)
    a = responses(bank, torch.randn(2, 3, D), "softplus", E)
    torch.testing.assert_close(a, torch.full((2, 3, E), math.log(2)))
    assert responses(bank, torch.randn(2, 3, D), "norm", E).max() < 1e-15
    assert responses(bank, torch.randn(2, 3, D), "rank", E).min() > 0
    torch.testing.assert_close(
        router(torch.randn(1, 2, D), Context(training=True)).notes["target"], torch.full((1, 2, E), 0.25)
    )
