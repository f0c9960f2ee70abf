"""The laws, over every recipe as a whole: fresh it changes nothing, it sees neither padding nor the future."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import molora
from molora.control import routed_layers
from tests.needs import has_losses, stocked, told
from tests.recipes.test_lifecycle import loss_of
from tests.test_laws import padded, shaken_adapter
from tests.tiny import tiny_inputs, tiny_llama, tiny_t5


@pytest.mark.parametrize("recipe", molora.recipes())
def test_a_fresh_recipe_is_the_identity(recipe):
    model = molora.wrap(tiny_llama(), recipe)
    inputs, base = tiny_inputs(model), tiny_llama()
    for mode in (model.train, model.eval):
        mode()
        with told(model, 2):
            torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits, atol=1e-6, rtol=1e-6)
        molora.drop_aux(model)


ONE_EXPERT = {  # what makes the experts of a layer one, where `num: 1` alone does not
    "dynmole": {"experts": {"num": 1}},
    "hydralora": {"experts": {"num": 1}},
    "lora": {"experts": {"num": 1}},
    "milora": {"target_modules": ["q_proj"]},  # one layer per block
    "mola": {"selector": {"clamp": True}, "experts": {"num": 1}},
    "molora": {"experts": {"num": 1}},
    "smora": {"selector": {"k": 1}, "experts": {"num": 1, "rank": 1}},
}


@pytest.mark.parametrize("recipe", sorted(ONE_EXPERT))
def test_one_expert_is_plain_lora(recipe):
    changes = {"target_modules": ["q_proj"], **ONE_EXPERT[recipe]}
    changes = changes | {"experts": {**changes.get("experts", {}), "dropout": 0.0}}
    model = shaken_adapter(molora.wrap(tiny_llama(), recipe, **changes))
    layers = routed_layers(model)
    bank = next(iter(layers.values())).molora_bank["default"]
    rank = bank.ranks[0]
    assert bank.num_experts == 1
    config = LoraConfig(r=rank, lora_alpha=bank.scaling * rank, target_modules=["q_proj"])
    reference = get_peft_model(tiny_llama(), config).eval()
    for name, module in reference.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            A, B = layers[name].molora_bank["default"].pair(0)
            module.lora_A["default"].weight.data.copy_(A)
            module.lora_B["default"].weight.data.copy_(B)
    inputs = tiny_inputs(model)
    expected = reference(**inputs).logits
    assert (expected - tiny_llama()(**inputs).logits).abs().max() > 1e-3
    torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-6, rtol=1e-5)


def positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


def is_random_in_training(model, inputs):
    """Whether two training forwards of the same batch differ: noise, dropout, drawn experts."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(model.train()(**inputs).logits)  # with gradients: only such a forward is a training forward
        molora.drop_aux(model)
    return not torch.equal(*runs)


@pytest.mark.parametrize("recipe", molora.recipes())
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit_and_no_auxiliary_loss(recipe, side):
    model = shaken_adapter(molora.wrap(tiny_llama(), recipe, experts={"dropout": 0.0}))
    ids = tiny_inputs(model)["input_ids"]
    labels = ids.clone()
    labels[:, :3] = -100
    whole = torch.ones_like(ids)

    def run(ids, labels, mask):
        torch.manual_seed(0)
        out = model(input_ids=ids, labels=labels, attention_mask=mask, position_ids=positions(mask))
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        logits = out.logits[:, 4:] if side == "left" and ids.shape[1] > 7 else out.logits[:, :7]
        return logits, getattr(out, "aux_loss", None), out.loss, grads

    junk = torch.randint(4, 90, (2, 4))
    with told(model, 2):
        # what is drawn for padding would be drawn from the same stream, so such recipes are compared in evaluation
        trains = not is_random_in_training(model, {"input_ids": ids})
        model.train(trains)
        plain = run(ids, labels, whole)
        other = run(
            padded(ids, junk, side), padded(labels, torch.full((2, 4), -100), side), padded(whole, 0 * junk, side)
        )
    torch.testing.assert_close(other[0], plain[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other[2], plain[2], atol=1e-6, rtol=1e-5)
    if trains:
        assert (plain[1] is not None) == has_losses(recipe)
    if plain[1] is not None:
        torch.testing.assert_close(other[1], plain[1], atol=1e-6, rtol=1e-5)
    assert plain[3].keys() == other[3].keys()
    for name, grad in plain[3].items():
        torch.testing.assert_close(other[3][name], grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["dynmole", "mola", "milora"])
def test_padding_of_source_and_target_changes_nothing_in_pairs(recipe):
    model = shaken_adapter(molora.wrap(tiny_t5(), recipe)).train()
    inputs = tiny_inputs(model)

    def run(inputs):
        out = model(**inputs)
        return out.loss, out.aux_loss

    plain = run(inputs)
    no = torch.zeros(2, 3, dtype=torch.long)
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], no + 9], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], no], 1),
        "labels": torch.cat([inputs["labels"], no - 100], 1),
    }
    other = run(longer)
    torch.testing.assert_close(other[0], plain[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(other[1], plain[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("recipe", molora.recipes())
@torch.no_grad()
def test_recipes_do_not_see_the_future(recipe):
    model = shaken_adapter(molora.wrap(tiny_llama(), recipe))
    ids = tiny_inputs(model)["input_ids"]
    labels = ids.clone()
    labels[:, :3] = -100  # the prompt, which decisions per prompt may read
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 11) % 90 + 4
    with told(model, 2):
        before = model(input_ids=ids, labels=labels).logits
        after = model(input_ids=other, labels=torch.where(labels == -100, labels, other)).logits
    torch.testing.assert_close(after[:, :5], before[:, :5], atol=3e-6, rtol=1e-5)
    assert not torch.allclose(after[:, 5:], before[:, 5:])


SMALL = ("mov", "mhr_z", "router_tuning")  # they train vectors, tables or routers alone


@pytest.mark.parametrize("recipe", molora.recipes())
def test_a_training_step_lowers_the_loss(recipe):
    torch.manual_seed(0)
    model = stocked(molora.wrap(tiny_llama(), recipe)).eval()
    inputs = tiny_inputs(model)
    inputs["labels"] = inputs["input_ids"]
    with told(model, 2), torch.no_grad():
        before = float(model(**inputs).loss)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    molora.set_progress(model, 0.5)
    values = []
    with told(model, 2):
        for _ in range(8):
            optimizer.zero_grad()
            loss = loss_of(model, inputs)
            loss.backward()
            optimizer.step()
            molora.settle(model)
            values.append(loss.item())
        model.eval()
        with torch.no_grad():
            after = float(model(**inputs).loss)
    least = 0.01 if recipe in SMALL else 0.05
    assert after < before - least, values
