"""AdapterFusion-style attention over what the experts give out, against the formula written out."""

import pytest
import torch

import molora
from molora.control import routed_layers
from molora.experts.forms import build_experts
from molora.posthoc import fusion
from molora.posthoc.rerouting import routers_of
from molora.routing.features import Place
from molora.routing.router import Router
from molora.routing.types import Context
from tests.adapters import logits, stir
from tests.posthoc.mixtures import mixture_of, save_loras, trainable
from tests.tiny import tiny_inputs, tiny_llama


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"), 3, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.parametrize("ranks", [[2, 2, 2], [1, 3, 2]])
def test_it_is_the_attention_of_the_paper(ranks):
    bank = build_experts("fusion", 6, 5, ranks, scaling=1.5)
    router = Router(6, 3, scorer={"name": "fusion", "width": 4}, place=Place(out=5))
    router.reads(bank)
    for parameter in [*bank.parameters(), *router.parameters()]:
        torch.nn.init.normal_(parameter)
    h = torch.randn(2, 7, 6)
    gates = router(h, Context()).gates
    got = bank.add_to(torch.zeros(2, 7, 5), h, gates)
    W_q, W_k, V = router.scorer.query, router.scorer.key, bank.value
    for row in range(2):
        for token in range(7):
            x = h[row, token]
            z = [1.5 * B @ (A @ x) for A, B in (super(type(bank), bank).pair(e) for e in range(3))]
            scores = torch.stack([(W_q @ x) @ (W_k @ one) for one in z])
            a = torch.softmax(scores, 0)
            torch.testing.assert_close(gates[row, token], a, atol=1e-5, rtol=1e-4)
            want = sum(weight * (V @ one) for weight, one in zip(a, z, strict=True))
            torch.testing.assert_close(got[row, token], want, atol=1e-4, rtol=1e-4)


def test_values_start_as_the_identity_and_are_what_is_trained_with_queries_and_keys(loras):
    plain = fusion.build(mixture_of(loras), values=False)
    model = fusion.build(mixture_of(loras))
    for mine, theirs in zip(routers_of(model), routers_of(plain), strict=True):
        mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-6, rtol=1e-6)
    parts = {name.rpartition(".")[2] for name in trainable(model)}
    assert parts == {"query", "key", "value"}
    before = {name: p.clone() for name, p in model.named_parameters() if name.endswith((".A", ".Bt"))}
    inputs = tiny_inputs(tiny_llama())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    losses = []
    for _ in range(5):
        outputs = model.train()(**inputs, labels=inputs["input_ids"])
        losses.append(float(outputs.loss.detach()))
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())


def test_the_penalty_is_a_hundredth_of_the_squared_distance_from_the_identity(loras):
    model = stir(fusion.build(mixture_of(loras), penalty=0.01)).train()
    banks = [layer.molora_bank["default"] for layer in routed_layers(model).values()]
    inputs = tiny_inputs(tiny_llama())
    outputs = model(**inputs, labels=inputs["input_ids"])
    want = 0.01 * sum((torch.eye(len(bank.value)) - bank.value).square().sum() for bank in banks)
    torch.testing.assert_close(outputs.aux_loss, want.detach())
    assert want > 0.1
    outputs.loss.backward()
    fresh = fusion.build(mixture_of(loras)).train()
    assert fresh(**inputs, labels=inputs["input_ids"]).aux_loss == 0
    without = fusion.build(mixture_of(loras), penalty=0.0).train()
    assert "aux_loss" not in without(**inputs, labels=inputs["input_ids"])


def test_the_gradient_of_the_penalty_pulls_to_the_identity(loras):
    model = stir(fusion.build(mixture_of(loras), penalty=0.01)).train()
    inputs = tiny_inputs(tiny_llama())
    loss = molora.add_aux(model, model(**inputs).logits.sum() * 0)
    loss.backward()
    for layer in routed_layers(model).values():
        value = layer.molora_bank["default"].value
        torch.testing.assert_close(value.grad, -0.02 * (torch.eye(len(value)) - value.detach()))


def test_saving_and_loading_keeps_all_of_it(loras, tmp_path):
    model = stir(fusion.build(mixture_of(loras))).eval()
    molora.save(model, tmp_path)
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path)), logits(model))


def test_one_expert_with_its_value_is_exported_exactly(loras, tmp_path):
    from peft import PeftModel

    model = stir(fusion.build(mixture_of(loras))).eval()
    molora.export_peft(model, tmp_path, expert=1)
    with molora.pin(model, torch.tensor([0.0, 1.0, 0.0])):
        want = logits(model)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), want)


def test_identical_experts_get_equal_weights_whatever_is_learned(loras):
    model = fusion.build(mixture_of([loras[0]] * 3))
    for router in routers_of(model):
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter)
    with molora.record(model) as log, torch.no_grad():
        model(**tiny_inputs(tiny_llama()))
    assert all(
        torch.allclose(routing.gates, torch.full_like(routing.gates, 1 / 3), atol=1e-5) for routing in log.values()
    )


def test_the_temperature_may_be_annealed_by_progress(loras):
    model = fusion.build(mixture_of(loras), temperature={"schedule": "linear", "from": 50.0, "to": 1.0})
    for router in routers_of(model):
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter)
    spreads = []
    for progress in (0.0, 1.0):
        molora.set_progress(model, progress)
        for _ in range(2):  # a forward moves nothing
            with molora.record(model) as log, torch.no_grad():
                model(**tiny_inputs(tiny_llama()))
            spreads.append(torch.stack([routing.gates.std(-1).mean() for routing in log.values()]))
    assert torch.equal(spreads[0], spreads[1]) and torch.equal(spreads[2], spreads[3])
    assert (spreads[2] > spreads[0]).all()
