"""The laws, over every registered component and every recipe.

A new component is under these laws from the moment it is registered: with its default options if it has them, else
with those of NEEDED. EXTRA holds further options worth a look.
"""

import copy
import dataclasses
import inspect
import itertools
import pickle

import pytest
import torch
from peft import PeftModel
from torch import nn

import molora
from molora.control import routed_layers
from molora.experts.forms import build_experts, forms
from molora.routing.controllers import controllers
from molora.routing.entropy import entropies
from molora.routing.features import features
from molora.routing.links import links
from molora.routing.losses import Parts, losses
from molora.routing.pools import pools
from molora.routing.price import Price, prices
from molora.routing.router import Router
from molora.routing.router import _component as component
from molora.routing.schedules import build_schedule, schedules
from molora.routing.scorers import scorers
from molora.routing.selectors import selectors
from molora.routing.types import Context, Memory, Routing
from tests.tiny import tiny_inputs, tiny_llama

REGISTRIES = (features, scorers, links, selectors, entropies, losses, controllers, prices, pools, schedules, forms)

NEEDED = {
    ("scorer", "table"): {"num_tasks": 3},
    ("scorer", "hash"): {"vocab_size": 96},  # of the tiny models
    ("scorer", "distilled"): {"vocab_size": 96},
    ("scorer", "multi_gate"): {"num_tasks": 3},
    ("scorer", "glider"): {"gamma": 0.0},  # with another gamma it reads what only callers know (tests/posthoc)
    ("feature", "concat"): {"size": 2},
    ("selector", "task_mask"): {"allowed": [[0, 1], [1, 2], [0, 2, 3]]},
}
EXTRA = {
    ("scorer", "prototypes"): [{"measure": "abs"}, {"measure": "scaled"}, {"measure": "norm"}],
    ("selector", "subtract"): [{"general": [1, 3]}, {"k": 3, "general": [0], "normalise": "none"}],
    ("scorer", "response"): [{"measure": "length"}, {"normalise": False}],
    ("selector", "activated"): [{"k": 2, "threshold": 0.1}, {"threshold": 0.3, "normalise": "sum1"}],
    ("selector", "relaxed_bernoulli"): [{"temperature": 0.5, "normalise": "none"}],
    ("feature", "noise"): [{"kind": "gaussian", "size": 0.5}, {"kind": "dropout", "size": 0.5}],
    ("feature", "gru"): [{"size": 3}],
    ("feature", "similarity"): [{"measure": "dot", "temperature": 1.0}],
    ("scorer", "hyper"): [{"hidden": 3}],
    ("scorer", "xlora"): [{"depth": 3, "width": 4}],
    ("scorer", "fusion"): [{"width": 3, "dropout": 0.1}],
    ("scorer", "noisy"): [{"scorer": {"name": "mlp", "hidden": 4, "activation": "tanh"}, "eps": 0.1}],
    ("selector", "task_mask"): [{"own": [[2], [3], []]}],
    ("pool", "cross_attention"): [{"features": 3, "width": 4}],
    ("pool", "transformer"): [{"layers": 1, "width": 8, "heads": 2}],
    ("scorer", "linear"): [{"bias": True}, {"activation": "rational"}, {"init": 0.02}],
    ("scorer", "cosine"): [{"bottleneck": 3}, {"learn_temperature": True, "temperature": 0.5}],
    ("scorer", "constant"): [{"learn": False}],
    ("link", "softmax"): [{"temperature": 0.3}],
    ("link", "sigmoid"): [{"temperature": 3.0}],
    ("link", "l2_relu"): [{"c": 4.02}],
    ("selector", "softmax"): [{"grad": "straight_through"}],
    ("selector", "top_k"): [
        {"k": 1, "normalise": "none"},
        {"k": 3, "normalise": "sumk"},
        {"k": 2, "weight": "const", "omega": 0.5, "normalise": "none", "grad": "straight_through"},
        {"k": 9, "clamp": True},
        {"k": 2, "grad": "policy"},
        {"k": 2, "scale": 2.5, "pin": "last", "second": "random", "explore": 0.5},
        {"k": 2, "normalise": "real", "pin": "hard"},
    ],
    ("selector", "relative"): [{"rho": 0.2, "max_k": 3, "normalise": "sum1"}],
    ("selector", "per_expert"): [{"min_k": 1, "weight": "const", "grad": "straight_through"}],
    ("selector", "dynamic_k"): [{"by": "confidence", "max_k": 2, "normalise": "sum1"}],
    ("selector", "sparsegen"): [{"bias": 2.0, "share": False}],
    ("scorer", "mixture"): [{"mode": "logit"}, {"routers": 1}],
    ("selector", "top_p"): [{"crossing": "exclude"}, {"p": 0.3, "normalise": "sum1"}, {"p": 1.0}],
    ("selector", "entropy_switch"): [
        {"threshold": 0.5, "crossing": "include"},
        {"entropy": "shannon", "normalise": "sum1"},
        {"entropy": "renyi", "q": 0.5},
    ],
    ("entropy", "tsallis"): [{"q": 0.5}, {"q": 1.0}, {"q": 2.0}],
    ("entropy", "renyi"): [{"q": 0.5}, {"q": 1.0}],
    ("loss", "switch_balance"): [{"load": "gates"}, {"load": "argmax"}, {"scope": "sequence"}, {"null": "tied"}],
    ("loss", "variation"): [{"of": "load"}, {"of": "both", "noise": 0.5, "k": 2}],
    ("loss", "weighted_l1"): [{"balanced": False}, {"k": 2}],
    ("loss", "cardinality"): [{"k": 3.0}],
    ("loss", "rsl"): [{"sign": "spread", "k": 1}],
    ("loss", "locality"): [{"sharpness": 1.0}],
    ("loss", "chunk"): [{"size": 2}],
    ("loss", "match"): [{"kind": "ce"}, {"kind": "kl"}],
    ("loss", "expert_router_coupling"): [{"alpha": 0.5}],
    ("loss", "entropy"): [{"level": "batch"}],
    ("loss", "tsallis"): [{"level": "batch"}, {"q": 2.0}],
    ("scorer", "random"): [{"evaluate": "token"}],
    ("selector", "sinkhorn"): [{"k": 3, "gates": "prob", "normalise": "none"}],
    ("selector", "expert_choice"): [{"capacity": 1.0, "normalise": "sum1"}],
    ("pool", "first_tokens"): [{"tokens": 1}],
    ("price", "sign"): [{"rate": 0.1}],
    ("price", "dual"): [{"steps": 14}],
    ("price", "quantile"): [{"momentum": 0.0}],
}


