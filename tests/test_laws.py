"""The laws, over every registered component and every recipe.

A new component is under these laws from the moment it is registered: with its default options if it has them, else
with those of NEEDED. EXTRA holds further options worth a look.
"""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import molora
from molora.control import routed_layers
from molora.experts.bank import FORMS, ExpertBank
from molora.routing.entropy import entropies
from molora.routing.features import features
from molora.routing.links import links
from molora.routing.losses import losses
from molora.routing.price import prices
from molora.routing.router import Router, pools
from molora.routing.schedules import build_schedule, schedules
from molora.routing.scorers import scorers
from molora.routing.selectors import selectors
from molora.routing.types import Context, Memory, Routing
from tests.tiny import tiny_inputs, tiny_llama, tiny_t5

REGISTRIES = (features, scorers, links, selectors, entropies, losses, prices, pools, schedules)

NEEDED = {("scorer", "table"): {"num_tasks": 3}}
EXTRA = {
    ("scorer", "linear"): [{"bias": True}, {"activation": "rational"}, {"init": 0.02}],
    ("scorer", "cosine"): [{"bottleneck": 3}, {"learn_temperature": True, "temperature": 0.5}],
    ("scorer", "constant"): [{"learn": False}],
    ("link", "softmax"): [{"temperature": 0.3}],
    ("link", "sigmoid"): [{"temperature": 3.0}],
    ("selector", "softmax"): [{"grad": "straight_through"}],
    ("selector", "top_k"): [
        {"k": 1, "normalise": "none"},
        {"k": 3, "normalise": "sumk"},
        {"k": 2, "weight": "const", "omega": 0.5, "normalise": "none", "grad": "straight_through"},
        {"k": 9, "clamp": True},
        {"k": 2, "grad": "policy"},
    ],
    ("selector", "top_p"): [{"crossing": "exclude"}, {"p": 0.3, "normalise": "sum1"}, {"p": 1.0}],
    ("selector", "entropy_switch"): [
        {"threshold": 0.5, "crossing": "include"},
        {"entropy": "shannon", "normalise": "sum1"},
        {"entropy": "renyi", "q": 0.5},
    ],
    ("entropy", "tsallis"): [{"q": 0.5}, {"q": 1.0}, {"q": 2.0}],
    ("entropy", "renyi"): [{"q": 0.5}, {"q": 1.0}],
    ("loss", "switch_balance"): [{"load": "gates"}, {"load": "argmax"}],
    ("loss", "entropy"): [{"level": "batch"}],
    ("loss", "tsallis"): [{"level": "batch"}, {"q": 2.0}],
    ("price", "sign"): [{"rate": 0.1}],
}


def cases(registry):
    """(name, options) of every component of a registry that can be built, with readable ids."""
    for name in registry:
        if _missing(registry, name):
            continue  # test_every_component_is_under_the_laws fails for it
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


def router_of(scorer="linear", link="softmax", selector="softmax", pool=None, price=None, feature=None):
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
    router.reads(shaken(ExpertBank(D, D, [2] * E)))
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
    routing = router(x, context())
    check_gates(routing)
    loss = (routing.gates * torch.randn(E)).sum()
    if loss.requires_grad:
        loss.backward()
    for parameter in router.parameters():
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
            assert all(torch.isfinite(p.grad).all() for p in router.parameters())


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
            if "parts" in losses.fact(loss, "given", ()):
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
    if not selectors.fact(name, "is_batch_coupled", False):
        check_padding(router_of(selector=spec(name, options)), name)


@pytest.mark.parametrize(("name", "options"), cases(pools))
def test_pools_do_not_see_padding(name, options):
    check_padding(router_of(pool=spec(name, options)), name)


def random_routing(requires_grad=False):
    scores = torch.randn(B, S, E, requires_grad=requires_grad)
    probs = torch.softmax(scores, -1)
    mask = torch.zeros_like(probs).scatter(-1, probs.topk(2, -1).indices, 1.0)
    return scores, Routing(scores, probs, probs * mask)


@pytest.mark.parametrize(("name", "options"), cases(losses))
def test_losses_do_not_see_padding(name, options):
    _, routing = random_routing()
    valid = torch.rand(B, S) < 0.6
    plain = losses.get(name)(routing, Context(valid=valid), **options)
    junk = [
        torch.where(valid[..., None], t, torch.rand(B, S, E)) for t in (routing.scores, routing.probs, routing.gates)
    ]
    torch.testing.assert_close(losses.get(name)(Routing(*junk), Context(valid=valid), **options), plain)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), cases(losses))
