"""The policy per layer: profiled mass against loops, the smallest k, and an adapter that keeps its policy."""

import pytest
import torch

import molora
from molora.control import routed_layers, tuner_of
from molora.errors import ConfigError
from molora.slimming import keep_k, profile_mass, smallest_k
from tests.tiny import tiny_inputs, tiny_llama


def mixture(**changes):
    model = molora.wrap(tiny_llama(), "ladimo_policy", target_modules=["q_proj", "down_proj"], **changes)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def batches(model):
    first, second = tiny_inputs(model, seed=1), tiny_inputs(model, batch=3, length=5, seed=2)
    first["attention_mask"][0, 4:] = 0
    return [first, second]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.proves("ladimo_policy")
def test_profiled_mass_against_loops():
    model = mixture()
    mass = profile_mass(model, batches(model))
    assert set(mass) == set(routed_layers(model))
    sums, count = {name: [0.0] * 4 for name in mass}, 0
    for inputs in batches(model):
        with molora.record(model) as log:
            logits(model, inputs)
        for row, token in inputs["attention_mask"].nonzero().tolist():
            count += 1
            for name, routing in log.items():
                for place, value in enumerate(sorted(routing.probs[row, token].tolist(), reverse=True)):
                    sums[name][place] += value
    for name in mass:
        assert mass[name].tolist() == pytest.approx([v / count for v in sums[name]], rel=1e-5)
        assert mass[name].sum().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.proves("ladimo_policy")
def test_the_smallest_k_that_holds_the_mass():
    mass = {"a": torch.tensor([0.7, 0.2, 0.06, 0.04]), "b": torch.tensor([0.25] * 4)}
    assert smallest_k(mass, 0.7) == {"a": 1, "b": 3}
    assert smallest_k(mass, 0.9) == {"a": 2, "b": 4}
    assert smallest_k(mass, 1.0) == {"a": 4, "b": 4}
    for wrong in (0, 1.1):
        with pytest.raises(ConfigError, match="threshold must be in"):
            smallest_k(mass, wrong)


@pytest.mark.proves("ladimo_policy")
def test_a_policy_of_all_experts_changes_nothing_and_of_one_uses_the_best(tmp_path):
    model = mixture()
    inputs = tiny_inputs(model)
    before = logits(model, inputs)
    layers = routed_layers(model)
    keep_k(model, dict.fromkeys(layers, 4))
    torch.testing.assert_close(logits(model, inputs), before)
    policy = {name: 1 + (number % 3) for number, name in enumerate(layers)}
    keep_k(model, policy)
    after = logits(model, inputs)
    assert (after - before).abs().max() > 1e-3
    with molora.record(model) as log:
        logits(model, inputs)
    for name, routing in log.items():
        k = policy[name]
        best = routing.probs.topk(k, -1)
        expected = torch.zeros_like(routing.probs).scatter(-1, best.indices, best.values)
        torch.testing.assert_close(routing.gates, expected / expected.sum(-1, keepdim=True))
    molora.save(model, tmp_path / "adapter")
    loaded = molora.load(tiny_llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, inputs), after, atol=1e-6, rtol=1e-6)
    assert [len(entry) for entry in tuner_of(loaded).peft_config["default"].layers] == [2] * 4
    ids = inputs["input_ids"]
    runs = [loaded.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*runs)


def test_selector_options_per_layer_in_a_config():
    layers = [{"match": r"layers\.1\.", "selector": {"k": 1}}, {"match": "q_proj", "experts": {"rank": 3}}]
    model = mixture(layers=layers)
    for name, layer in routed_layers(model).items():
        assert layer.molora_router["default"].selector.fixed["k"] == (1 if "layers.1" in name else 4)
        assert layer.molora_bank["default"].ranks[0] == (3 if "q_proj" in name else 8)
    with pytest.raises(ConfigError, match="selector 'top_k' has no option 'kk'"):
        mixture(layers=[{"match": "q", "selector": {"kk": 1}}])
    with pytest.raises(ConfigError, match=r"must be \{match: <regex"):
        mixture(layers=[{"match": "q"}])


def test_policies_that_do_not_fit_are_named():
    model = mixture()
    name = next(iter(routed_layers(model)))
    with pytest.raises(ConfigError, match="has 4 experts, so it cannot keep 5"):
        keep_k(model, {name: 5})
    with pytest.raises(ConfigError, match="takes no decision; did you mean"):
        keep_k(model, {name + "x": 1})
    soft = molora.wrap(tiny_llama(), "molora")
    with pytest.raises(ConfigError, match="selector 'softmax' has no k"):
        keep_k(soft, {})
    with pytest.raises(ConfigError, match="no decision of adapter 'default' was seen"):
        profile_mass(model, [])
