"""Routers made of routers: their gates add up or mix, and whatever holds for one router holds for several."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

import molora
from molora.control import routed_layers
from molora.errors import ConfigError
from molora.experts.bank import ExpertBank
from molora.routing.branches import Branches
from molora.routing.router import Router
from molora.routing.types import Context, Memory
from tests.tiny import tiny_inputs, tiny_llama, tiny_t5

B, S, D, E = 3, 6, 8, 5
TWO = [
    {"scorer": "linear", "selector": {"name": "top_k", "k": 2}},
    {"scorer": {"name": "mlp", "hidden": 4}, "granularity": "prompt"},
]
VIEWED = [
    {"selector": {"name": "top_k", "k": 2}},
    {
        "scorer": {"name": "codebook", "codes": 10},
        "selector": {"name": "top_k", "k": 1, "weight": "const", "normalise": "none"},
    },
]
CONFIG = {"experts": {"num": 4, "rank": 2, "scaling": 1.0}, "target_modules": ["q_proj", "up_proj"]}


def shaken(module, spread=0.5):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=spread)
    return module


def branched(branches=TWO, **options):
    return shaken(Branches(D, E, branches=branches, **options)).eval()


def model_for(base=tiny_llama, **changes):
    model = molora.wrap(base(), {}, **{**CONFIG, "branches": TWO, **changes})
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def test_gates_are_the_sum_of_those_of_the_branches():
    router, x = branched(), torch.randn(B, S, D)
    routing = router(x, Context())
    token, prompt = (branch(x, Context()) for branch in router.branches)
    assert prompt.gates.shape == (B, 1, E)
    torch.testing.assert_close(routing.gates, token.gates + prompt.gates)
    torch.testing.assert_close(routing.scores, token.scores + prompt.scores)
    torch.testing.assert_close(routing.branches[1].probs, prompt.probs)


def test_a_branch_beside_one_that_gives_nothing_is_a_plain_router():
    silent = {"selector": {"name": "top_k", "k": 1, "weight": "const", "omega": 0.0, "normalise": "none"}}
    router, x = branched([{"selector": {"name": "top_k", "k": 2}}, silent]), torch.randn(B, S, D)
    plain = Router(D, E, selector={"name": "top_k", "k": 2})
    plain.load_state_dict(router.branches[0].state_dict())
    torch.testing.assert_close(router(x, Context()).gates, plain(x, Context()).gates)


@pytest.mark.parametrize("mix", ["softmax", "gate"])
def test_mixed_gates_equal_the_equation(mix):
    router, x = branched(mix=mix), torch.randn(B, S, D)
    routing = router(x, Context())
    for row in range(B):
        for token in range(S):
            scores = router.weigh.weight @ x[row, token]
            if mix == "softmax":
                weights = torch.softmax(scores, 0)
            else:
                gamma = torch.sigmoid(scores + router.weigh.bias)
                weights = torch.cat([gamma, 1 - gamma])
            first, second = (r.gates[row, min(token, r.gates.shape[1] - 1)] for r in routing.branches)
            torch.testing.assert_close(routing.gates[row, token], weights[0] * first + weights[1] * second)


@pytest.mark.parametrize("branches", [TWO, VIEWED], ids=["two", "viewed"])
@pytest.mark.parametrize("mix", ["sum", "softmax", "gate"])
def test_experts_are_treated_alike(branches, mix):
    router, x, order = branched(branches, mix=mix), torch.randn(B, S, D), torch.randperm(E)
    bank = shaken(ExpertBank(D, 7, [2] * E))

    def delta():
        routing = router(x, Context())
        passes = routing.passes or ((None, routing.applied),)
        return routing.gates, sum(bank(x if view is None else view, gates) for view, gates in passes)

    gates, y = delta()
    router.permute(order)
    bank.permute(order)
    after, same = delta()
    torch.testing.assert_close(after, gates[..., order])
    torch.testing.assert_close(same, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("branches", [TWO, VIEWED], ids=["two", "viewed"])
def test_padding_and_the_future_are_not_seen(branches):
    router, x, prompt = branched(branches, mix="softmax"), torch.randn(B, S, D), torch.arange(S).expand(B, S) < 3
    valid = torch.ones(B, S).bool()
    before = router(x, Context(valid=valid, prompt=prompt, memory=Memory())).gates
    later = torch.cat([x[:, :3], torch.randn(B, S - 3, D)], 1)
    after = router(later, Context(valid=valid, prompt=prompt, memory=Memory())).gates
    torch.testing.assert_close(after[:, :3], before[:, :3])
    junk, no = 100 * torch.randn(B, 2, D), torch.zeros(B, 2).bool()
    longer = Context(valid=torch.cat([no, valid], 1), prompt=torch.cat([~no, prompt], 1), memory=Memory())
    torch.testing.assert_close(router(torch.cat([junk, x], 1), longer).gates[:, 2:], before)


def test_null_and_shared_experts_belong_to_all_branches():
    router, x = (
        branched(
            [{"selector": {"name": "top_k", "k": 2}}, {"selector": {"name": "top_k", "k": 1}}],
            null=2,
            shared={"num": 2},
        ),
        torch.randn(B, S, D),
    )
    routing = router(x, Context())
    assert routing.gates.shape == (B, S, E) and routing.scores.shape == (B, S, E + 2)
    assert routing.applied.shape == (B, S, E + 2) and routing.applied[..., E:].eq(1).all()
    first, second = routing.branches
    assert torch.equal(routing.selected, first.choices | second.choices) and first.always is None
    viewed = branched(VIEWED, shared={"num": 2}, mix="sum")(x, Context())
    (none, plain), (view, gates) = viewed.passes
    assert none is None and plain[..., E:].eq(1).all() and gates[..., E:].eq(0).all() and view.shape == x.shape


def test_each_branch_has_its_own_price_and_losses():
    priced = {"selector": {"name": "top_k", "k": 1}, "price": {"name": "sign", "rate": 0.1}}
    losses = [{"name": "router_z", "weight": 1.0, "branch": 0}, {"name": "router_z", "weight": 10.0, "branch": 1}]
    model = model_for(branches=[priced, {}], losses=losses, target_modules=["q_proj"]).train()
    inputs, routings = tiny_inputs(model), []
    with molora.record(model) as log:
        out = model(**inputs, labels=inputs["input_ids"])
        routings = list(log.values())
    z = [[torch.logsumexp(r.branches[i].scores, -1).square().mean() for r in routings] for i in (0, 1)]
    torch.testing.assert_close(out.aux_loss, torch.stack(z[0]).mean() + 10 * torch.stack(z[1]).mean())
    molora.settle(model)
    for layer in routed_layers(model).values():
        router = layer.molora_router["default"]
        assert router.price is None and router.branches[1].price is None
        assert router.branches[0].price.value.abs().max() > 0.05


@pytest.mark.parametrize("base", [tiny_llama, tiny_t5])
@pytest.mark.parametrize("changes", [{}, {"branches": VIEWED, "mix": "softmax"}], ids=["two", "viewed"])
def test_saved_loaded_copied_and_generated(base, changes, tmp_path):
    targets = ["q_proj", "up_proj"] if base is tiny_llama else ["q", "wi"]
    model = model_for(base, target_modules=targets, **changes)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys() and all(torch.equal(saved[key], found[key]) for key in saved)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert (logits - base()(**inputs).logits).abs().max() > 1e-3
        for other in (loaded, copy.deepcopy(model)):
            torch.testing.assert_close(other(**inputs).logits, logits, atol=1e-6, rtol=1e-6)
    asked = {"input_ids": inputs["input_ids"], "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**asked, output_scores=True, return_dict_in_generate=True)
    again = model.generate(**asked, use_cache=False, output_scores=True, return_dict_in_generate=True)
    for one, other in zip(cached.scores, again.scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_decision_of_a_prompt_goes_with_its_cache():
    model = model_for()
    ids, other = tiny_inputs(model)["input_ids"], tiny_inputs(model, seed=4)["input_ids"]
    with torch.no_grad():
        caches = [model(input_ids=prompt, use_cache=True).past_key_values for prompt in (ids, other)]
        nxt = ids[:, :1]
        with molora.record(model) as log:  # interleaved: the second prompt came last
            model(input_ids=nxt, past_key_values=caches[0])
        gates = {name: routing.branches[1].gates for name, routing in log.items()}
        with molora.record(model) as log:
            model(input_ids=ids)
    for name, routing in log.items():
        torch.testing.assert_close(gates[name], routing.branches[1].gates)
    with pytest.raises(molora.RoutingError, match="foreign cache"):
        model(input_ids=nxt, past_key_values=copy.deepcopy(caches[0]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("branches", [TWO, VIEWED], ids=["two", "viewed"])
def test_checkpointing_changes_no_gradient(branches, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = model_for(branches=branches, mix="gate", losses=[{"name": "router_z", "weight": 0.3}]).train()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        inputs = tiny_inputs(model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("weigh" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=lambda m, n=name: f"{n}: {m}")


def test_a_layer_runs_the_experts_on_each_input():
    model = model_for(branches=VIEWED, mix="sum", target_modules=["q_proj"])
    layer, x = next(iter(routed_layers(model).values())), torch.randn(2, 5, 32)
    with torch.no_grad():
        y = layer(x)
        routing, bank = layer.molora_router["default"](x, Context()), layer.molora_bank["default"]
        (_, first), (view, second) = routing.passes
        torch.testing.assert_close(y, layer.base_layer(x) + bank(x, first) + bank(view, second))
        with molora.pin(model, torch.tensor([1.0, 0, 0, 0])):
            torch.testing.assert_close(layer(x), layer.base_layer(x) + bank(x, torch.tensor([1.0, 0, 0, 0])))
    with pytest.raises(molora.ConfigError, match="cannot merge"):
        model.merge_and_unload()


def test_layers_of_the_same_input_can_share_views_and_others_cannot():
    shared = {"branches": VIEWED, "share": "group", "target_modules": ["q_proj", "k_proj"]}
    model = model_for(**shared)
    layers, x = routed_layers(model), {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, out, name=name: x.update({name: (args[0], out)}))
    with torch.no_grad():
        model(**tiny_inputs(model))
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"):
            router = layers["model.layers.0.self_attn.q_proj"].molora_router["default"]
            given, out = x[name]
            (_, first), (view, second) = router(given, Context()).passes
            bank = layers[name].molora_bank["default"]
            expected = layers[name].base_layer(given) + bank(given, first) + bank(view, second)
            torch.testing.assert_close(out, expected)
    with pytest.raises(ConfigError, match="changes what the experts read"):
        model_for(branches=VIEWED, share="block")


def test_a_branch_like_another_uses_its_weights():
    like = [{"scorer": "linear"}, {"scorer": "noisy_view", "like": 0}]
    model = model_for(branches=like, mix="gate", target_modules=["q_proj"])
    router = next(iter(routed_layers(model).values())).molora_router["default"]
    assert router.branches[1].scorer.inner is router.branches[0].scorer
    assert sum("scorer" in name and "weight" in name for name, _ in router.named_parameters()) == 1
    twin = copy.deepcopy(router)
    assert twin.branches[1].scorer.inner is twin.branches[0].scorer is not router.branches[0].scorer


def test_what_cannot_work_is_said():
    for changes, message in (
        ({"branches": [{}]}, "two or more mappings"),
        ({"branches": [{}, {"scores": "linear"}]}, r"branches\[1\] has no key 'scores'; did you mean 'scorer'"),
        ({"branches": [{}, {"scorer": "liner"}]}, r"branches\[1\]: scorer 'liner' is unknown; did you mean 'linear'"),
        ({"branches": [{}, {"granularity": "task"}]}, "does not go with scorer 'linear'"),
        ({"branches": [{}, {}, {}], "mix": "gate"}, "mix: gate weighs two branches, got 3"),
        ({"branches": [{}, {}], "mix": "add"}, "mix 'add' is unknown"),
        ({"branches": None, "mix": "gate"}, "there are none"),
        ({"branches": [{}, {"like": 1, "scorer": "noisy_view"}]}, "number of an earlier branch"),
        ({"branches": [{}, {"like": 0}]}, "like needs a scorer"),
        ({"losses": [{"name": "router_z", "weight": 1.0, "branch": 2}]}, "branch 2, but there are 2 branches"),
        ({"losses": [{"name": "router_z", "weight": 1.0, "branch": "b"}]}, "branch must be the number"),
    ):
        with pytest.raises(ConfigError, match=message):
            model_for(**changes)
