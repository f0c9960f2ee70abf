"""Giving a mixture other routers: experts stay, nothing of the old routing is left, and failures change nothing."""

import pytest
import torch

import molora
from molora import ConfigError
from molora.control import routed_layers
from molora.posthoc.rerouting import expert_names, keep_experts, reroute, routers_of, sites_of
from tests.adapters import anatomy, logits
from tests.posthoc.mixtures import mixture_of, save_lora, save_loras, trainable
from tests.tiny import tiny_inputs, tiny_llama


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    root = tmp_path_factory.mktemp("loras")
    return [*save_loras(root, 2), save_lora(root / "wide", 7, r=6, target_modules=["q_proj", "up_proj"])]


def experts_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".molora_bank." in name}


def test_experts_stay_bit_by_bit_and_routing_is_that_of_a_fresh_import(loras):
    model = mixture_of(loras, scorer={"name": "mlp", "hidden": 3}, selector={"name": "top_k", "k": 1}, share="block")
    before = experts_of(model)
    changes = {"scorer": {"name": "linear", "init": 0.0}, "selector": {"name": "top_k", "k": 2}}
    routers = reroute(model, **changes)
    assert all(torch.equal(p, before[name]) for name, p in experts_of(model).items())
    fresh = mixture_of(loras, **changes, share="site")
    assert torch.equal(logits(model), logits(fresh))
    keys = ("scorer", "link", "selector", "share", "losses", "granularity", "target_modules")
    mine, theirs = (m.peft_config["default"].to_dict() for m in (model, fresh))
    assert {key: mine[key] for key in keys} == {key: theirs[key] for key in keys}
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in fresh.named_parameters()}
    assert routers == routers_of(model) and len(sites_of(model)) == len(routers) == len(routed_layers(model))


def test_frozen_experts_thaw_and_freeze(loras):
    model = mixture_of(loras)
    assert any(".molora_bank." in name for name in trainable(model))
    reroute(model, experts={"frozen": "all"})
    assert trainable(model) and not any(".molora_bank." in name for name in trainable(model))
    reroute(model, experts={"frozen": []})
    assert any(".molora_bank." in name for name in trainable(model))


def test_another_adapter_beside_it_is_not_touched(loras):
    model = mixture_of(loras)
    molora.import_peft(model, loras[:2], adapter_name="second")
    config = model.peft_config["second"].to_dict()
    want = {}
    for name in ("second", "default"):
        model.set_adapter(name)
        want[name] = logits(model.eval())
    reroute(model, selector={"name": "top_k", "k": 1})
    assert not torch.equal(logits(model), want["default"])
    model.set_adapter("second")
    assert torch.equal(logits(model), want["second"])
    assert model.peft_config["second"].to_dict() == config


def test_what_cannot_be_routed_so_is_told_and_changes_nothing(loras):
    model = mixture_of(loras)
    want, config, before = logits(model), model.peft_config["default"].to_dict(), anatomy(model)
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*'rank' does not say how.*experts.num stays as it is"):
        reroute(model, rank=3, experts={"num": 9})
    with pytest.raises(ConfigError, match="top_k needs 1 <= k"):
        reroute(model, selector={"name": "top_k", "k": 9})
    with pytest.raises(ConfigError, match="is unknown; did you mean 'linear'"):
        reroute(model, scorer="liner")
    assert anatomy(model) == before
    assert torch.equal(logits(model), want) and model.peft_config["default"].to_dict() == config
    partly = mixture_of(loras, experts={"frozen": [0]})
    with pytest.raises(ConfigError, match="some of its experts are frozen"):
        reroute(partly)


def test_selectors_of_single_layers_give_way(loras, tmp_path):
    model = mixture_of(loras[:2])
    reroute(model, selector={"name": "top_k", "k": 1})
    config = model.peft_config["default"]
    config.layers = [{"match": "layers.0", "selector": {"k": 2}}]
    reroute(model, selector="softmax")
    assert model.peft_config["default"].layers == []
    molora.save(model, tmp_path / "saved")
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path / "saved")), logits(model))


def test_keeping_experts_renumbers_them(loras):
    model = mixture_of(loras, names=["news", "law", "wide"])
    with molora.pin(model, torch.tensor([0.3, 0.0, 0.7])):
        want = logits(model)
    keep_experts(model, [2, 0])
    assert expert_names(model) == ["wide", "news"]
    with molora.pin(model, torch.tensor([0.7, 0.3])):
        torch.testing.assert_close(logits(model), want, atol=1e-6, rtol=1e-6)
    with pytest.raises(ConfigError, match="different numbers"):
        keep_experts(model, [0, 0])
    model(**tiny_inputs(tiny_llama()), labels=tiny_inputs(tiny_llama())["input_ids"]).loss.backward()
