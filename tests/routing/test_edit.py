"""Training-free edits: what they do to gates, that nothing stays afterwards, and the statistics they are chosen by."""

import math

import pytest
import torch

import molora
from molora.control import routed_layers, trace_of
from molora.errors import ConfigError
from molora.routing.edit import Activation, Boost, Forbid, Pin, Steer, cognitive_experts, differences, npmi
from molora.routing.router import Router
from molora.routing.types import Context
from tests.tiny import tiny_inputs, tiny_llama


def routed(**changes):
    torch.manual_seed(0)
    changes = {"experts": {"num": 4, "rank": 2}, "target_modules": ["q_proj", "up_proj"], **changes}
    model = molora.wrap(tiny_llama(), {}, **changes).eval()
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def gates(model, *edits):
    with torch.no_grad(), molora.record(model) as log, molora.edit(model, *edits):
        model(**tiny_inputs(model))
    return log


def first(log):
    return next(iter(log.values()))


def test_boost_multiplies_the_gates_of_chosen_experts_only():
    model = routed(selector={"name": "top_k", "k": 2})
    plain, boosted = first(gates(model)), first(gates(model, Boost([1], factor=8.0)))
    expected = plain.gates.clone()
    expected[..., 1] *= 8
    torch.testing.assert_close(boosted.gates, expected)
    assert (plain.gates[..., 1] == 0).any() and (plain.gates[..., 1] > 0).any()


