"""Controllers: what each rule does step by step, that a weight is observed once and saved, and who is warned."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from peft import PeftModel

import molora
from molora.control import trace_of
from molora.errors import ConfigError
from molora.routing.controllers import Controller, check_controller, controllers
from molora.routing.load_losses import weighted_l1
from molora.routing.types import Context, Routing
from molora.routing.weighted import WeightedLoss, check_loss
from tests.tiny import tiny_inputs, tiny_llama

TRAINING = Context(training=True)


def build(name, **options):
    return controllers.build({"name": name, **options})


def run(rule, measured):
    """The weight after each of the measured values."""
    weight, memory, weights = rule.start, list(rule.memory), []
    for value in measured:
        weight, memory = rule.step(weight, memory, value)
        weights.append(weight)
    return weights


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("remoe")
def test_sign_multiplies_below_its_target_divides_above_and_stays_in_bounds():
    rule = build("sign", start=1e-8, target=0.75, factor=1.2)
    assert run(rule, [0.5, 0.5, 0.8, 0.75]) == pytest.approx([1.2e-8, 1.44e-8, 1.2e-8, 1e-8])
    assert run(rule, [0.5] * 76)[-1] == pytest.approx(1e-8 * 1.2**76) and 1e-8 * 1.2**76 > 1e-2 > 1e-8 * 1.2**75
    assert run(rule, [0.0] * 5000)[-1] == 1e2  # it would be 1e388
    assert run(rule, [1.0] * 5000)[-1] == 1e-12


@pytest.mark.proves("blockffn")
def test_adaptive_linear_holds_then_ramps_by_the_growth_of_the_loss():
    rule = build("adaptive_linear", start=1.0, hold=20, window=10, min_growth=1.025, max_factor=4)
    losses = [1.0] * 20 + [2.0] * 10 + [2.02] * 10 + [1.01] * 10 + [50.0] * 30
    weights = run(rule, losses)
    assert weights[:30] == pytest.approx([1.0] * 30)  # held, and the first comparison is at 30: 2 / 1
    assert weights[30:40] == pytest.approx([1 + i / 10 for i in range(1, 11)])  # in a straight line to 2
    assert weights[40:50] == pytest.approx([2 + 0.05 * i / 10 for i in range(1, 11)])  # rising 1%: at least 2.5%
    assert weights[50:60] == pytest.approx([2.05 - 1.025 * i / 10 for i in range(1, 11)])  # halved
    assert max(weights) == 4.0 and weights[-1] == 4.0  # never above four times the start


def test_slack_switches_a_loss_off_at_its_minimum():
    rule = build("slack", high=0.1, gain=3.0)
    assert run(rule, [2.0, 2.2, 4.0, 1.0, 1.1, 9.0]) == pytest.approx([0, 0.03, 0.1, 0, 0.03, 0.1])


@pytest.mark.proves("magnet")
def test_entropy_trigger_fires_once_after_patience_and_never_goes_back():
    rule = build("entropy_trigger", start=0.0, end=1.0, threshold=0.9, patience=3, ramp=4, decay=0.0)
    seen = [0.95, 0.95, 0.2, 0.95, 0.95, 0.95, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert run(rule, seen) == pytest.approx([0, 0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1])
    capped = build("entropy_trigger", start=0.5, end=1.0, threshold=1.0, cap=4, ramp=0)
    assert run(capped, [0.3] * 6) == pytest.approx([0.5, 0.5, 0.5, 1, 1, 1])
    slow = build("entropy_trigger", end=1.0, threshold=0.5, patience=1, ramp=0, decay=0.9)
    mean, crossed = 0.0, None  # the running mean starts at the first value
    for step in range(40):
        mean = 0.9 * mean + 0.1 * (0.0 if step == 0 else 1.0)
        crossed = step if crossed is None and mean >= 0.5 else crossed
    assert run(slow, [0.0] + [1.0] * 39).index(1.0) == crossed


@pytest.mark.parametrize("name", list(controllers))
def test_rules_are_finite_whatever_they_measure(name):
    rule = build(name)
    for values in ([0.0] * 50, [1e6] * 50, [1e-30, 1e6] * 25):
        assert all(math.isfinite(weight) for weight in run(rule, values))


# --- measuring --------------------------------------------------------------------------------------------------------


def decision():
    scores = torch.randn(2, 5, 4)
    probs = torch.softmax(scores, -1)
    gates = probs * (probs > 0.25)
    return Routing(scores, probs, gates)


@pytest.mark.parametrize("measure", ["sparsity", "entropy_token", "entropy_batch", "loss"])
def test_what_is_measured(measure):
    routing, valid = decision(), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    seen = []
    rule = {"controller": "sign", "measure": measure, "target": 0.0}
    controller = Controller(rule)
    controller.rule.step = lambda weight, memory, measured: (seen.append(measured), (weight, memory))[1]
    controller.observe(routing, Context(valid=valid, training=True), torch.tensor(3.5))
    controller.observe(routing, Context(valid=valid, training=True), torch.tensor(4.5))
    controller.settle()
    p = routing.probs[valid].double()
    entropy = lambda p: float(-(p * p.log()).sum(-1).mean() / math.log(4))  # noqa: E731
    expected = {
        "sparsity": float((routing.gates[valid] == 0).double().mean()),
        "entropy_token": entropy(p),
        "entropy_batch": entropy(p.mean(0)),
        "loss": 4.0,
    }
    assert seen == [pytest.approx(expected[measure], rel=1e-5)]
    controller.settle()  # nothing new: nothing moves
    assert len(seen) == 1


def test_the_weight_multiplies_the_loss_and_a_broken_step_moves_nothing():
    loss = WeightedLoss({"name": "weighted_l1", "weight": {"controller": "sign", "start": 0.5, "target": 0.99}})
    routing = decision()
    plain = weighted_l1(routing, TRAINING)
    torch.testing.assert_close(loss(routing, TRAINING, 4), 0.5 * plain / 4)
    loss.controller.settle()
    torch.testing.assert_close(loss(routing, Context(), 1), 0.6 * plain)  # evaluation reads it, and does not observe
    assert loss.controller.seen is None
    loss.controller.observe(
        Routing(*(t * math.nan for t in (routing.scores, routing.probs, routing.gates))), TRAINING, plain
    )
    watching_loss = Controller({"controller": "sign", "measure": "loss", "target": 1.0, "start": 0.5})
    watching_loss.observe(routing, TRAINING, torch.tensor(math.nan))
    watching_loss.settle()
    assert watching_loss.state.tolist() == [0.5]


def test_ranks_are_averaged(monkeypatch):
    controller = Controller({"controller": "sign", "measure": "loss", "target": 2.0, "start": 1.0})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda seen: seen.add_(torch.tensor([9.0, 3.0])))
    controller.observe(decision(), TRAINING, torch.tensor(1.5))  # alone below the target; with the others' 3.0 above
    controller.settle()
    assert controller.state.tolist() == pytest.approx([1 / 1.2])


# --- in a model -------------------------------------------------------------------------------------------------------

SPARSE = {
    "scorer": {"name": "linear", "bias": True},
    "link": "relu",
    "selector": "positive",
    "experts": {"num": 4, "rank": 2},
    "target_modules": ["q_proj", "up_proj"],
    "losses": [
        {"name": "switch_balance", "weight": 1e-2},
        {"name": "weighted_l1", "weight": {"controller": "sign", "start": 1e-3, "target": 0.9}},
        {"name": "entropy", "weight": {"controller": "entropy_trigger", "threshold": 0.1, "patience": 1, "ramp": 2}},
    ],
}


def step(model, accumulate=1):
    inputs = tiny_inputs(model)
    for _ in range(accumulate):
        (model(**inputs, labels=inputs["input_ids"]).loss / accumulate).backward()
    molora.settle(model)


def held(model):
    return {k: v.tolist() for k, v in model.state_dict().items() if "controllers" in k}


@pytest.mark.proves("remoe", "magnet")
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_weight_moves_once_per_step_whatever_is_recomputed_or_accumulated(reentrant):
    model = molora.wrap(tiny_llama(), {}, **SPARSE).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    step(model)
    step(model, accumulate=3)
    (first, second) = held(model).values()
    assert first == pytest.approx([1e-3 * 1.2**2])
    assert second[0] == pytest.approx(0.005) and second[1] == 2.0 and second[4] == 1.0  # fired in the first step
    assert all("layers.0.self_attn.q_proj" in key for key in held(model))  # with the first decision


@pytest.mark.proves("remoe")
def test_the_weight_is_saved_loaded_copied_and_goes_on(tmp_path):
    model = molora.wrap(tiny_llama(), {}, **SPARSE).train()
    step(model)
    molora.save(model, tmp_path / "adapter")
    copied = copy.deepcopy(model)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True).train()
    assert held(model) == held(copied) == held(loaded)
    assert pickle.loads(pickle.dumps(trace_of(model).plans["default"].losses[1])).controller.state.tolist() == [
        pytest.approx(1.2e-3)
    ]
    for other in (loaded, copied):
        aux = other(**tiny_inputs(other), labels=tiny_inputs(other)["input_ids"]).aux_loss
        expected = model(**tiny_inputs(model), labels=tiny_inputs(model)["input_ids"]).aux_loss
        torch.testing.assert_close(aux, expected)
        molora.settle(other)
        assert held(other) != held(model)  # its own weight, not that of the model it was made from


def test_users_are_told_when_nothing_moves_the_weight():
    model = molora.wrap(tiny_llama(), {}, **{**SPARSE, "target_modules": ["q_proj"]}).train()
    inputs = tiny_inputs(model, batch=1, length=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(63):
            model(**inputs, labels=inputs["input_ids"])
    with pytest.warns(UserWarning, match=r"after 64 training forwards nothing has moved them.*molora.settle\(model\)"):
        model(**inputs, labels=inputs["input_ids"])


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"controller": "sing"}, "controller 'sing' is unknown; did you mean 'sign'"),
        ({"controller": "sign", "goal": 1}, "controller 'sign' has no option 'goal'"),
        ({"controller": "sign", "factor": 0.5}, "1 <= factor <= inf, got factor=0.5"),
        ({"controller": "sign", "start": 1e3}, "start=1000.0"),
        ({"controller": "sign", "target": "much"}, "target='much'"),
        ({"controller": "sign", "measure": "entropy"}, "measure 'entropy' is unknown; known: sparsity"),
        ({"controller": "entropy_trigger", "threshold": 2}, "0 <= threshold <= 1"),
        ({"controller": "adaptive_linear", "window": 0}, "1 <= window"),
        ({"controller": "slack", "high": -1}, "0 <= high"),
    ],
)
def test_wrong_controllers_are_named(weight, message):
    assert message in "\n".join(check_controller(weight))
    assert message in "\n".join(check_loss({"name": "entropy", "weight": weight}))
    with pytest.raises(ConfigError):
        molora.wrap(tiny_llama(), {}, losses=[{"name": "entropy", "weight": weight}])