def cases(registry):
    """(name, options) of every component of a registry that can be built, with readable ids."""
    for name in registry:
        if _missing(registry, name):
            continue  # test_every_component_is_under_the_laws fails for it
        if registry is losses and losses.fact(name, "reads_notes"):
            continue  # it needs what its selector leaves in the decision, and is tested together with it
        needed = NEEDED.get((registry.kind, name), {})
        for extra in ({}, *EXTRA.get((registry.kind, name), [])):
            options = {**needed, **extra}
            label = "-".join([name, *(f"{k}={v}" for k, v in extra.items())])
            yield pytest.param(name, options, id=label)


def _missing(registry, name):
    required = {k for k, p in registry.options(name).items() if p.default is inspect.Parameter.empty}
    if registry is schedules:
        return set()
    return required - set(NEEDED.get((registry.kind, name), {}))


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.kind)
def test_every_component_is_under_the_laws(registry):
    assert list(registry), f"no {registry.kind} is registered"
    for name in registry:
        missing = _missing(registry, name)
        assert not missing, (
            f"{registry.kind} '{name}' needs the options {sorted(missing)}: add them to NEEDED in tests/test_laws.py, "
            f'as in ("{registry.kind}", "{name}"): {{"{min(missing)}": ...}}, so that the laws cover it'
        )
        assert registry.summary(name), f"{registry.kind} '{name}' needs a docstring; its first line is shown to users"
    for kind, name in [*NEEDED, *EXTRA]:
        if kind == registry.kind:
            assert name in registry, f"NEEDED or EXTRA names {kind} '{name}', which is not registered any more"


