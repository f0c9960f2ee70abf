"""The whole layer as one autograd node equals base, router and experts one by one, and stands back where it must."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import molora
from molora.control import routed_layers
from molora.experts.bank import ExpertBank
from molora.kernels import native, step
from molora.kernels.choose import kernel
from molora.layers import RoutedLinear
from molora.routing.router import Router
from molora.routing.trace import Site, Trace
from tests.kernels.test_routed import SELECTORS, named
from tests.tiny import tiny_inputs, tiny_llama

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


def routed(d_in=24, d_out=20, ranks=(4,) * 6, selector="softmax", bias=False, base_bias=False, temperature=0.8, **more):
    """A layer with random weights everywhere."""
    torch.manual_seed(3)
    base = nn.Linear(d_in, d_out, bias=base_bias).requires_grad_(False)
    layer = RoutedLinear(base, d_in, d_out, Trace())
    bank = ExpertBank(d_in, d_out, ranks, scaling=0.5)
    nn.init.normal_(bank.Bt)
    layer.add("default", bank)
    scorer = {"name": "linear", "init": 0.4, "bias": bias}
    link = {"name": "softmax", "temperature": temperature}
    router = Router(d_in, len(ranks), scorer=scorer, selector=selector, link=link, **more)
    if bias:
        nn.init.normal_(router.scorer.bias)
    layer.molora_router["default"] = router
    layer.sites["default"] = Site("layer", "default", "layer", sparse=router.sparse)
    layer.set_adapter("default")
    return layer


def results(layer, x, call=None):
    """The output and every gradient."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = (call or layer)(x)
    torch.manual_seed(7)
    y.backward(torch.randn_like(y))
    named_grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **{name: None if g is None else g.clone() for name, g in named_grads.items()}}


def one_by_one(layer, x):
    with kernel("dense"):
        return results(layer, x)


def assert_same(ours, reference, tolerance=1e-5):
    assert ours.keys() == reference.keys() and len(ours) >= 2
    for name, mine in ours.items():
        assert (mine is None) == (reference[name] is None), name
        if mine is not None:
            assert mine.shape == reference[name].shape and mine.dtype == reference[name].dtype
            scale = reference[name].abs().max().clamp_min(0.1)  # a gradient may be exactly 0
            assert (mine - reference[name]).abs().max() / scale < tolerance, name


@pytest.fixture
def steps(monkeypatch):
    """How often a layer ran as one node (True) or was refused (False)."""
    calls = []
    inner = step.Step.run

    def run(self, base, x):
        y = inner(self, base, x)
        calls.append(y is not None)
        return y

    monkeypatch.setattr(step.Step, "run", run)
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("selector", SELECTORS, ids=named)
def test_it_equals_base_router_and_experts_in_turn(selector, bias, steps):
    layer, x = routed(selector=selector, bias=bias, base_bias=bias), torch.randn(3, 50, 24)
    ours = results(layer, x)
    assert steps == [True]
    assert_same(ours, one_by_one(layer, x))
    assert steps == [True]


TOP_2 = {"name": "top_k", "k": 2}
SHAPES = {
    "one token": ((1, 1), {}),
    "flat": ((11,), {}),
    "four axes": ((2, 3, 5), {}),
    "ragged": ((3, 7), dict(d_in=23, d_out=29)),
    "narrow": ((3, 7), dict(d_in=5, d_out=3)),
    "wide, many tokens": ((2, 90), dict(d_in=70, d_out=130)),
    "k = E": ((2, 9), dict(ranks=(4,) * 2)),
    "E = 1": ((2, 9), dict(ranks=(8,), selector={"name": "top_k", "k": 1, "normalise": "none"})),
    "E = 64": ((2, 40), dict(ranks=(4,) * 64)),
    "r = 12": ((2, 20), dict(ranks=(12,) * 3)),
    "a vector": ((), {}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape, steps):
    lead, options = SHAPES[shape]
    layer = routed(**{"selector": TOP_2, **options})
    x = torch.randn(*lead, layer.d_in)
    ours = results(layer, x)
    assert steps == [True]
    assert_same(ours, one_by_one(layer, x))


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_nothing(threads, monkeypatch):
    layer, x = routed(d_in=50, d_out=70, selector=TOP_2, bias=True), torch.randn(3, 41, 50)
    monkeypatch.setattr(step, "threads_for", lambda tokens: threads)
    assert_same(results(layer, x), one_by_one(layer, x))


@pytest.mark.parametrize("frozen", ["molora_bank", "molora_router", "default.A", "default.Bt", "scorer.bias", "input"])
def test_gradients_that_nobody_wants_change_nothing(frozen, steps):
    layer, x = routed(selector=TOP_2, bias=True), torch.randn(2, 9, 24)
    for name, parameter in layer.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)

    def without_input(t):
        return layer(t.detach())

    call = without_input if frozen == "input" else None
    ours = results(layer, x, call)
    assert steps == [True] and (ours["x"] is None) == (frozen == "input")
    with kernel("dense"):
        assert_same(ours, results(layer, x, call))


@pytest.mark.parametrize(
    "options",
    [
        {"selector": {"name": "top_k", "grad": "straight_through"}},
        {"selector": {"name": "top_k", "grad": "none"}},
        {"selector": {"name": "top_k"}, "price": "sign"},
        {"link": "sigmoid"},
        {"granularity": "prompt"},
        {"scorer": "cosine"},
    ],
)
def test_other_routers_are_left_to_torch(options):
    bank = ExpertBank(8, 8, [4] * 4)
    assert step.prepared(bank, Router(8, 4, **options)) is None
    assert step.prepared(bank, Router(8, 4, selector="top_k")) is not None