def test_losses_are_means_over_tokens_blind_to_the_order_of_experts(name, options):
    _, routing = random_routing()
    value = losses.get(name)(routing, Context(), **options)
    assert value.shape == () and value.dtype == torch.float32
    order = torch.randperm(E)
    parts = (routing.scores, routing.probs, routing.gates)
    for changed in (
        [t[..., order] for t in parts],
        [t.flip(0).flip(1) for t in parts],
        [torch.cat([t, t]) for t in parts],
    ):
        torch.testing.assert_close(losses.get(name)(Routing(*changed), Context(), **options), value)


@pytest.mark.parametrize(("name", "options"), cases(losses))
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_losses_have_finite_gradients(name, options, scale):
    scores = (scale * torch.randn(B, S, E)).requires_grad_()
    probs = torch.softmax(scores, -1)
    value = losses.get(name)(Routing(scores, probs, probs), Context(), **options)
    (grad,) = torch.autograd.grad(value, scores)
    assert torch.isfinite(value) and torch.isfinite(grad).all()


@pytest.mark.parametrize("name", list(losses))
def test_losses_declare_their_value_at_balance(name):
    declared = losses.fact(name, "at_balance")
    assert callable(declared), f"register loss '{name}' with at_balance=lambda experts: <its value at perfect balance>"
    assert all(isinstance(declared(experts), float) for experts in (2, 8))


# --- the order of experts ---------------------------------------------------------------------------------------------


def check_permutation(router, form="lora"):
    bank = shaken(ExpertBank(D, 7, [1 if form == "rank" else 2] * E, form=form))
    x, ctx, order = hidden(), context(), torch.randperm(E)
    before = router(x, ctx).gates
    y = bank(x, before)
    router.permute(order)
    bank.permute(order)
    after = router(x, ctx).gates
    torch.testing.assert_close(after, before[..., order])
    torch.testing.assert_close(bank(x, after), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), cases(scorers))
def test_scorers_treat_experts_alike(name, options):
    check_permutation(router_of(scorer=spec(name, options)))


@pytest.mark.parametrize(("name", "options"), cases(selectors))
@pytest.mark.parametrize("form", FORMS)
def test_selectors_treat_experts_alike(name, options, form):
    check_permutation(router_of(selector=spec(name, options)), form)


@pytest.mark.parametrize(("name", "options"), cases(links))
def test_links_treat_experts_alike_and_keep_their_order(name, options):
    check_permutation(router_of(link=spec(name, options)))
    scores = torch.randn(50, E)
    probs = links.get(name)(scores, **options)
    assert torch.equal(probs.argsort(-1), scores.argsort(-1))


@pytest.mark.parametrize(("name", "options"), cases(prices))
def test_prices_treat_experts_alike(name, options):
    router = router_of(link="sigmoid", selector={"name": "top_k", "k": 2}, price=spec(name, options))
    router.price.value.normal_(std=0.1)
    check_permutation(router)
    price, chosen, order = torch.randn(E), torch.randint(0, 9, (E,)).float(), torch.randperm(E)
    rule = prices.build(spec(name, options))
    torch.testing.assert_close(rule(price[order], chosen[order]), rule(price, chosen)[order])


@pytest.mark.parametrize(("name", "options"), cases(prices))
def test_prices_push_against_the_load(name, options):
    rule = prices.build(spec(name, options))
    chosen = torch.tensor([9.0, 1.0, 5.0, 5.0, 5.0])
    moved = rule(torch.zeros(E), chosen)
    assert moved[0] > moved[2] > moved[1] and torch.isfinite(moved).all()
    assert torch.isfinite(rule(torch.zeros(E), torch.zeros(E))).all()


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
    if not selectors.fact(name, "is_batch_coupled", False):
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
    for form in FORMS:
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


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", molora.recipes())
def test_a_fresh_recipe_is_the_identity(recipe):
    model = molora.wrap(tiny_llama(), recipe)
    inputs, base = tiny_inputs(model), tiny_llama()
    for mode in (model.train, model.eval):
        mode()
        for layer in routed_layers(model).values():
            x = torch.randn(2, 3, layer.d_in)
            bank = layer.molora_bank["default"]
            assert bank(x, torch.rand(2, 3, bank.num_experts)).eq(0).all()
        torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits, atol=1e-6, rtol=1e-6)


