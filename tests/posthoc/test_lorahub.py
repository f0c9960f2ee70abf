"""LoraHub: exact mixing by gates, the paper's quadratic mode, and a search without gradients."""

import copy
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import molora
from molora import ConfigError
from molora.control import routed_layers
from molora.posthoc import lorahub
from molora.posthoc.lorahub import search
from molora.posthoc.scoring import mean_loss, row_losses
from tests.adapters import logits, stir
from tests.posthoc.mixtures import mixture_of, save_lora, save_loras, trainable
from tests.tiny import tiny_bert_classifier, tiny_gpt2, tiny_inputs, tiny_llama, tiny_t5

SITE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"), 3)


def factors(folder, site=SITE):
    tensors = load_file(folder / "adapter_model.safetensors")
    return [tensors[f"base_model.model.{site}.lora_{part}.weight"] for part in "AB"]


def delta(model, site=SITE):
    layer = routed_layers(model)[site]
    return layer.get_delta_weight("default").detach()


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_mixture_is_found_in_200_evaluations(loras, seed):
    model = mixture_of(loras[:2])
    (A1, B1), (A2, B2) = (factors(folder) for folder in loras[:2])
    planted = 2.0 * (0.7 * B1 @ A1 + 0.3 * B2 @ A2)  # alpha / r = 2
    calls = []

    def distance(model):
        calls.append(1)
        return float((delta(model) - planted).norm())

    lorahub.build(model, loss=distance, budget=200, penalty=0.0, seed=seed)
    assert len(calls) <= 200
    assert float((delta(model) - planted).norm()) < 1e-2
    torch.testing.assert_close(lorahub.weights_of(model), torch.tensor([0.7, 0.3]), atol=2e-3, rtol=0)


def test_the_search_starts_at_zero_keeps_the_best_and_stays_inside():
    seen = []

    def loss(w):
        seen.append(w)
        return float((w - torch.tensor([5.0, 0.5, -5.0])).square().sum())

    found = search(loss, 3, budget=120, bound=1.5, penalty=0.0)
    assert torch.equal(seen[0], torch.zeros(3, dtype=torch.float64)) and len(seen) <= 120
    assert torch.stack(seen).abs().max() <= 1.5
    assert found.history == sorted(found.history, reverse=True) and len(found.history) == len(seen)
    assert found.value == pytest.approx(min(loss(w) for w in list(seen)))
    torch.testing.assert_close(found.weights, torch.tensor([1.5, 0.5, -1.5], dtype=torch.float64), atol=0.05, rtol=0)


def test_the_penalty_is_on_the_mean_absolute_weight():
    # minimise (w - 1)^2 + p |w|: w = 1 - p / 2, for one weight as for one of two
    for num in (1, 2):
        found = search(lambda w: float((w[0] - 1) ** 2 + (w[1:] ** 2).sum()), num, budget=300, penalty=0.4)
        assert float(found.weights[0]) == pytest.approx(1 - 0.4 / num / 2, abs=5e-3)
    found = search(lambda w: 0.0, 2, budget=300, penalty=0.05)
    assert found.weights.abs().max() == 0 and found.value == 0


def test_a_loss_that_is_not_a_number_is_never_the_best():
    found = search(lambda w: math.nan if w[0] > 0 else float(w[0] ** 2 + w[0]), 1, budget=150, penalty=0.0)
    assert float(found.weights[0]) == pytest.approx(-0.5, abs=0.02)


def test_wrong_arguments_are_told_together():
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*bound must be positive.*budget must be at least 1"):
        search(lambda w: 0.0, 2, bound=0, budget=0)


# --- mixing -----------------------------------------------------------------------------------------------------------


def test_exact_mixing_is_the_sum_of_what_the_adapters_do(loras):
    weights = [0.7, -0.4, 1.2]
    model = lorahub.build(mixture_of(loras), weights=weights)
    want = sum(w * 2.0 * B @ A for w, (A, B) in zip(weights, map(factors, loras), strict=True))
    torch.testing.assert_close(delta(model), want)
    peft = PeftModel.from_pretrained(tiny_llama(), loras[0], adapter_name="0")
    for number, folder in enumerate(loras[1:], 1):
        peft.load_adapter(folder, str(number))
    peft.add_weighted_adapter(["0", "1", "2"], weights, "mixed", combination_type="cat")
    peft.set_adapter("mixed")
    torch.testing.assert_close(logits(model), logits(peft.eval()), atol=1e-5, rtol=1e-5)
    assert not trainable(model)


