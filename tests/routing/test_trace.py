"""Trace: how a decision reaches every layer that needs it, and no other."""

import copy
import gc
import pickle

import pytest
import torch

import molora
from molora.config import build_config
from molora.control import routed_layers, trace_of
from molora.errors import AuxLossError, RoutingError
from molora.routing.router import Router
from molora.routing.trace import Pass, Plan, Site, Trace
from molora.routing.types import Context, Routing
from molora.routing.weighted import WeightedLoss
from tests.tiny import tiny_inputs, tiny_llama

SITE = Site(name="q", adapter="default", group="site:q:main")
LEADER = Site(name="q", adapter="default", group="block:0:main", shared=True)
FOLLOWER = Site(name="k", adapter="default", group="block:0:main", shared=True, leads=False)


class Cache:
    """Stands for a key-value cache: an object that can be referred to weakly."""


def a_pass(**state):
    new = Pass()
    for name, value in state.items():
        assert hasattr(new, name)
        setattr(new, name, value)
    return new


# --- the layout of inputs and gates -----------------------------------------------------------------------------------


def test_gates_lie_along_the_input():
    trace, router, x = Trace(), Router(6, 4), torch.randn(2, 3, 6)
    expected = router(x, Context()).gates
    torch.testing.assert_close(trace.decide(SITE, router, x), expected)
    flat = trace.decide(SITE, router, x.flatten(0, 1))
    torch.testing.assert_close(flat, expected.flatten(0, 1))
    image = trace.decide(SITE, router, x[:, None].expand(2, 5, 3, 6))
    assert image.shape == (2, 5, 3, 4)
    torch.testing.assert_close(image[:, 2], expected)
    vector = trace.decide(SITE, router, x[0, 0])
    torch.testing.assert_close(vector, expected[0, 0])


def test_flattened_tokens_get_their_rows_back_for_decisions_per_prompt():
    trace, router, x = Trace(), Router(6, 4, granularity="prompt"), torch.randn(2, 3, 6)
    expected = router(x, Context()).gates
    trace.open(a_pass(shape={"main": (2, 3)}))
    flat = trace.decide(SITE, router, x.flatten(0, 1))
    torch.testing.assert_close(flat, expected.expand(2, 3, 4).flatten(0, 1))
    pooled = trace.decide(SITE, router, x[:, 0])  # (B, d): one token per row
    torch.testing.assert_close(pooled, router(x[:, :1], Context()).gates[:, 0])


def test_masks_of_the_stack_are_used():
    trace, router, x = Trace(), Router(6, 4, granularity="prompt"), torch.randn(2, 3, 6)
    valid = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    contexts = {"main": Context(valid=valid), "encoder": Context()}
    trace.open(a_pass(contexts=contexts, shape={"main": (2, 3)}))
    torch.testing.assert_close(trace.decide(SITE, router, x), router(x, Context(valid=valid)).gates)
    other = Site(name="e", adapter="default", group="e", stack="encoder")
    torch.testing.assert_close(trace.decide(other, router, x), router(x, Context()).gates)
    trace.close()
    torch.testing.assert_close(trace.decide(SITE, router, x), router(x, Context()).gates)  # outside of any forward


def test_a_column_is_one_gate():
    trace, router, x = Trace(), Router(6, 4), torch.randn(2, 3, 6)
    second = Site(name="k", adapter="default", group="g", column=1)
    torch.testing.assert_close(trace.decide(second, router, x), router(x, Context()).gates[..., 1:2])


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_a_shared_decision_is_taken_once_by_the_leader():
    trace, router, x = Trace(), Router(6, 4), torch.randn(2, 3, 6)
    trace.open(Pass())
    first = trace.decide(LEADER, router, x)
    assert trace.decide(FOLLOWER, None, torch.randn(2, 3, 9)) is first