def test_a_component_without_its_options_here_fails_the_law(monkeypatch):
    def needs_something(probs, ctx, *, secret):
        """Pick."""

    monkeypatch.setitem(selectors._components, "needy", needs_something)
    monkeypatch.setitem(selectors._facts, "needy", {})
    with pytest.raises(AssertionError, match=r"selector 'needy' needs the options \['secret'\]: add them to NEEDED"):
        test_every_component_is_under_the_laws(selectors)


# --- helpers ----------------------------------------------------------------------------------------------------------

B, S, D, E = 3, 6, 8, 5


def shaken(module):
    """Random parameters, so that nothing holds by symmetry; scale and temperatures stay moderate."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def router_of(scorer="linear", link="softmax", selector="softmax", pool=None, price=None, feature=None, form="lora"):
    name = scorer if isinstance(scorer, str) else scorer["name"]
    by_task = scorers.fact(name, "reads") == "task"
    granularity = "task" if by_task else "prompt" if pool else "token"
    router = Router(
        D,
        E,
        scorer=scorer,
        link=link,
        selector=selector,
        granularity=granularity,
        pool=pool or "mean",
        price=price,
        feature=feature,
    )
    router.reads(shaken(build_experts(form, D, D, [2] * E)))
    return shaken(router).eval()


def context(valid=None, prompt=None, rows=B):
    """All that a router may ask for; token ids follow the positions of the S tokens, padding has its own."""
    tokens = S if valid is None else valid.shape[1]
    ids = torch.arange(S).expand(rows, S) + 3 * torch.arange(rows)[:, None]
    if tokens > S:
        ids = torch.full((rows, tokens), 77).masked_scatter(valid, ids)
    return Context(
        valid=valid,
        prompt=prompt,
        task_ids=torch.arange(rows) % 3,
        token_ids=ids,
        extra=torch.arange(2.0 * rows).view(rows, 1, 2),
        memory=Memory(),
    )


def hidden(scale=1.0):
    return scale * torch.randn(B, S, D)


def check_gates(routing, may_be_negative=False):
    for tensor in (routing.scores, routing.probs, routing.gates):
        assert torch.isfinite(tensor).all() and tensor.dtype == torch.float32
        torch.broadcast_to(tensor, (B, S, E))
    assert may_be_negative or ((routing.gates >= 0).all() and (routing.probs >= 0).all())


def spec(name, options):
    return {"name": name, **options}


# --- gates: finite, non-negative, broadcastable; gradients finite -----------------------------------------------------


@pytest.mark.parametrize(("name", "options"), cases(scorers))
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_scorers_give_finite_gates_and_gradients(name, options, scale):
    router, x = router_of(scorer=spec(name, options)), hidden(scale).requires_grad_()
    check_gates(router(x, context()))
    routing = router(x, dataclasses.replace(context(), training=True))  # where all that learns has a part
    check_gates(routing)
    loss = (routing.gates * torch.randn(E)).sum()
    if loss.requires_grad:
        loss.backward()
    beside = tuple(f"scorer.{part}" for part in scorers.fact(name, "beside", ()))  # what gates do not train
    for parameter_name, parameter in router.named_parameters():
        if parameter.requires_grad and not parameter_name.startswith(beside):
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
    assert x.grad is None or torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("name", "options"), cases(selectors))
@pytest.mark.parametrize(("link", "link_options"), cases(links))
def test_selectors_give_finite_gates_and_gradients(name, options, link, link_options):
    negative = selectors.fact(name, "may_be_negative", False) or links.fact(link, "may_be_negative", False)
    for scale in (0.0, 1.0, 1e3):  # ties, ordinary scores, one-hot probs
        router = router_of(link=spec(link, link_options), selector=spec(name, options))
        x = hidden(scale).requires_grad_()
        routing = router(x, context())
        check_gates(routing, negative)
        assert routing.gates.shape == (B, S, E)
        loss = (routing.gates * torch.randn(E)).sum()
        if loss.requires_grad:
            loss.backward()
            assert torch.isfinite(x.grad).all()
            link_too = not selectors.fact(name, "skips_link", False)
            learns = [p for n, p in router.named_parameters() if link_too or not n.startswith("link.")]
            assert all(torch.isfinite(p.grad).all() for p in learns)


@pytest.mark.parametrize(("name", "options"), cases(features))
def test_features_give_finite_gates_and_gradients(name, options):
    router, x = router_of(feature=spec(name, options)), hidden().requires_grad_()
    routing = router(x, context())
    check_gates(routing)
    (routing.gates * torch.randn(E)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in router.parameters() if p.requires_grad)
    assert x.grad is None or torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("name", "options"), cases(pools))
def test_pools_give_finite_gates_and_gradients(name, options):
    router, x = router_of(pool=spec(name, options)), hidden().requires_grad_()
    valid = torch.ones(B, S).bool()
    valid[0, 2:], valid[1] = False, False
    routing = router(x, context(valid=valid))
    check_gates(routing)
    (routing.gates * torch.randn(E)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in router.parameters()) and torch.isfinite(x.grad).all()
    assert x.grad[0, 2:].eq(0).all(), "padding gets a gradient, so it was read"


# --- padding ----------------------------------------------------------------------------------------------------------


def padded(tensor, filler, side):
    return torch.cat([filler, tensor] if side == "left" else [tensor, filler], 1)


def check_padding(router, name):
    x, prompt = hidden(), torch.arange(S).expand(B, S) < 4
    plain = router(x, context(valid=torch.ones(B, S).bool(), prompt=prompt))
    for side, amount in itertools.product(("left", "right"), (1, 4)):
        junk, no = 100 * torch.randn(B, amount, D), torch.zeros(B, amount).bool()
        ctx = context(
            valid=padded(torch.ones(B, S).bool(), no, side),
            prompt=padded(prompt, no if side == "right" else ~no, side),
        )
        routing = router(padded(x, junk, side), ctx)
        gates = routing.gates
        if gates.shape[1] > 1:
            gates = gates[:, amount:] if side == "left" else gates[:, :S]
        torch.testing.assert_close(gates, plain.gates, msg=lambda m, s=side: f"{name} sees padding on the {s}: {m}")
        for loss in losses:
            if "parts" in losses.fact(loss, "given", ()) or losses.fact(loss, "reads_notes"):
                continue  # what they read besides the decision is in their own tests
            options = NEEDED.get(("loss", loss), {})
            plain_ctx = context(valid=torch.ones(B, S).bool(), prompt=prompt)
            torch.testing.assert_close(
                losses.get(loss)(routing, ctx, **options), losses.get(loss)(plain, plain_ctx, **options)
            )


@pytest.mark.parametrize(("name", "options"), cases(scorers))
def test_scorers_do_not_see_padding(name, options):
    check_padding(router_of(scorer=spec(name, options)), name)


@pytest.mark.parametrize(("name", "options"), cases(features))
def test_features_do_not_see_padding(name, options):
    check_padding(router_of(feature=spec(name, options)), name)


@pytest.mark.parametrize(("name", "options"), cases(selectors))
def test_selectors_do_not_see_padding(name, options):
    check_padding(router_of(selector=spec(name, options)), name)


@pytest.mark.parametrize(("name", "options"), cases(pools))
def test_pools_do_not_see_padding(name, options):
    check_padding(router_of(pool=spec(name, options)), name)


def random_routing(requires_grad=False):
    scores = torch.randn(B, S, E, requires_grad=requires_grad)
    probs = torch.softmax(scores, -1)
    mask = torch.zeros_like(probs).scatter(-1, probs.topk(2, -1).indices, 1.0)
    return scores, Routing(scores, probs, probs * mask, notes={"target": torch.rand(B, S, E)})


@pytest.mark.parametrize(("name", "options"), cases(losses))
def test_losses_do_not_see_padding(name, options):
    _, routing = random_routing()
    valid = torch.rand(B, S) < 0.6
    router, x, junk = judged(name), hidden(), 100 * torch.randn(B, S, D)
    plain = loss_at(name, options, routing, loss_context(valid=valid), router, x)
    changed = [
        torch.where(valid[..., None], t, torch.rand(B, S, E)) for t in (routing.scores, routing.probs, routing.gates)
    ]
    x = torch.where(valid[..., None], x, junk)
    notes = {"target": torch.where(valid[..., None], routing.notes["target"], torch.rand(B, S, E))}
    other = loss_at(name, options, Routing(*changed, notes=notes), loss_context(valid=valid), router, x)
    torch.testing.assert_close(other, plain)


# --- losses -----------------------------------------------------------------------------------------------------------


# The router whose decisions a loss with parts is given, where the one of `judged` has not what it reads.
JUDGED = {
    "align": {"selector": {"name": "top_k", "k": 2, "n_group": E, "topk_group": 2}},
    "fusion_value": {"form": "fusion"},
}


def judged(name):
    """The router that a loss is given as a part, or None when it reads the decision alone."""
    if "parts" not in losses.fact(name, "given", ()):
        return None
    router = router_of(**JUDGED.get(name, {"selector": {"name": "top_k", "k": 3}}))
    why_not = losses.fact(name, "why_not", lambda router: None)
    assert why_not(router) is None, f"add a router that loss '{name}' can work with to JUDGED in tests/test_laws.py"
    return router


def loss_context(rows=B, **changes):
    return Context(task_ids=torch.arange(rows) % 2, **changes)


def loss_at(name, options, routing, ctx, router=None, x=None):
    """The loss of a decision, or, for losses with parts, of the decision that `router` takes for `x`."""
    if router is None:
        return losses.get(name)(routing, ctx, **options)
    return losses.get(name)(router(x, ctx), ctx, parts=Parts(router, x), **options)


@pytest.mark.parametrize(("name", "options"), cases(losses))
def test_losses_are_means_over_tokens_blind_to_the_order_of_experts(name, options):
    (_, routing), router, x = random_routing(), judged(name), hidden()
    value = loss_at(name, options, routing, loss_context(), router, x)
    assert value.shape == () and value.dtype == torch.float32

    def check(change, ctx, x):
        tensors = [change(t) for t in (routing.scores, routing.probs, routing.gates)]
        notes = {"target": change(routing.notes["target"])}
        torch.testing.assert_close(loss_at(name, options, Routing(*tensors, notes=notes), ctx, router, x), value)

    reads = losses.fact(name, "reads")
    tasks = loss_context().task_ids
    check(lambda t: t.flip(0), Context(task_ids=tasks.flip(0)), x.flip(0))
    if reads != "neighbours":
        check(lambda t: t.flip(1), loss_context(), x.flip(1))
    if reads != "number":
        check(lambda t: torch.cat([t, t]), Context(task_ids=torch.cat([tasks, tasks])), torch.cat([x, x]))
    order = torch.randperm(E)
    if router is not None:
        router.permute(order)
        router.bank.permute(order)
    check(lambda t: t[..., order], loss_context(), x)


@pytest.mark.parametrize(("name", "options"), cases(losses))
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_losses_have_finite_gradients(name, options, scale):
    scores, router, x = (scale * torch.randn(B, S, E)).requires_grad_(), judged(name), hidden(scale).requires_grad_()
    probs = torch.softmax(scores, -1)
    routing = Routing(scores, probs, probs, notes={"target": torch.rand(B, S, E)})
    value = loss_at(name, options, routing, loss_context(), router, x)
    inputs = [scores] if router is None else [x, *router.parameters(), *router.bank.parameters()]
    grads = torch.autograd.grad(value, inputs, allow_unused=router is not None)
    grads = [grad for grad in grads if grad is not None]
    assert torch.isfinite(value) and grads and all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("name", list(losses))
def test_losses_declare_their_value_at_balance(name):
    declared = losses.fact(name, "at_balance")
    assert callable(declared), f"register loss '{name}' with at_balance=lambda experts: <its value at perfect balance>"
    assert all(isinstance(declared(experts), float) for experts in (2, 8))


# --- the order of experts ---------------------------------------------------------------------------------------------


def check_permutation(router, form="lora"):
    bank = shaken(build_experts(form, D, 7, [1 if form == "rank" else 2] * E))
    x, ctx, order = hidden(), context(), torch.randperm(E)
    before, base = router(x, ctx).gates, torch.randn(B, S, 7)
    y = bank.add_to(base, x, before)
    router.permute(order)
    router.bank.permute(order)  # which some scorers read
    bank.permute(order)
    after = router(x, ctx).gates
    torch.testing.assert_close(after, before[..., order])
    torch.testing.assert_close(bank.add_to(base, x, after), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), cases(scorers))
def test_scorers_treat_experts_alike(name, options):
    check_permutation(router_of(scorer=spec(name, options)))


@pytest.mark.parametrize(("name", "options"), cases(selectors))
@pytest.mark.parametrize("form", list(forms))
def test_selectors_treat_experts_alike(name, options, form):
    check_permutation(router_of(selector=spec(name, options)), form)


@pytest.mark.parametrize(("name", "options"), cases(links))
def test_links_treat_experts_alike_and_keep_their_order(name, options):
    check_permutation(router_of(link=spec(name, options)))
    scores = torch.randn(50, E)
    probs = component(links, spec(name, options), E)(scores, progress=0.0).detach()
    ranked = probs.gather(-1, scores.argsort(-1))
    apart = (ranked[:, 1:] > ranked[:, :-1]) | ((ranked[:, 1:] == 0) & (ranked[:, :-1] == 0))  # relu: all zero below 0
    assert apart.all()


@pytest.mark.parametrize(("name", "options"), cases(prices))
def test_prices_treat_experts_alike(name, options):
    router = router_of(link="sigmoid", selector={"name": "top_k", "k": 2}, price=spec(name, options))
    router.price.value.normal_(std=0.1)
    check_permutation(router)
    probs, order = torch.softmax(torch.randn(B, S, E), -1), torch.randperm(E)
    selected = probs >= probs.topk(2, -1).values[..., -1:]
    moved = []
    for some_probs, chosen in ((probs, selected), (probs[..., order], selected[..., order])):
        price = Price(E, prices.build(spec(name, options)))
        price.observe(chosen, torch.ones(B, S), some_probs)
        price.settle()
        moved.append(price.value)
    torch.testing.assert_close(moved[1], moved[0][order])


@pytest.mark.parametrize(("name", "options"), cases(prices))
def test_prices_push_against_the_load(name, options):
    price = Price(E, prices.build(spec(name, options)))
    probs = torch.softmax(torch.randn(8, 16, E) + torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0]), -1)
    selected = torch.zeros_like(probs).scatter(-1, probs.topk(2, -1).indices, 1.0).bool()
    price.observe(selected, torch.ones(8, 16), probs)
    price.settle()
    moved = price.value.clone()
    assert moved[0] > moved[1] and torch.isfinite(moved).all()
    price.observe(selected, torch.zeros(8, 16), probs)  # padding only
    price.settle()
    assert torch.equal(price.value, moved)
    # padding says nothing, and what is left says the same
    price = Price(E, prices.build(spec(name, options)))
    longer = torch.cat([torch.rand(8, 5, E), probs], 1), torch.cat([torch.rand(8, 5, E) < 0.5, selected], 1)
    price.observe(longer[1], torch.cat([torch.zeros(8, 5), torch.ones(8, 16)], 1), longer[0])
    price.settle()
    torch.testing.assert_close(price.value, moved)


@pytest.mark.parametrize(("name", "options"), cases(entropies))
def test_entropies_are_bounded_and_treat_experts_alike(name, options):
    probs = torch.softmax(3 * torch.randn(50, E), -1)
    value = entropies.get(name)(probs, **options)
    assert value.shape == (50,) and (value > 0).all() and (value < 1).all()
    torch.testing.assert_close(entropies.get(name)(probs[:, torch.randperm(E)], **options), value)
    more = entropies.get(name)(0.5 * probs + 0.5 / E, **options)  # towards uniform
    assert (more > value).all()


@pytest.mark.parametrize("name", list(schedules))
def test_schedules_stay_between_their_ends(name):
    schedule = build_schedule({"schedule": name, "from": 0.2, "to": 0.9, "start": 0.3, "end": 0.6})
    values = [schedule(i / 40) for i in range(41)]
    assert all(0.2 - 1e-9 <= v <= 0.9 + 1e-9 for v in values)
    assert len(set(values[:12])) == 1 and len(set(values[24:])) == 1


# --- causality --------------------------------------------------------------------------------------------------------


def check_causal(router, name):
    x, ctx = hidden(), context()
    later = x.clone()
    later[:, 3:] = torch.randn(B, S - 3, D)
    before, after = router(x, ctx).gates, router(later, ctx).gates
    if before.shape[1] > 1:
        torch.testing.assert_close(after[:, :3], before[:, :3], msg=lambda m: f"{name} sees the future: {m}")
    second = Context(task_ids=ctx.task_ids[1:2], token_ids=ctx.token_ids[1:2], extra=ctx.extra[1:2], memory=Memory())
    alone = router(x[1:2], second).gates
    torch.testing.assert_close(alone, before[1:2], msg=lambda m: f"{name} sees other rows: {m}")


@pytest.mark.parametrize(("name", "options"), cases(scorers))
def test_scorers_do_not_see_the_future_or_other_rows(name, options):
    if not scorers.fact(name, "is_batch_coupled", False):
        check_causal(router_of(scorer=spec(name, options)), name)


@pytest.mark.parametrize(("name", "options"), cases(features))
def test_features_do_not_see_the_future_or_other_rows(name, options):
    check_causal(router_of(feature=spec(name, options)), name)


@pytest.mark.parametrize(("name", "options"), cases(selectors))
def test_selectors_do_not_see_the_future_or_other_rows(name, options):
    # those that look at other tokens (fact is_batch_coupled) do so in training only
    check_causal(router_of(selector=spec(name, options)), name)


@pytest.mark.parametrize(("name", "options"), cases(pools))
def test_pools_do_not_see_the_answer_or_other_rows(name, options):
    router, x = router_of(pool=spec(name, options)), hidden()
    prompt = torch.arange(S).expand(B, S) < torch.tensor([[2], [3], [5]])
    before = router(x, context(prompt=prompt)).gates
    other = torch.where(prompt[..., None], x, torch.randn(B, S, D))
    torch.testing.assert_close(router(other, context(prompt=prompt)).gates, before)
    other = torch.where(prompt[..., None], torch.randn(B, S, D), x)
    assert not torch.allclose(router(other, context(prompt=prompt)).gates, before)
    alone = router(x[1:2], Context(prompt=prompt[1:2])).gates
    torch.testing.assert_close(alone, before[1:2])


# --- copies and files -------------------------------------------------------------------------------------------------


def adapters():
    """(label, changes of a config) for every component that lives in a saved adapter."""
    for registry, field in (
        (features, "feature"),
        (scorers, "scorer"),
        (links, "link"),
        (selectors, "selector"),
        (pools, "pool"),
        (prices, "price"),
    ):
        for case in cases(registry):
            name, options = case.values
            changes = {field: spec(name, options)}
            if registry is scorers and scorers.fact(name, "reads") == "task":
                changes["granularity"] = "task"
            if registry is pools:
                changes["granularity"] = "prompt"
            if registry is prices:
                changes.update(selector={"name": "top_k", "k": 2})
            yield pytest.param(changes, id=f"{field}-{case.id}")
    for form in forms:
        yield pytest.param({"experts": {"form": form, "num": 4, "rank": 1 if form == "rank" else 3}}, id=f"form-{form}")


@pytest.mark.parametrize("changes", adapters())
def test_save_then_load_is_exact(changes, tmp_path):
    changes = {"experts": {"num": 4, "rank": 2, "scaling": 1.0}, "target_modules": ["q_proj", "up_proj"], **changes}
    model = shaken_adapter(molora.wrap(tiny_llama(), {}, **changes))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys() and all(torch.equal(saved[key], found[key]) for key in saved)
    inputs, expected = tiny_inputs(model), None
    for other in (model, loaded, copy.deepcopy(model), pickled(model)):
        with torch.no_grad(), molora.using(other, **told_to_routers(2)):
            logits = other(**inputs).logits
        expected = logits if expected is None else expected
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


def told_to_routers(rows):
    """What callers tell routers that read more than hidden states; the others do not look at it."""
    return {"task_ids": 2 * torch.arange(rows) % 3, "router_extra": torch.arange(2.0 * rows).view(rows, 2)}


def pickled(model):
    """The routers of a model, through pickle and back into it."""
    for layer in routed_layers(model).values():
        for name, router in list(layer.molora_router.items()):
            layer.molora_router[name] = pickle.loads(pickle.dumps(router))
    return model


def shaken_adapter(model):
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("price.value"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.eval()