def test_negating_negates_in_exact_mode_and_does_nothing_in_the_papers(loras):
    A, B = factors(loras[0])
    for mode, half, minus in (("exact", 0.5, -1.0), ("factors", 0.25, 1.0)):
        for weight, share in ((0.5, half), (-1.0, minus)):
            model = lorahub.build(mixture_of(loras[:1]), weights=[weight], mode=mode)
            torch.testing.assert_close(delta(model), share * 2.0 * B @ A)


def test_the_factor_mode_is_the_papers_quadratic_formula(loras):
    weights = [0.7, -0.4, 1.2]
    model = lorahub.build(mixture_of(loras), weights=weights, mode="factors")
    pairs = [factors(folder) for folder in loras]
    A = sum(w * A for w, (A, _) in zip(weights, pairs, strict=True))
    B = sum(w * B for w, (_, B) in zip(weights, pairs, strict=True))
    torch.testing.assert_close(delta(model), 2.0 * B @ A)
    # and PEFT's state dicts mixed entry by entry, as the authors do it, give the same function
    merged = PeftModel.from_pretrained(tiny_llama(), loras[0])
    states = [load_file(folder / "adapter_model.safetensors") for folder in loras]
    for name, parameter in merged.named_parameters():
        if "lora_" in name:
            key = name.replace(".default", "")
            parameter.data = sum(w * state[key] for w, state in zip(weights, states, strict=True))
    torch.testing.assert_close(logits(model), logits(merged.eval()), atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(lorahub.build(mixture_of(loras), weights=weights))).abs().max() > 1e-2


def test_the_factor_mode_refuses_what_it_cannot_mix(loras, tmp_path):
    other = save_lora(tmp_path / "other", 9, r=2)
    model = mixture_of([loras[0], other])
    before = logits(model)
    with pytest.raises(ConfigError, match=r"ranks \[4, 2\], and mode 'factors' needs equal ranks"):
        lorahub.build(model, weights=[1, 1], mode="factors")
    assert torch.equal(logits(model), before)
    one = save_lora(tmp_path / "one", 9, r=1, target_modules=["q_proj"])
    two = save_lora(tmp_path / "two", 9, r=1, target_modules=["v_proj"])
    with pytest.raises(ConfigError, match="is not adapted by two"):
        lorahub.build(mixture_of([one, two]), weights=[1, 1], mode="factors")


@pytest.mark.parametrize("mode", ["exact", "factors"])
def test_the_result_is_saved_merged_and_exported_exactly(loras, tmp_path, mode):
    weights = [0.5, 0.0, -0.8]
    model = lorahub.build(mixture_of(loras), weights=weights, mode=mode)
    want = logits(model)
    molora.save(model, tmp_path / "saved")
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path / "saved")), want)
    molora.export_peft(model, tmp_path / "lora", gates=weights)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()), want)
    torch.testing.assert_close(logits(model.merge_and_unload()), want, atol=1e-5, rtol=1e-5)


def test_a_few_examples_are_enough_to_find_the_adapter_that_made_them(loras):
    model = mixture_of(loras)
    inputs = tiny_inputs(tiny_llama(), batch=4, length=8)
    with torch.no_grad(), molora.pin(model, torch.tensor([0.0, 0.0, 1.0])):
        labels = model(**inputs).logits.argmax(-1)
    inputs["labels"] = torch.cat([labels[:, :1], labels[:, :-1]], 1)  # what the model itself shifts back
    before = mean_loss(model, [inputs])
    model.train()
    lorahub.build(model, examples=[inputs], budget=60)
    assert model.training
    assert mean_loss(model.eval(), [inputs]) < before - 0.02
    assert lorahub.weights_of(model).argmax() == 2


