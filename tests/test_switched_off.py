"""Routers that need more than one forward ask for it only when they decide: not while they are off, pinned or idle."""

import pytest
import torch

import molora
from tests.adapters import stir
from tests.tiny import tiny_inputs, tiny_llama

RECIPES = {
    "remembers": {"feature": "similarity", "selector": {"name": "top_k", "k": 2}},
    "by_prompt": {"granularity": "prompt"},
    "looks_ahead": {
        "feature": "first_pass",
        "scorer": "xlora",
        "share": "model",
        "target_modules": ["q_proj", "v_proj"],
    },
}
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def wrapped(name):
    return stir(molora.wrap(tiny_llama(), {"experts": {"num": 3, "rank": 2}, **RECIPES[name]})).eval()


@pytest.mark.parametrize("name", list(RECIPES))
def test_generating_without_the_adapter_is_generating_with_the_base(name):
    model, inputs = wrapped(name), tiny_inputs(tiny_llama())
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model.generate(**inputs, **OPTIONS), tiny_llama().generate(**inputs, **OPTIONS))


@pytest.mark.parametrize("name", list(RECIPES))
def test_pinned_gates_need_nothing_of_the_routers(name):
    model, inputs = wrapped(name), tiny_inputs(tiny_llama())
    with torch.no_grad(), molora.pin(model, torch.tensor([1.0, 0.0, 0.5])):
        fast, slow = (model.generate(**inputs, **OPTIONS, use_cache=cache) for cache in (True, False))
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("name", list(RECIPES))
def test_an_idle_adapter_costs_nothing(name):
    model, inputs = wrapped(name), tiny_inputs(tiny_llama())
    model.add_adapter("other", molora.MoloraConfig.from_recipe({"experts": {"num": 2, "rank": 2}}))
    model.set_adapter("other")
    seen = []
    model.get_base_model().model.embed_tokens.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    with torch.no_grad():
        model.generate(**inputs, **OPTIONS)
    assert seen == [7, 1, 1, 1]
