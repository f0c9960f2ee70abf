"""The life of every recipe on a tiny Llama, T5 and BERT: fresh, trained, recomputed, saved, loaded, switched off."""

import copy

import pytest
import torch
from peft import PeftModel

import molora
from molora.errors import ConfigError
from tests.needs import config_of, routers, stocked, told
from tests.tiny import tiny_bert_classifier, tiny_inputs, tiny_llama, tiny_t5

FAMILIES = {"llama": tiny_llama, "t5": tiny_t5, "bert": tiny_bert_classifier}


def batch_for(model, family):
    inputs = tiny_inputs(model, batch=3, length=7)
    inputs["attention_mask"][0, 5:] = 0
    if family == "llama":
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, :3] = -100  # the prompt
        inputs["labels"][0, 5:] = -100
    elif family == "bert":
        inputs["labels"] = torch.tensor([0, 2, 1])
    return inputs


def wrapped(name, family):
    """The recipe on a model, or a skip where the recipe itself says that it does not go together."""
    try:
        return molora.wrap(FAMILIES[family](), name)
    except ConfigError as error:
        if "does not apply to" in str(error):
            pytest.skip(str(error))
        raise


def train_two_steps(name, family, checkpointing):
    torch.manual_seed(3)
    model = stocked(wrapped(name, family)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = batch_for(model, family)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # eps far above rounding noise, so that runs can be compared to 1e-6
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3)
    molora.set_progress(model, 0.5)
    for step in range(2):
        torch.manual_seed(step)  # what is drawn in training must be drawn again in the recompute
        with told(model, 3):
            loss = loss_of(model, inputs)
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        molora.settle(model)
    return model.eval()


def loss_of(model, inputs):
    """The loss that a training step of this model differentiates."""
    objective = getattr(molora, "objective_loss", None)
    if objective is not None and getattr(model.peft_config["default"], "objective", None):
        return objective(model, inputs)
    return model(**inputs).loss


def logits_of(model, family):
    with torch.no_grad(), told(model, 3):
        return model(**batch_for(model, family)).logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", molora.recipes())
def test_trains_saves_and_loads(name, family, tmp_path):
    start = wrapped(name, family).eval()
    base_logits = logits_of_base(family)
    before = copy.deepcopy(FAMILIES[family]().state_dict())
    torch.testing.assert_close(logits_of(start, family), base_logits, atol=1e-6, rtol=1e-6)  # changes nothing

    model = train_two_steps(name, family, checkpointing=False)
    trained = logits_of(model, family)
    assert (trained - base_logits).abs().max() > 1e-4

    # the frozen weights are bit-identical; a head that PEFT trains and saves whole is not frozen
    for key, value in model.get_base_model().state_dict().items():
        plain = key.replace(".base_layer", "").replace(".original_module", "")
        if "molora_" not in key and "modules_to_save" not in key:
            assert torch.equal(value, before[plain]), key

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "adapter").eval()
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    assert [key for key in saved if not torch.equal(saved[key], found[key])] == []
    # not to the last bit: a matrix product may differ by a rounding with where its input lies in memory
    molora.set_progress(model, 1.0)  # where a loaded adapter stands
    torch.testing.assert_close(logits_of(loaded, family), logits_of(model, family), atol=1e-6, rtol=1e-6)
    with loaded.disable_adapter():
        if family != "bert":  # its trained head is switched off with the adapter, too
            torch.testing.assert_close(logits_of(loaded, family), base_logits, atol=1e-6, rtol=1e-6)


def logits_of_base(family):
    base = FAMILIES[family]()
    with torch.no_grad():
        return base(**batch_for(base, family)).logits


@pytest.mark.parametrize("name", molora.recipes())
def test_checkpointing_changes_nothing(name):
    plain, recomputed = (train_two_steps(name, "llama", checkpointing=c).state_dict() for c in (False, True))
    for key, a in plain.items():  # prices too: a recompute must not count choices twice
        torch.testing.assert_close(
            a, recomputed[key], atol=1e-6, rtol=1e-5, msg=lambda m, k=key: f"{k} under checkpointing: {m}"
        )


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("name", molora.recipes())
def test_generates_with_a_cache_as_without(name, family):
    torch.manual_seed(5)
    model = wrapped(name, family).eval()
    for key, parameter in model.named_parameters():
        if "molora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    inputs = tiny_inputs(model, batch=2, length=6)
    inputs["attention_mask"][0, :2] = 0
    inputs.pop("labels", None)

    def run(cached):
        with told(model, 2):
            return model.generate(
                **inputs,
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                use_cache=cached,
                return_dict_in_generate=True,
                output_logits=True,
            )

    with_cache, without = run(True), run(False)
    assert torch.equal(with_cache.sequences, without.sequences)
    # float32: sums over a cache run in another order
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", molora.recipes())
def test_training_moves_routers_and_experts(name):
    torch.manual_seed(3)
    start = molora.wrap(tiny_llama(), name)
    after = train_two_steps(name, "llama", checkpointing=False)
    moved = {"bank": 0, "router": 0}
    for (key, a), (_, b) in zip(start.named_parameters(), after.named_parameters(), strict=True):
        if a.requires_grad and not torch.equal(a, b):
            moved["router" if "molora_router" in key else "bank"] += 1
    learns = any(p.requires_grad for router in routers(start) for p in router.parameters())
    assert (moved["router"] > 0) == learns
    assert (moved["bank"] > 0) == (config_of(name).experts["frozen"] != "all")