def test_sampling_leaves_the_others_at_zero(loras):
    seen = set()
    for seed in range(6):
        model = lorahub.build(
            mixture_of(loras), loss=lambda m: -float(lorahub.weights_of(m).sum()), sample=1, seed=seed
        )
        weights = lorahub.weights_of(model)
        assert (weights != 0).sum() == 1 and weights.max() > 1.0
        seen.add(int(weights.argmax()))
    assert len(seen) > 1


def test_the_loss_of_examples_does_not_depend_on_the_batches(loras):
    model, inputs = mixture_of(loras), tiny_inputs(tiny_llama(), batch=4, length=8)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][0, :5] = -100
    inputs["labels"][2, 3:] = -100
    rows = [{name: tensor[i : i + 1] for name, tensor in inputs.items()} for i in range(4)]
    own = [float(model(**row).loss.detach()) for row in rows]  # transformers' own loss, row by row
    assert mean_loss(model, [inputs]) == pytest.approx(sum(own) / 4, rel=1e-5)
    assert mean_loss(model, rows) == pytest.approx(sum(own) / 4, rel=1e-5)
    torch.testing.assert_close(row_losses(model, inputs).detach(), torch.tensor(own))


@pytest.mark.parametrize("build", [tiny_bert_classifier, tiny_t5, tiny_gpt2])
def test_the_loss_of_examples_is_that_of_the_model_itself(tmp_path, build):
    targets = {tiny_bert_classifier: ["query"], tiny_t5: ["q"], tiny_gpt2: ["c_attn"]}[build]
    model = mixture_of([save_lora(tmp_path / "lora", 3, build, target_modules=targets)], build)
    inputs = tiny_inputs(build(), batch=3)
    if build is tiny_bert_classifier:
        inputs["labels"] = torch.tensor([0, 2, 1])
    elif build is tiny_gpt2:
        inputs["labels"] = inputs["input_ids"]
    with torch.no_grad():
        want = float(model(**inputs).loss)
    assert mean_loss(model, [inputs]) == pytest.approx(want, rel=1e-5)


def test_decisions_per_prompt_read_no_answer_where_examples_are_scored(loras):
    model = stir(mixture_of(loras, recipe={"granularity": "prompt"})).eval()
    inputs = tiny_inputs(tiny_llama(), batch=2, length=8)
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    with molora.record(model) as log:
        row_losses(model, {**inputs, "labels": labels})
    seen = {site: routing.gates for site, routing in log.items()}
    with molora.record(model) as log, torch.no_grad():
        model(**inputs, labels=labels)
    assert log.keys() == seen.keys()
    for site, routing in log.items():
        torch.testing.assert_close(routing.gates, seen[site])
    with molora.record(model) as log, torch.no_grad():
        model(**inputs)
    assert not all(torch.allclose(routing.gates, seen[site]) for site, routing in log.items())


def test_a_model_without_logits_needs_a_loss_of_its_own(tmp_path):
    def build():
        return tiny_bert_classifier().bert

    model = mixture_of([save_lora(tmp_path / "lora", 3, build, target_modules=["query"])], build)
    inputs = tiny_inputs(tiny_bert_classifier())
    with pytest.raises(ConfigError, match="gives no logits to compare with labels"):
        mean_loss(model, [{**inputs, "labels": torch.tensor([0, 1])}])
    before = float(model(**inputs).last_hidden_state[:, 0, 0].mean())
    lorahub.build(model, loss=lambda m: float(m(**inputs).last_hidden_state[:, 0, 0].mean()), budget=15, penalty=0.0)
    assert float(model(**inputs).last_hidden_state[:, 0, 0].mean()) < before


def test_wrong_options_change_nothing(loras):
    model = mixture_of(loras)
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    with pytest.raises(ConfigError, match=r"(?s)mode 'sum' is unknown; known: exact, factors.*needs 3 weights.*got 1"):
        lorahub.build(model, weights=[1.0], mode="sum")
    with pytest.raises(ConfigError, match="give either examples, or a loss, or weights"):
        lorahub.build(model)
    assert model.peft_config["default"].to_dict() == before