@pytest.mark.parametrize("ranks", [[2] * 4, [4, 4, 4, 8]])
def test_other_banks_are_left_to_torch(ranks):
    assert step.prepared(ExpertBank(8, 8, ranks), Router(8, 4, selector="top_k")) is None


@pytest.mark.parametrize(
    "why", ["hooked base", "trained base", "replaced forward", "hooked router", "half", "strided", "autocast", "empty"]
)
def test_it_stands_back(why, steps):
    layer, x = routed(selector=TOP_2), torch.randn(2, 9, 24)
    if why == "hooked base":
        layer.base_layer.register_forward_hook(lambda *a: None)
    elif why == "trained base":
        layer.base_layer.weight.requires_grad_()
    elif why == "replaced forward":
        inner = layer.base_layer.forward
        layer.base_layer.forward = lambda x: inner(x) * 2
    elif why == "hooked router":
        layer.molora_router["default"].register_forward_hook(lambda *a: None)
    elif why == "half":
        layer.base_layer.bfloat16()
        x = x.bfloat16()
    elif why == "strided":
        x = torch.randn(9, 2, 24).transpose(0, 1)
    elif why == "empty":
        x = torch.randn(0, 9, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"):
        y = layer(x.requires_grad_())
    assert not any(steps) and y.grad_fn is not None
    if why == "replaced forward":
        with kernel("dense"):
            torch.testing.assert_close(y, layer(x))


def wrapped(**changes):
    options = dict(experts={"num": 6, "rank": 4}, scorer={"init": 1.0}, selector=TOP_2, losses=[])
    model = molora.wrap(tiny_llama(), "molora", **(options | changes)).train()
    torch.manual_seed(5)
    for layer in routed_layers(model).values():
        nn.init.normal_(layer.molora_bank["default"].Bt, std=0.1)
    return model


def loss_and_grads(model, inputs):
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": loss.detach(), **grads}


def test_a_model_trains_with_one_node_per_layer(steps):
    model = wrapped()
    inputs = tiny_inputs(model.base_model.model, batch=3, length=6)
    ours = loss_and_grads(model, inputs)
    assert steps == [True] * len(routed_layers(model)) and len(ours) == 1 + 3 * len(steps)
    with kernel("dense"):
        assert_same(ours, loss_and_grads(model, inputs), 1e-4)


@pytest.mark.parametrize("why", ["recorded", "pinned", "shared", "losses", "dropout", "two adapters"])
def test_a_decision_that_others_need_is_taken_by_the_trace(why, steps):
    changes = {
        "shared": {"share": "block"},
        "losses": {"losses": [{"name": "switch_balance", "weight": 0.01}]},
        "dropout": {"experts": {"num": 6, "rank": 4, "dropout": 0.5}},
    }
    model = wrapped(**changes.get(why, {}))
    inputs = tiny_inputs(model.base_model.model)
    if why == "recorded":
        with molora.record(model) as log:
            model(**inputs)
        assert len(log) == len(routed_layers(model))
    elif why == "pinned":
        with molora.pin(model, torch.eye(6)[0]):
            model(**inputs)
    elif why == "two adapters":
        for layer in routed_layers(model).values():
            layer.molora_bank["other"] = copy.deepcopy(layer.molora_bank["default"])
            layer.molora_router["other"] = copy.deepcopy(layer.molora_router["default"])
            layer.sites["other"] = layer.sites["default"]
            layer._active_adapter = ["default", "other"]
        model(**inputs)
    else:
        model(**inputs)
    assert not any(steps)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_checkpointing_takes_the_same_way_twice(reentrant, recorded, steps):
    model = wrapped()
    inputs = tiny_inputs(model.base_model.model, batch=2, length=6)
    plain = loss_and_grads(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    del steps[:]
    model.zero_grad()
    if recorded:
        with molora.record(model):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()  # the readers are gone, but the recompute must do what the first pass did
        assert not steps
    else:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        # twice each; the last layer of a block stops its recompute early once its tensors are there
        assert all(steps) and 2 * len(routed_layers(model)) - len(steps) == (0 if reentrant else 2)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6)


def test_a_layer_in_a_checkpoint_of_its_own():
    layer, x = routed(selector=TOP_2), torch.randn(2, 9, 24)
    for reentrant in (False, True):

        def call(t, reentrant=reentrant):
            return checkpoint(layer, t, use_reentrant=reentrant)

        assert_same(results(layer, x, call), one_by_one(layer, x))


def test_only_the_input_and_two_tables_are_kept_for_backward():
    layer = routed(d_in=64, d_out=128, ranks=(4,) * 8, selector=TOP_2)
    x, kept = torch.randn(4, 64, 64, requires_grad=True), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    assert sum(size for address, size in kept.items() if address not in parameters) == 4 * 64 * (64 + 2 * 8) * 4
    assert y.requires_grad


def test_weights_that_changed_since_forward_are_an_error():
    layer, x = routed(selector=TOP_2), torch.randn(2, 9, 24, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.molora_bank["default"].A.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_layers_that_ran_as_one_node_count_as_called(recwarn):
    model = wrapped()
    model(**tiny_inputs(model.base_model.model))
    assert not [w for w in recwarn if "were not called" in str(w.message)]
