"""LoRA-Mixer over finished LoRAs: exact experts, routers alone learn, and its loss."""

import pytest
import torch
from peft import PeftModel

import molora
from molora import ConfigError
from molora.posthoc import lora_mixer
from molora.posthoc.rerouting import routers_of
from tests.adapters import logits
from tests.posthoc.mixtures import mixture_of, save_lora, save_loras, trainable
from tests.tiny import tiny_inputs, tiny_llama


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    root = tmp_path_factory.mktemp("loras")
    other = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
    return [*save_loras(root, 2), save_lora(root / "other", 9, **other), save_lora(root / "last", 10)]


def shaken(model):
    for router in routers_of(model):
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_a_one_hot_router_is_that_adapter_alone_in_peft(loras):
    model = lora_mixer.build(mixture_of(loras))
    for number, folder in enumerate(loras):
        want = logits(PeftModel.from_pretrained(tiny_llama(), folder).eval())
        with molora.pin(model, torch.eye(4)[number]):
            torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)


def test_frozen_experts_are_bit_identical_after_training_the_routers(loras):
    model = shaken(lora_mixer.build(mixture_of(loras))).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    inputs, losses = tiny_inputs(tiny_llama()), []
    for _ in range(10):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(model) and all(".molora_router." in name for name in moved)
    assert losses[-1] < losses[0]


def test_the_balance_term_is_alpha_over_the_number_of_experts_at_uniform(loras):
    model = lora_mixer.build(mixture_of(loras), weight=0.3, entropy=0.0).train()
    for router in routers_of(model):
        torch.nn.init.zeros_(router.scorer.weight)
    inputs = tiny_inputs(tiny_llama())
    aux = model(**inputs, labels=inputs["input_ids"]).aux_loss
    torch.testing.assert_close(aux, torch.tensor(0.3 / 4))


@pytest.mark.parametrize(("sign", "lower"), [("specialise", True), ("spread", False)])
def test_the_sign_says_whether_minimising_sharpens_or_flattens(loras, sign, lower):
    model = shaken(lora_mixer.build(mixture_of(loras), weight=1.0, entropy=1.0, sign=sign)).train()
    inputs = tiny_inputs(tiny_llama())
    optimizer, entropies = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05), []
    for _ in range(25):
        with molora.record(model) as log:
            nothing = model(**inputs).logits.sum() * 0
        probs = torch.stack([routing.probs.flatten(0, 1) for routing in list(log.values())[:2]])
        entropies.append(float(-(probs * probs.clamp_min(1e-9).log()).sum(-1).mean()))
        optimizer.zero_grad()
        molora.add_aux(model, nothing).backward()
        optimizer.step()
    assert (entropies[-1] < entropies[0] - 0.1) if lower else (entropies[-1] > entropies[0] + 0.1)


@pytest.mark.parametrize(("number", "same"), [(3, True), (4, False)])
def test_up_to_three_experts_train_as_they_infer(loras, number, same):
    model, inputs = shaken(lora_mixer.build(mixture_of(loras[:number]))), tiny_inputs(tiny_llama())
    inference = logits(model)
    training = model.train()(**inputs).logits.detach()
    molora.drop_aux(model)
    assert torch.allclose(training, inference, atol=1e-5) == same


def test_the_anchor_is_the_squared_distance_that_trained_experts_have_moved(loras):
    model = lora_mixer.build(mixture_of(loras), train_experts=True)
    anchor = lora_mixer.Anchor(model)
    assert anchor() == 0
    experts = [p for name, p in model.named_parameters() if ".molora_bank." in name]
    with torch.no_grad():
        for parameter in experts:
            parameter.add_(0.5)
    assert float(anchor().detach()) == pytest.approx(0.25 * sum(p.numel() for p in experts))
    anchor().backward()
    assert all(torch.allclose(p.grad, torch.ones_like(p)) for p in experts)
    with pytest.raises(ConfigError, match="frozen"):
        lora_mixer.Anchor(lora_mixer.build(mixture_of(loras)))


def test_saving_keeps_it_and_wrong_options_change_nothing(loras, tmp_path):
    model = shaken(lora_mixer.build(mixture_of(loras), k=2))
    want = logits(model)
    with pytest.raises(ConfigError, match="sign"):
        lora_mixer.build(model, sign="both")
    assert torch.equal(logits(model), want)
    molora.save(model, tmp_path)
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path)), want)
