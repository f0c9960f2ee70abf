"""The single C call of router and experts decides as the router does, and only where nobody else needs the decision."""

import copy
import pickle

import pytest
import torch
from torch import nn

import molora
from molora.control import routed_layers
from molora.experts.bank import ExpertBank
from molora.kernels import native, routed
from molora.kernels.choose import kernel
from molora.routing.router import Router
from molora.routing.types import Context
from tests.tiny import tiny_inputs, tiny_llama

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler here")

SELECTORS = [
    "softmax",
    {"name": "top_k", "k": 1},
    {"name": "top_k", "k": 2},
    {"name": "top_k", "k": 3, "normalise": "none"},
    {"name": "top_k", "k": 2, "normalise": "sumk", "weight": "const", "omega": 0.7},
    {"name": "top_k", "k": 6},
    {"name": "top_k", "k": 9, "clamp": True},
    {"name": "top_p", "p": 0.5},
    {"name": "top_p", "p": 0.0, "min_k": 0},
    {"name": "top_p", "p": 1.0, "min_k": 3, "normalise": "sum1"},
    {"name": "top_p", "p": 0.4, "crossing": "exclude", "min_k": 0, "normalise": "sum1"},
    {"name": "entropy_switch", "threshold": 0.8},
    {"name": "entropy_switch", "threshold": 0.7, "entropy": "shannon", "min_k": 1},
    {"name": "entropy_switch", "threshold": 0.7, "entropy": "renyi", "q": 2.0, "crossing": "include"},
    {"name": "entropy_switch", "threshold": 1.0, "q": 1.0, "normalise": "sum1"},
]


def named(selector):
    return selector if isinstance(selector, str) else "-".join(str(value) for value in selector.values())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("selector", SELECTORS, ids=named)
def test_it_decides_as_the_router_does(selector, bias):
    torch.manual_seed(3)
    bank = ExpertBank(24, 20, [4] * 6, scaling=0.5)
    nn.init.normal_(bank.B)
    price = "sign" if isinstance(selector, dict) and selector["name"] == "top_k" else None
    scorer = {"name": "linear", "init": 0.4, "bias": bias}
    router = Router(24, 6, scorer=scorer, selector=selector, price=price, link={"name": "softmax", "temperature": 0.8})
    if bias:
        nn.init.normal_(router.scorer.bias)
    if price:
        router.price.value.uniform_(-0.2, 0.2)
    x, y = torch.randn(3, 50, 24), torch.randn(3, 50, 20)
    with torch.no_grad():
        gates = router(x, Context()).gates
        wanted = y + bank(x, gates)
        for rows in (slice(0, 3), slice(0, 1)):
            found = y[rows].clone()
            call = routed.Routed(bank, router.scorer, router.price, bank.layout, router.plain_form())
            call._takes_many = True  # so that it also takes many tokens, whatever pays
            assert call.add_to(found, x[rows])
            torch.testing.assert_close(found, wanted[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(3, 5), (15,), (1, 15)])
def test_a_decision_that_is_kept_is_the_routers(lead):
    torch.manual_seed(3)
    bank = ExpertBank(24, 20, [4] * 6)
    nn.init.normal_(bank.B)
    router = Router(24, 6, scorer={"name": "linear", "init": 0.4}, selector={"name": "top_k", "k": 2})
    x, y, kept = torch.randn(*lead, 24), torch.randn(*lead, 20), []
    with torch.no_grad():
        wanted = router(x.view(-1, 1, 24), Context())
        result = y + bank(x, wanted.gates.view(*lead, 6))
        call = routed.Routed(bank, router.scorer, None, bank.layout, router.plain_form())
        assert call.add_to(y, x, kept)
    torch.testing.assert_close(y, result)
    for mine, theirs in zip(kept, (wanted.gates, wanted.probs, wanted.scores), strict=True):
        torch.testing.assert_close(mine, theirs[:, 0])


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "prompt"},
        {"scorer": {"name": "mlp"}},
        {"scorer": {"name": "linear", "activation": "gelu"}},
        {"link": "sigmoid"},
        {"link": {"name": "softmax", "temperature": {"schedule": "linear", "from": 2.0, "to": 1.0}}},
        {"selector": {"name": "top_k", "k": {"schedule": "linear", "from": 4, "to": 2}}},
        {"selector": {"name": "top_k", "k": 2, "weight": "biased"}, "price": "sign"},
    ],
)
def test_routers_that_it_does_not_know_are_left_to_torch(options):
    assert Router(8, 4, **options).plain_form() is None


def test_sparse_gradients_are_only_for_selectors_that_say_so():
    assert Router(8, 4, selector="top_k").sparse and Router(8, 4, selector="top_p").sparse
    assert not Router(8, 4, selector="softmax").sparse
    assert not Router(8, 4, selector={"name": "top_k", "grad": "straight_through"}).sparse


def wrapped(**changes):
    options = dict(experts={"num": 6, "rank": 4}, scorer={"init": 1.0}, selector={"name": "top_k", "k": 2}, losses=[])
    model = molora.wrap(tiny_llama(), "molora", **(options | changes)).eval()
    torch.manual_seed(5)
    for layer in routed_layers(model).values():
        nn.init.normal_(layer.molora_bank["default"].B, std=0.1)
    return model


@pytest.fixture
def counted(monkeypatch):
    """How many layers ran as a single call."""
    calls = []
    inner = routed.Routed.add_to

    def add_to(self, y, x, kept=None):
        done = inner(self, y, x, kept)
        calls.append(done)
        return done

    monkeypatch.setattr(routed.Routed, "add_to", add_to)
    return calls