ONE_EXPERT = {  # what makes the experts of a layer one, where `num: 1` alone does not
    "milora": {"target_modules": ["q_proj"]},  # one layer per block
    "smora": {"selector": {"k": 1}, "experts": {"num": 1, "rank": 1}},
    "mola": {"selector": {"clamp": True}, "experts": {"num": 1}},
}


@pytest.mark.parametrize("recipe", molora.recipes())
def test_one_expert_is_plain_lora(recipe):
    changes = {"target_modules": ["q_proj"], **ONE_EXPERT.get(recipe, {"experts": {"num": 1}})}
    changes = changes | {"experts": {**changes.get("experts", {}), "dropout": 0.0}}
    model = shaken_adapter(molora.wrap(tiny_llama(), recipe, **changes))
    layers = routed_layers(model)
    bank = next(iter(layers.values())).molora_bank["default"]
    rank = bank.ranks[0]
    assert bank.num_experts == 1
    config = LoraConfig(r=rank, lora_alpha=bank.scaling * rank, target_modules=["q_proj"])
    reference = get_peft_model(tiny_llama(), config).eval()
    for name, module in reference.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            A, B = layers[name].molora_bank["default"].pair(0)
            module.lora_A["default"].weight.data.copy_(A)
            module.lora_B["default"].weight.data.copy_(B)
    inputs = tiny_inputs(model)
    expected = reference(**inputs).logits
    assert (expected - tiny_llama()(**inputs).logits).abs().max() > 1e-3
    torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-6, rtol=1e-5)


def positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize("recipe", molora.recipes())
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit_and_no_auxiliary_loss(recipe, side):
    model = shaken_adapter(molora.wrap(tiny_llama(), recipe, experts={"dropout": 0.0})).train()
    ids = tiny_inputs(model)["input_ids"]
    labels = ids.clone()
    labels[:, :3] = -100
    whole = torch.ones_like(ids)

    def run(ids, labels, mask):
        out = model(input_ids=ids, labels=labels, attention_mask=mask, position_ids=positions(mask))
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        logits = out.logits[:, 4:] if side == "left" and ids.shape[1] > 7 else out.logits[:, :7]
        return logits, getattr(out, "aux_loss", None), out.loss, grads

    plain = run(ids, labels, whole)
    junk = torch.randint(4, 90, (2, 4))
    other = run(padded(ids, junk, side), padded(labels, torch.full((2, 4), -100), side), padded(whole, 0 * junk, side))
    torch.testing.assert_close(other[0], plain[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other[2], plain[2], atol=1e-6, rtol=1e-5)
    assert (plain[1] is None) == (recipe not in ("dynmole", "mola", "milora"))
    if plain[1] is not None:
        torch.testing.assert_close(other[1], plain[1], atol=1e-6, rtol=1e-5)
    assert plain[3].keys() == other[3].keys()
    for name, grad in plain[3].items():
        torch.testing.assert_close(other[3][name], grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["dynmole", "mola", "milora"])
def test_padding_of_source_and_target_changes_nothing_in_pairs(recipe):
    model = shaken_adapter(molora.wrap(tiny_t5(), recipe)).train()
    inputs = tiny_inputs(model)

    def run(inputs):
        out = model(**inputs)
        return out.loss, out.aux_loss

    plain = run(inputs)
    no = torch.zeros(2, 3, dtype=torch.long)
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], no + 9], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], no], 1),
        "labels": torch.cat([inputs["labels"], no - 100], 1),
    }
    other = run(longer)
    torch.testing.assert_close(other[0], plain[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(other[1], plain[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("recipe", molora.recipes())
@torch.no_grad()
def test_recipes_do_not_see_the_future(recipe):
    model = shaken_adapter(molora.wrap(tiny_llama(), recipe))
    ids = tiny_inputs(model)["input_ids"]
    labels = ids.clone()
    labels[:, :3] = -100  # the prompt, which decisions per prompt may read
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 11) % 90 + 4
    before = model(input_ids=ids, labels=labels).logits
    after = model(input_ids=other, labels=torch.where(labels == -100, labels, other)).logits
    torch.testing.assert_close(after[:, :5], before[:, :5], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(after[:, 5:], before[:, 5:])