def test_a_follower_without_a_leader_says_so():
    trace, router, x = Trace(), Router(6, 4), torch.randn(2, 3, 6)
    trace.open(Pass())
    with pytest.raises(RoutingError, match="'k' shares the decision of group 'block:0:main', but ran before"):
        trace.decide(FOLLOWER, None, x)
    trace.decide(LEADER, router, x)
    trace.close()
    trace.open(Pass())
    with pytest.raises(RoutingError, match="ran before"):  # not that of the forward before
        trace.decide(FOLLOWER, None, x)


def test_a_shared_decision_must_fit():
    trace, router = Trace(), Router(6, 4)
    trace.open(Pass())
    trace.decide(LEADER, router, torch.randn(2, 3, 6))
    with pytest.raises(RoutingError, match="taken for 2 rows and 3 positions, but layer 'k' has 2 rows and 5"):
        trace.decide(FOLLOWER, None, torch.randn(2, 5, 6))


@pytest.mark.parametrize("share", ["site", "block", "model"])
def test_two_active_adapters_never_read_each_others_decisions(share):
    changes = {"experts": {"num": 3, "rank": 2}, "selector": "softmax", "share": share}
    model = molora.wrap(tiny_llama(), "molora", **changes).eval()
    model.add_adapter("second", build_config("molora", changes))
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    path = "model.layers.0.self_attn.k_proj"  # reads the same input whichever adapters are on, and does not lead
    layer, inputs, seen = routed_layers(model)[path], tiny_inputs(model), {}
    layer.register_forward_hook(lambda _, args, out: seen.update(change=out - layer.base_layer(args[0])))
    changes = {}
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        with torch.no_grad():
            model(**inputs)
        changes[len(active), active[0]] = seen["change"]
    assert (changes[1, "default"] - changes[1, "second"]).abs().max() > 0.1
    torch.testing.assert_close(
        changes[2, "default"], changes[1, "default"] + changes[1, "second"], atol=1e-5, rtol=1e-5
    )


# --- decisions per prompt and the cache they belong to ----------------------------------------------------------------


def prefill(trace, router, x, cache):
    trace.open(Pass(cache=cache))
    gates = trace.decide(SITE, router, x)
    trace.close(cache)
    return gates


def resumed(trace, cache):
    new = a_pass(cache=cache, continuing=True)
    trace.open(new)
    new.decisions = trace.cached.decisions(cache)
    return new


def test_a_decision_per_prompt_is_reused_with_its_cache():
    trace, router = Trace(), Router(6, 4, granularity="prompt")
    first, second = Cache(), Cache()
    gates = {c: prefill(trace, router, torch.randn(2, 3, 6), c) for c in (first, second)}
    assert not torch.allclose(gates[first], gates[second])
    for cache in (second, first, first):  # interleaved, and more than one step
        resumed(trace, cache)
        assert torch.equal(trace.decide(SITE, router, torch.randn(2, 1, 6)), gates[cache])
        trace.close(cache)


def test_a_foreign_cache_is_refused():
    trace = Trace()
    with pytest.raises(RoutingError, match=r"whose prefill this model did not route.*molora.pin"):
        trace.cached.decisions(Cache())


def test_decisions_die_with_their_cache():
    trace, cache = Trace(), Cache()
    prefill(trace, Router(6, 4, granularity="prompt"), torch.randn(2, 3, 6), cache)
    assert len(trace.cached) == 1
    del cache
    gc.collect()
    assert len(trace.cached) == 0


def test_decisions_per_token_are_not_kept():
    trace, cache = Trace(), Cache()
    prefill(trace, Router(6, 4), torch.randn(2, 3, 6), cache)
    assert len(trace.cached) == 0


