"""Routers stay in float32 when the model around them is cast, or when they are lent half-precision parameters."""

import copy

import pytest
import torch

import molora
from molora.control import routed_layers
from molora.routing.router import Router
from molora.routing.types import Context
from tests.tiny import tiny_inputs, tiny_llama

# a linear router with a price, a GRU over the layers, branches mixed by a gate, and scorers that read the experts
RECIPES = ["dynmole", "smora", "rmoe", "s2moe", "vqmoe", "mora_self_activated", "read_me_pregating", "t2mir", "promoe"]
CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "to device and dtype": lambda model: model.to("cpu", torch.bfloat16),
}


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "molora_bank" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def routers_of(model):
    return {
        name: layer.molora_router["default"]
        for name, layer in routed_layers(model, "default").items()
        if layer.molora_router
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_cast_model_trains_and_decides_in_float32(recipe):
    model = shaken(molora.wrap(tiny_llama(), recipe)).train()
    before = {name: copy.deepcopy(router.state_dict()) for name, router in routers_of(model).items()}
    model = model.to(torch.bfloat16)
    for name, router in routers_of(model).items():
        for key, value in router.state_dict().items():
            assert torch.equal(value, before[name][key]) and value.dtype == before[name][key].dtype, (name, key)
    batch = tiny_inputs(model, batch=4)
    loss = model(**batch, labels=batch["input_ids"], task_ids=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    assert model(**batch).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("cast", CASTS)
def test_every_way_to_cast(cast):
    model = CASTS[cast](molora.wrap(tiny_llama(), "smora"))
    floats = [t for router in routers_of(model).values() for t in router.state_dict().values() if t.is_floating_point()]
    assert floats and {t.dtype for t in floats} == {torch.float32}
    assert next(model.get_base_model().parameters()).dtype != torch.float32


def test_the_price_of_a_cast_model_still_moves_by_its_rate():
    """In bfloat16 a price of 0.01 cannot move by 1e-5 at all."""
    model = molora.wrap(tiny_llama(), "smora").train()
    for router in routers_of(model).values():
        router.price.value.fill_(0.01)
    model = model.to(torch.bfloat16)
    batch = tiny_inputs(model, batch=4)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    molora.settle(model)
    moved = torch.cat([(router.price.value - 0.01).abs() for router in routers_of(model).values()])
    assert moved.max() > 0
    torch.testing.assert_close(moved[moved > 1e-6], torch.full_like(moved[moved > 1e-6], 1e-5), rtol=0.01, atol=0)


@pytest.mark.parametrize("scorer", ["linear", "cosine", {"name": "mlp", "hidden": 4}])
def test_parameters_lent_in_half_precision_are_used_in_float32(scorer):
    """FSDP gathers in its own dtype: value and gradient are those of a float32 router with the rounded values."""
    torch.manual_seed(0)
    lent = Router(16, 4, scorer=scorer, selector={"name": "top_k", "k": 2})
    for parameter in lent.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    full = Router(16, 4, scorer=scorer, selector={"name": "top_k", "k": 2})
    full.load_state_dict({key: value.float() for key, value in lent.state_dict().items()})
    x = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    gates = []
    for router in (lent, full):
        routing = router(x, Context())
        assert routing.gates.dtype == routing.scores.dtype == torch.float32
        routing.gates.square().sum().backward()
        gates.append(routing.gates)
    assert torch.equal(*gates)
    for mine, other in zip(lent.parameters(), full.parameters(), strict=True):
        assert mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad, other.grad.to(torch.bfloat16))