def test_steering_follows_the_scale_of_the_scores():
    x = torch.randn(2, 3, 8)
    router = Router(8, 4)

    def scores(factor, *edits):
        with torch.no_grad():
            return router(factor * x, Context(edits=tuple((one, "") for one in edits))).scores

    steer = Steer([0, 2], strength=0.5)
    plain, edited = scores(1.0), scores(1.0, steer)
    for token in plain.flatten(0, 1).unbind():
        assert token.shape == (4,)
    spread = ((plain - plain.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(edited - plain, 0.5 * spread * torch.tensor([1.0, 0, 1, 0]))
    torch.testing.assert_close(scores(7.0, steer) - scores(7.0), 7 * (edited - plain))


def test_hard_steering_puts_experts_on_top():
    model = routed(selector={"name": "top_k", "k": 2})
    log = gates(model, Steer([0, 3], hard=True))
    for routing in [first(log)]:
        assert routing.selected[..., [0, 3]].all() and not routing.selected[..., [1, 2]].any()


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("selector", ["softmax", {"name": "top_k", "k": 2}, {"name": "top_p", "p": 0.9}])
def test_forbidden_experts_never_act(link, selector):
    model = routed(selector=selector, link=link)
    for routing in gates(model, Forbid([2])).values():
        assert routing.gates[..., 2].eq(0).all() and routing.gates.sum(-1).gt(0).all()
        if selector != "softmax" and link == "softmax" and isinstance(selector, dict) and selector["name"] == "top_k":
            torch.testing.assert_close(routing.gates.sum(-1), torch.ones(2, 7))


def test_a_forbidden_expert_takes_no_place_whatever_its_price():
    """A negative price alone would let it be selected, with a gate of 0, in place of one that may act."""
    model = routed(selector={"name": "top_k", "k": 1}, price="sign")
    for layer in routed_layers(model).values():
        layer.molora_router["default"].price.value[2] = -10.0
    assert all(routing.gates[..., 2].gt(0).all() for routing in gates(model).values())
    for routing in gates(model, Forbid([2])).values():
        assert routing.gates[..., 2].eq(0).all() and routing.gates.sum(-1).gt(0).all()


def test_a_pinned_expert_has_its_gate_everywhere():
    routing = first(gates(routed(selector={"name": "top_k", "k": 1}), Pin([3], gate=0.25)))
    assert routing.gates[..., 3].eq(0.25).all() and (routing.gates[..., :3] > 0).any()


def test_edits_act_at_the_sites_they_name_and_nothing_stays():
    model = routed()
    inputs = tiny_inputs(model)
    names = list(routed_layers(model))
    with torch.no_grad():
        before = model(**inputs).logits
    plain, edited = gates(model), gates(model, Forbid({names[0]: [1]}))
    assert edited[names[0]].gates[..., 1].eq(0).all()
    assert not plain[names[1]].gates.eq(0).any() and not edited[names[1]].gates.eq(0).any()
    with torch.no_grad():
        with molora.edit(model, Forbid({names[0]: [1]})):
            assert not torch.equal(model(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, before)
    assert trace_of(model).edits == []


def test_edits_act_in_order():
    model = routed()
    pinned_last, pinned_first = (
        first(gates(model, *edits))
        for edits in ([Boost([0], factor=2.0), Pin([0])], [Pin([0]), Boost([0], factor=2.0)])
    )
    assert pinned_last.gates[..., 0].eq(1).all() and pinned_first.gates[..., 0].eq(2).all()


def test_impossible_edits_are_refused():
    model = routed()
    with pytest.raises(ConfigError, match=r"edit names expert 4 of site .* experts 0 to 3"):
        gates(model, Boost([4]))
    with pytest.raises(ConfigError, match="forbids every expert"):
        gates(model, Forbid([0, 1, 2, 3]))
    with pytest.raises(ConfigError, match=r"site 'model\.layers.0\.self_attn\.k_proj' takes no decision"):
        gates(model, Boost({"model.layers.0.self_attn.k_proj": [0]}))
    with pytest.raises(ConfigError, match="write their numbers"):
        Boost([-1])


# --- statistics -------------------------------------------------------------------------------------------------------


def test_npmi_is_bounded_and_right_at_the_corners():
    independent = torch.tensor([[6.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(npmi(independent, 1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    only_together = torch.tensor([[5.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(npmi(only_together, 1), torch.tensor([-1.0, 1.0], dtype=torch.float64))
    counts = torch.rand(3, 6, dtype=torch.float64)
    values = npmi(counts, 2)
    assert (values.abs() <= 1).all()
    total = float(counts.sum())
    for e in range(6):
        joint = float(counts[2, e]) / total
        apart = float(counts[2].sum()) / total * float(counts[:, e].sum()) / total
        assert float(values[e]) == pytest.approx(math.log(joint / apart) / -math.log(joint))


def test_activation_counts_choices_by_class_as_a_plain_loop_does():
    model = routed(selector={"name": "top_k", "k": 2})
    inputs = tiny_inputs(model, batch=3)
    inputs["attention_mask"][1, 4:] = 0
    seen = Activation(classes=2)
    with torch.no_grad(), molora.record(model) as log, seen.reading(trace_of(model), lambda ids: ids % 2):
        model(**inputs)
    for site, routing in log.items():
        counts = torch.zeros(2, 4, dtype=torch.float64)
        shares = []
        for row in range(3):
            used = torch.zeros(4, dtype=torch.float64)
            real = 4 if row == 1 else 7
            for token in range(real):
                for expert in range(4):
                    if routing.gates[row, token, expert] != 0:
                        counts[int(inputs["input_ids"][row, token]) % 2, expert] += 1
                        used[expert] += 1
            shares.append(used / real)
        torch.testing.assert_close(seen.chosen[site], counts)
        torch.testing.assert_close(seen.mean_share(site), torch.stack(shares).mean(0))
    best = cognitive_experts(seen, top=3)
    ranked = sorted((float(v), s, e) for s, values in seen.npmi(1).items() for e, v in enumerate(values))[-3:]
    assert {(s, e) for s, experts in best.items() for e in experts} == {(s, e) for _, s, e in ranked}


def test_differences_find_the_experts_that_a_task_uses_more():
    model = routed(selector={"name": "top_k", "k": 1, "normalise": "none"})
    task, generic = Activation(), Activation()
    with torch.no_grad():
        with task.reading(trace_of(model)):
            model(**tiny_inputs(model, seed=1))
        with generic.reading(trace_of(model)):
            model(**tiny_inputs(model, seed=2))
    found = differences(task, generic, threshold=0.1)
    assert found
    for site in task.shares:
        delta = (task.mean_share(site) - generic.mean_share(site)).tolist()
        assert found.get(site, []) == [e for e in range(4) if delta[e] > 0.1]
