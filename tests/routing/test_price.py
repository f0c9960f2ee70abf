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
