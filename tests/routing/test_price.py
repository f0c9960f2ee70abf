"""Prices: the sign rule, when it moves, and that it balances what it should."""

import pickle

import pytest
import torch

import molora
from molora.control import routed_layers
from molora.errors import ConfigError
from molora.routing.price import Price, check_price, prices
from molora.routing.router import Router
from molora.routing.types import Context
from tests.tiny import tiny_inputs, tiny_llama


def a_price(experts=4, **options):
    return Price(experts, prices.build({"name": "sign", **options}))


def choices(*rows):
    return torch.tensor([rows]).bool()


def test_sign_rule_by_hand():
    """Counts 4, 0, 2, 2 with mean 2: dearer, cheaper, and twice unchanged."""
    rule = prices.build({"name": "sign", "rate": 0.5})
    start = torch.tensor([1.0, 1.0, -1.0, 0.0])
    assert rule(start, torch.tensor([4.0, 0.0, 2.0, 2.0])).tolist() == [1.5, 0.5, -1.0, 0.0]


def test_minus_the_price_is_smoras_bias():
    """b += rate * sign(mean - count), from zeros."""
    price, bias, rate = a_price(rate=1e-5), torch.zeros(4), 1e-5
    for _ in range(20):
        selected = torch.rand(2, 5, 4) < torch.tensor([0.9, 0.5, 0.3, 0.1])
        count = selected.sum((0, 1)).float()
        bias += rate * torch.sign(count.mean() - count)
        price.observe(selected, torch.ones(2, 5))
        price.settle()
    torch.testing.assert_close(-price.value, bias, rtol=0, atol=1e-12)
    assert price.value.abs().max() <= 20 * rate * (1 + 1e-5)


def test_moves_only_when_settled_and_only_once():
    price = a_price(rate=1.0)
    price.observe(choices([1, 0, 0, 0], [1, 0, 0, 0]), torch.ones(1, 2))
    assert price.value.eq(0).all()
    price.settle()
    assert price.value.tolist() == [1, -1, -1, -1]
    price.settle()
    assert price.value.tolist() == [1, -1, -1, -1]


def test_micro_batches_add_up_before_the_step():
    price = a_price(rate=1.0)
    price.observe(choices([1, 0, 0, 0]), torch.ones(1, 1))
    price.observe(choices([0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]), torch.ones(1, 3))
    price.settle()  # counts 1, 3, 0, 0; the mean is 1
    assert price.value.tolist() == [0, 1, -1, -1]


def test_padding_is_not_counted():
    price = a_price(rate=1.0)
    price.observe(choices([1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]), torch.tensor([[1.0, 0.0, 0.0]]))
    price.settle()
    assert price.value.tolist() == [1, -1, -1, -1]


def test_the_value_is_saved_and_pending_counts_are_not():
    price = a_price(rate=1.0)
    price.observe(choices([1, 0, 0, 0]), torch.ones(1, 1))
    assert list(price.state_dict()) == ["value"] and list(price.parameters()) == []
    again = pickle.loads(pickle.dumps(price))
    again.settle()
    assert again.value.eq(0).all() and price.chosen is not None


def skewed_router(rate):
    router = Router(
        8,
        8,
        link="sigmoid",
        selector={"name": "top_k", "k": 2, "normalise": "sumk"},
        price={"name": "sign", "rate": rate},
    )
    with torch.no_grad():
        router.scorer.weight.normal_(std=0.2)
        router.scorer.weight[:, 0] = torch.linspace(1, -1, 8)  # the first feature favours the first experts
    return router


def batch_of(generator):
    x = torch.randn(4, 32, 8, generator=generator)
    x[..., 0] = 1.0
    return x


def test_load_evens_out_on_a_skewed_router():
    router, generator = skewed_router(rate=5e-3), torch.Generator().manual_seed(0)

    def variation():
        load = router(batch_of(generator), Context()).selected.sum((0, 1)).float()
        return (load.std(unbiased=False) / load.mean()).item()

    before = variation()
    assert before > 1.0
    for _ in range(150):
        routing = router(batch_of(generator), Context())
        router.price.observe(routing.selected, torch.ones(4, 32))
        router.price.settle()
    after = variation()
    assert after < 0.25
    assert router.price.value.abs().max() <= 150 * 5e-3 + 1e-6