# --- pins and readers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 1, 4), (2, 3, 4)])
def test_pins_replace_every_decision(shape):
    trace, router, x = Trace(), Router(6, 4), torch.randn(2, 3, 6)
    trace.pins = torch.rand(shape)
    torch.testing.assert_close(trace.decide(SITE, router, x).expand(2, 3, 4), trace.pins.expand(2, 3, 4))
    trace.pins = {"other": torch.ones(4)}
    torch.testing.assert_close(trace.decide(SITE, router, x), router(x, Context()).gates)
    trace.pins = {"q": torch.ones(4)}
    assert trace.decide(SITE, router, x).eq(1).all()


def test_readers_see_each_fresh_decision_once():
    trace, router, x, seen = Trace(), Router(6, 4), torch.randn(2, 3, 6), []
    trace.readers.append(lambda site, routing, ctx: seen.append((site.name, routing)))
    trace.open(Pass())
    trace.decide(LEADER, router, x)
    trace.decide(FOLLOWER, None, x)
    assert [name for name, _ in seen] == ["q"]
    assert isinstance(seen[0][1], Routing)


# --- the auxiliary loss -----------------------------------------------------------------------------------------------


def collecting_trace(weight=0.5):
    trace = Trace()
    trace.plans["default"] = Plan([WeightedLoss({"name": "importance", "weight": weight})], decisions=2)
    return trace


def test_losses_are_collected_in_training_forwards_only():
    trace, router, x = collecting_trace(), Router(6, 4), torch.randn(2, 3, 6)
    trace.open(Pass())
    trace.decide(SITE, router, x)
    trace.close()
    assert trace.aux.value() is None
    trace.open(Pass(collecting=True))
    routing = router(x, Context())
    trace.decide(SITE, router, x)
    trace.close()
    expected = 0.5 / 2 * 4 * routing.probs.mean((0, 1)).square().sum()
    torch.testing.assert_close(trace.aux.value(), expected.detach())
    loss = trace.aux.add_to(torch.tensor(1.0), share=0.25)
    torch.testing.assert_close(loss, 1 + 0.25 * expected)
    torch.testing.assert_close(trace.aux.add_to(torch.tensor(1.0)), torch.tensor(1.0))  # once


def test_an_unused_loss_is_said_once():
    trace, router, x = collecting_trace(), Router(6, 4), torch.randn(2, 3, 6)

    def forward(x=x):
        trace.open(Pass(collecting=True))
        trace.decide(SITE, router, x)
        trace.close()

    forward()
    with pytest.raises(AuxLossError, match=r"never added to a loss.*molora\.attach"):
        forward()
    forward()
    trace.aux.add_to(torch.tensor(0.0))
    forward()
    other = torch.randn(2, 3, 6)
    with trace.gathering():  # a loss made of two forwards: their mean, as if they had been one batch of two parts
        forward(other)
    total = trace.aux.add_to(torch.tensor(0.0))
    each = [0.5 / 2 * 4 * router(v, Context()).probs.mean((0, 1)).square().sum() for v in (x, other)]
    torch.testing.assert_close(total, (each[0] + each[1]) / 2)


def test_copies_and_pickles_hold_no_graph():
    trace, router, x = collecting_trace(), Router(6, 4), torch.randn(2, 3, 6)
    trace.readers.append(lambda *_: None)
    trace.progress = 0.5
    trace.open(Pass(collecting=True))
    trace.decide(SITE, router, x)
    trace.close()
    for again in (copy.deepcopy(trace), pickle.loads(pickle.dumps(trace))):
        assert again.aux.value() is None and again.readers == [] and again.progress == 0.5
        assert list(again.plans) == ["default"]
    assert trace.aux.value() is not None


def test_a_wrapped_model_can_be_copied_after_a_training_forward():
    model = molora.wrap(tiny_llama(), "dynmole").train()
    inputs = tiny_inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    again = copy.deepcopy(model)
    model.eval()
    again.eval()
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    # the copy has a trace of its own, and its layers use that one
    assert trace_of(again) is not trace_of(model)
    assert {id(layer.trace) for layer in routed_layers(again).values()} == {id(trace_of(again))}
