"""A batch of many requests in one forward equals the requests one by one, for rows and for packed batches."""

import pytest
import torch

import molora
from molora.control import trace_of
from molora.errors import RoutingError
from molora.routing.rows import Rows
from tests import tiny

TARGETS = ["q_proj", "down_proj"]


def _served():
    """Return a model with a slot adapter of four experts and a routed mixture, neither of them zero."""
    torch.manual_seed(0)
    model = molora.wrap(
        tiny.tiny_llama(),
        {
            "experts": {"num": 4, "rank": 2},
            "scorer": {"name": "constant", "learn": False},
            "selector": "softmax",
            "target_modules": TARGETS,
        },
        adapter_name="slots",
    )
    model.add_adapter("mixture", molora.MoloraConfig.from_recipe("mixtral", target_modules=TARGETS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def _logits(model, ids, rows):
    trace = trace_of(model)
    trace.rows = rows
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits
    finally:
        trace.rows = None


def test_rows_of_a_batch_equal_single_runs():
    model = _served()
    ids = torch.randint(3, 90, (5, 6), generator=torch.Generator().manual_seed(1))
    gates = torch.zeros(5, 1, 4)
    gates[0, 0, 2] = 1.0  # one adapter
    gates[1, 0, 0], gates[1, 0, 3] = 0.7, -0.3  # a weighted mix
    mask = torch.zeros(5, 1, 1)
    mask[2] = mask[4] = 1.0  # a routed mixture; row 3 wants the base
    together = _logits(model, ids, {"slots": Rows(gates=gates), "mixture": Rows(mask=mask)})

    with torch.no_grad():
        model.set_adapter("slots")
        for row in (0, 1):
            with molora.pin(model, gates[row, 0]):
                alone = model(input_ids=ids[row : row + 1], use_cache=False).logits
            assert torch.allclose(together[row : row + 1], alone, atol=2e-5)
        model.set_adapter("mixture")
        for row in (2, 4):
            alone = model(input_ids=ids[row : row + 1], use_cache=False).logits
            assert torch.allclose(together[row : row + 1], alone, atol=2e-5)
        with model.disable_adapter():
            base = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(together[3], base[3], atol=2e-5)
    assert not torch.allclose(together[0], base[0], atol=1e-2)  # and the others are not the base
    assert not torch.allclose(together[2], base[2], atol=1e-2)


def test_a_packed_row_has_gates_for_each_token():
    model = _served()
    layer = next(m for m in model.modules() if hasattr(m, "molora_bank") and "slots" in m.molora_bank)
    x = torch.randn(1, 5, layer.d_in)
    gates = torch.zeros(1, 5, 4)
    gates[0, torch.arange(4), torch.arange(4)] = 1.0
    trace = trace_of(model)
    trace.rows = {"slots": Rows(gates=gates)}
    with torch.no_grad():
        together = layer(x)
        base = layer.base_layer(x)
        bank = layer.molora_bank["slots"]
        for token in range(4):
            delta = bank.delta_weight(torch.nn.functional.one_hot(torch.tensor(token), 4).float())
            assert torch.allclose(together[0, token], base[0, token] + x[0, token] @ delta.T, atol=1e-5)
    assert torch.equal(together[0, 4], base[0, 4])
    trace.rows = None


def test_an_empty_batch_description_is_the_base_model():
    model = _served()
    ids = torch.randint(3, 90, (2, 4))
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(_logits(model, ids, {}), base)


def test_rows_that_do_not_fit_are_refused():
    model = _served()
    with pytest.raises(RoutingError, match=r"3 rows and 1 positions.*2 rows and 4 positions"):
        _logits(model, torch.randint(3, 90, (2, 4)), {"slots": Rows(gates=torch.zeros(3, 1, 4))})
    with pytest.raises(ValueError, match="float32"):
        Rows(gates=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="not both"):
        Rows(gates=torch.zeros(1, 1, 4), mask=torch.ones(1, 1, 1))


def test_a_router_that_fails_harms_no_other_row():
    model = _served()
    ids = torch.randint(3, 90, (2, 4), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_router.mixture" in name:
                parameter.fill_(float("nan"))
    mask = torch.tensor([1.0, 0.0]).reshape(2, 1, 1)
    found = _logits(model, ids, {"mixture": Rows(mask=mask)})
    assert torch.allclose(found[1], _logits(model, ids, {})[1], atol=2e-5)
    model.base_model.trace.readers.append(lambda *told: None)  # the way of a batch that somebody watches
    assert torch.allclose(_logits(model, ids, {"mixture": Rows(mask=mask)})[1], found[1], atol=2e-5)