def test_gates_weigh_with_the_unpriced_score():
    router = skewed_router(rate=1e-3)
    router.price.value.copy_(torch.linspace(0.4, -0.4, 8))
    routing = router(batch_of(torch.Generator().manual_seed(1)), Context())
    plain = torch.sigmoid(routing.scores)
    for gates, s in zip(routing.gates.reshape(-1, 8), plain.reshape(-1, 8), strict=True):
        chosen = (s - router.price.value).topk(2).indices.tolist()
        expected = torch.zeros(8)
        expected[chosen] = 2 * s[chosen] / s[chosen].sum()
        torch.testing.assert_close(gates, expected)


def test_a_price_gets_no_gradient_and_is_no_parameter():
    router = skewed_router(rate=1e-3)
    assert "price.value" in dict(router.named_buffers()) and "price.value" not in dict(router.named_parameters())
    router.requires_grad_(True)  # as PEFT does to everything of an active adapter
    assert not router.price.value.requires_grad


@pytest.mark.parametrize("selector", ["softmax", "top_p", "entropy_switch"])
def test_selectors_without_a_price_say_so(selector):
    with pytest.raises(ConfigError, match=f"selector '{selector}' cannot use a price; use top_k"):
        Router(4, 3, selector=selector, price="sign")


def test_specs_are_checked():
    assert check_price(None) == [] and check_price("sign") == [] and check_price({"name": "sign", "rate": 1e-4}) == []
    assert "did you mean 'sign'" in check_price("sing")[0]
    assert "no option 'speed'" in check_price({"name": "sign", "speed": 1})[0]
    assert "neither a name nor a mapping" in check_price(3)[0]


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_choices_are_counted_once_whatever_checkpointing_does(use_reentrant):
    """Gradient checkpointing runs routers twice; the sign rule alone would not show it."""
    model = molora.wrap(tiny_llama(), "smora").train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    inputs = tiny_inputs(model, batch=2, length=7)
    inputs["attention_mask"][0, :3] = 0
    prices_of = [layer.molora_router["default"].price for layer in routed_layers(model).values()]
    for forwards in (1, 2):  # two micro-batches of one step
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert {price.chosen.sum().item() for price in prices_of} == {forwards * (14 - 3) * 8}
    model.eval()
    with torch.no_grad():
        model(**inputs)  # an evaluation in between counts nothing
    assert {price.chosen.sum().item() for price in prices_of} == {2 * (14 - 3) * 8}
    molora.settle(model)
    assert all(price.chosen is None for price in prices_of)


# --- the other rules --------------------------------------------------------------------------------------------------

MEASURING = ["dual", "quantile", "sinkhorn", "assignment", "threshold"]


def test_proportional_rule_by_hand():
    """Counts 4, 0, 2, 2 with mean 2: the deviations are 1, -1, 0, 0 in units of the mean."""
    rule = prices.build({"name": "proportional", "rate": 0.5})
    assert rule(torch.zeros(4), torch.tensor([4.0, 0.0, 2.0, 2.0])).tolist() == [0.5, -0.5, 0.0, 0.0]
    assert rule(torch.ones(4), torch.zeros(4)).tolist() == [1, 1, 1, 1]


class Told:
    """A rule that measures whatever the values say, to see what Price does with it."""

    momentum = 0.75

    def measure(self, values, selected, real, price):
        return values[0]


def tell(price, *values):
    for value in values:
        value = torch.tensor([[value]])
        price.observe(value > 0, torch.ones(1, 1), value)


def test_measured_prices_are_averaged_over_forwards_and_then_over_steps():
    """The mean of a step; the plain mean of the first steps, then weight 1 - momentum for the newest."""
    price = Price(2, Told())
    tell(price, [1.0, 2.0], [3.0, 4.0])
    assert price.value.eq(0).all()
    price.settle()
    assert price.value.tolist() == [2.0, 3.0]  # not 0.25 of it: there is no past yet
    tell(price, [4.0, 5.0])
    price.settle()
    assert price.value.tolist() == [3.0, 4.0]
    for _ in range(2):
        tell(price, [3.0, 4.0])
        price.settle()
    tell(price, [7.0, 4.0])
    price.settle()
    torch.testing.assert_close(price.value, torch.tensor([4.0, 4.0]))
    assert sorted(price.state_dict()) == ["settled", "value"] and price.settled == 5


def test_ranks_are_averaged(monkeypatch):
    """Another process has measured (5, 6) twice; the mean over all three forwards counts."""
    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(torch.tensor([10.0, 12.0, 2.0])))
    price = Price(2, Told())
    tell(price, [2.0, 3.0])
    price.settle()
    assert price.value.tolist() == [4.0, 5.0]