def test_a_model_decodes_with_one_call_per_layer(counted):
    model = wrapped()
    inputs = tiny_inputs(model.base_model.model, batch=3, length=6)
    with torch.no_grad():
        fast = model(**inputs).logits
        assert len(counted) == len(routed_layers(model)) and all(counted)
        with kernel("dense"):
            torch.testing.assert_close(model(**inputs).logits, fast, rtol=1e-4, atol=1e-4)
    assert len(counted) == len(routed_layers(model))


@pytest.mark.parametrize("why", ["recorded", "pinned", "graded", "hooked", "dropout", "checkpointed"])
def test_a_decision_that_others_need_is_taken_by_the_trace(why, counted):
    model = wrapped(**({"experts": {"num": 6, "dropout": 0.5}} if why == "dropout" else {}))
    inputs = tiny_inputs(model.base_model.model)
    if why == "hooked":
        for layer in routed_layers(model).values():
            layer.base_layer.register_forward_hook(lambda *a: None)
    if why == "graded":
        model(**inputs)
    elif why == "dropout":
        model.train()
        with torch.no_grad():
            model(**inputs)
    elif why == "checkpointed":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    else:
        with torch.no_grad():
            if why == "recorded":
                with molora.record(model) as log:
                    model(**inputs)
                assert len(log) == len(routed_layers(model))
            elif why == "pinned":
                with molora.pin(model, torch.zeros(6)):
                    model(**inputs)
            else:
                model(**inputs)
    assert not any(counted)


@pytest.fixture
def decided(monkeypatch):
    """How many layers ran as a single call under known gates."""
    calls = []
    inner = routed.Decided.add_to

    def add_to(self, y, x, gates):
        done = inner(self, y, x, gates)
        calls.append(done)
        return done

    monkeypatch.setattr(routed.Decided, "add_to", add_to)
    return calls


GATES = {
    "one mixture": torch.tensor([0.5, 0.0, 0.0, 2.0, 0.0, 0.0]),
    "a tenant per row": torch.eye(6)[[4, 0, 4]][:, None],
    "rows without experts": torch.eye(6)[[4, 0, 4]][:, None] * torch.tensor([1.0, 0.0, 0.0])[:, None, None],
    "half precision": torch.eye(6, dtype=torch.bfloat16)[[1, 2, 3]][:, None],
    "per position": torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(1)),
    "per token": torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
def test_pinned_gates_need_one_call_per_layer_and_change_nothing(gates, decided):
    model = wrapped()
    inputs = tiny_inputs(model.base_model.model, batch=3, length=6)
    with torch.no_grad(), molora.pin(model, gates):
        fast = model(**inputs).logits
        assert len(decided) == len(routed_layers(model))
        assert all(decided) == (gates.shape[:2] != (1, 6))  # gates that repeat over rows take the general way
        with kernel("dense"):
            torch.testing.assert_close(model(**inputs).logits, fast, rtol=1e-4, atol=1e-4)
    assert len(decided) == len(routed_layers(model))


@pytest.mark.parametrize("changes", [{"share": "block"}, {"share": "group"}, {"granularity": "prompt"}], ids=str)
def test_decisions_that_are_taken_once_are_applied_in_one_call(changes, decided, counted):
    model = wrapped(**changes)
    inputs = tiny_inputs(model.base_model.model, batch=3, length=6)
    with torch.no_grad():
        fast = model(**inputs).logits
        leading = 0 if "granularity" in changes else len([n for n, _ in model.named_modules() if n.endswith(".scorer")])
        assert len(counted) == leading and all(counted)  # these decide and act in one call
        assert len(decided) == len(routed_layers(model)) - leading and all(decided)
        with kernel("dense"):
            torch.testing.assert_close(model(**inputs).logits, fast, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("why", ["graded", "training", "frozen", "many tokens", "forced"])
def test_known_gates_take_the_general_way_where_one_call_would_not_do(why, decided):
    frozen = {"experts": {"num": 6, "rank": 4, "frozen": [1]}} if why == "frozen" else {}
    model = wrapped(**frozen).train(why == "training")
    inputs = tiny_inputs(model.base_model.model, batch=8, length=12 if why == "many tokens" else 3)
    with molora.pin(model, torch.eye(6)[1]):
        if why == "graded":
            model(**inputs)
        elif why == "forced":
            with kernel("fused"), torch.no_grad():
                model(**inputs)
        else:
            with torch.no_grad():
                model(**inputs)
    assert not any(decided)


def test_changed_weights_count_at_once_and_copies_are_independent():
    model = wrapped()
    inputs = tiny_inputs(model.base_model.model)

    def check(which):
        with torch.no_grad():
            found = which(**inputs).logits
            with kernel("dense"):
                torch.testing.assert_close(found, which(**inputs).logits, rtol=1e-4, atol=1e-4)
        return found

    first = check(model)
    twin = copy.deepcopy(model)
    layer = next(iter(routed_layers(model).values()))
    bank = layer.molora_bank["default"]
    bank.write(1, torch.randn(4, bank.d_in), torch.randn(bank.d_out, 4))
    second = check(model)
    bank.A.data = torch.randn_like(bank.A)
    third = check(model)
    bank.Bt = nn.Parameter(torch.randn_like(bank.Bt))
    fourth = check(model)
    assert not torch.equal(first, second) and not torch.equal(second, third) and not torch.equal(third, fourth)
    torch.testing.assert_close(check(twin), first)
    calls = pickle.loads(pickle.dumps(layer._calls))
    assert calls._made == {} and calls._decided == {}
