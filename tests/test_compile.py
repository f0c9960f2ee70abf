"""torch.compile of a whole wrapped model: no graph break, equal values and gradients."""

import copy

import pytest
import torch

import molora
from tests.test_tuner import batch_for, make_experts_act
from tests.tiny import tiny_llama

RECIPES = {
    "top_k": {"selector": {"name": "top_k", "k": 2}},
    "dynmole": "dynmole",
    "shared": {"selector": {"name": "top_k", "k": 2}, "share": "block"},
    "prompt": {"selector": {"name": "top_k", "k": 2}, "granularity": "prompt"},
}
LOSS = [{"name": "switch_balance", "weight": 0.1}]


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_are_equal_and_no_graph_breaks(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = make_experts_act(molora.wrap(tiny_llama(num_hidden_layers=1), RECIPES[name], losses=LOSS)).train()
    batch = batch_for(tiny_llama())
    eager(**batch).loss.backward()  # also takes the one look for layers that are never called
    eager.zero_grad()
    compiled = copy.deepcopy(eager)
    compiled(**batch).loss.backward()
    compiled.zero_grad()
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # the second call must not compile again with another result
        first, second = eager(**batch), run(**batch)
        torch.testing.assert_close(second.loss, first.loss)
        first.loss.backward()
        second.loss.backward()
        wanted = {n: p.grad for n, p in eager.named_parameters() if p.requires_grad}
        for name_, parameter in compiled.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, wanted[name_], rtol=1e-4, atol=1e-6)
        eager.zero_grad()
        compiled.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(run.eval()(**batch).logits, eager.eval()(**batch).logits, rtol=1e-4, atol=1e-5)