def test_a_price_found_by_the_selector_is_taken_over():
    price = Price(3, prices.build("assignment"))
    price.observe(torch.ones(1, 2, 3).bool(), torch.ones(1, 2), None, torch.tensor([[[1.0, -1.0, 0.0]]]))
    price.settle()
    assert price.value.tolist() == [1.0, -1.0, 0.0]
    with pytest.raises(ConfigError, match="pass values"):
        price.observe(torch.ones(1, 2, 3).bool(), torch.ones(1, 2))


def violation_of(selected):
    load = selected.float().flatten(0, -2).sum(0)
    return (load.max() / load.mean() - 1).item()


@pytest.mark.parametrize(
    ("spec", "steps", "reached"),
    [
        ({"name": "sign", "rate": 1e-3}, 1500, 0.25),
        ({"name": "proportional", "rate": 0.01}, 200, 0.35),
        ({"name": "dual", "steps": 4}, 20, 0.35),
        ({"name": "quantile"}, 40, 0.25),
        ({"name": "threshold"}, 20, 0.4),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else str(value),
)
@pytest.mark.proves("bip", "smora")
def test_the_price_of_earlier_batches_balances_new_ones(spec, steps, reached):
    """16 experts, 4 per token, skewed: the violation falls from above 1.2, on tokens that no price has seen."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.25 * torch.randn(16, 16, generator=generator)
    price = Price(16, prices.build(spec))

    def batch(tokens):
        scores = torch.randn(1, tokens, 16, generator=generator) @ weight.t() + torch.linspace(1, -1, 16)
        probs = torch.softmax(scores, -1)
        chosen = (probs - price.value).topk(4, -1).indices
        return probs, torch.zeros_like(probs, dtype=torch.bool).scatter(-1, chosen, True)

    assert violation_of(batch(8192)[1]) > 1.2
    for _ in range(steps):
        probs, selected = batch(256)
        price.observe(selected, torch.ones(1, 256), probs)
        price.settle()
    assert violation_of(batch(8192)[1]) < reached


@pytest.mark.parametrize("name", ["sign", "proportional", "dual", "quantile", "sinkhorn", "threshold"])
def test_prices_observe_inside_a_compiled_graph(name):
    """No break in the graph, and the same numbers; the exact assignment alone leaves it."""
    probs = torch.softmax(torch.randn(2, 9, 5), -1)
    selected, weights = probs > 0.2, (torch.arange(9) < 7).float().expand(2, 9)
    spec = {"name": name, "tolerance": 0.0} if name == "sinkhorn" else name
    found = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager", fullgraph=True)):
        price = Price(5, prices.build(spec))
        wrap(price.observe)(selected, weights, probs)
        price.settle()
        found.append(price.value)
    torch.testing.assert_close(found[1], found[0])
    assert found[0].ne(0).any()


@pytest.mark.parametrize("name", MEASURING)
def test_measured_prices_are_counted_once_under_checkpointing_and_saved(name, tmp_path):
    selector = "expert_choice" if name == "threshold" else "base" if name == "assignment" else {"name": "top_k", "k": 2}
    values = []
    for use_reentrant in (None, False, True):
        torch.manual_seed(5)
        changes = {"price": name, "selector": selector, "target_modules": ["q_proj", "down_proj"]}
        model = molora.wrap(tiny_llama(), {}, **changes).train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        inputs = tiny_inputs(model, batch=2, length=7)
        inputs["attention_mask"][0, :3] = 0
        for _ in range(2):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        molora.settle(model)
        values.append([layer.molora_router["default"].price.value for layer in routed_layers(model).values()])
        assert all(value.ne(0).any() for value in values[-1])
    for other in values[1:]:
        for a, b in zip(values[0], other, strict=True):
            torch.testing.assert_close(a, b)
    model.save_pretrained(tmp_path)
    again = molora.wrap(tiny_llama(), {}, **changes)
    again.load_adapter(tmp_path, "other")
    for layer, value in zip(routed_layers(again, "other").values(), values[-1], strict=True):
        assert torch.equal(layer.molora_router["other"].price.value, value)
        assert layer.molora_router["other"].price.settled == 1


@pytest.mark.parametrize("name", MEASURING)
def test_momentum_is_checked(name):
    assert "momentum must be in [0, 1), got 1.0" in check_price({"name": name, "momentum": 1.0})[0]
