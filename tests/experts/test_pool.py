"""A pool of experts: one bank for layers of one shape, trained and saved once, with a router per layer."""

import copy

import pytest
import torch
from peft import PeftModel

import molora
from molora.control import routed_layers
from molora.errors import ConfigError
from molora.experts.pool import PooledBank
from tests.tiny import tiny_inputs, tiny_llama, tiny_t5

POOL = {"experts": {"num": 4, "rank": 2, "alpha": 4, "pool": "shape"}, "selector": {"name": "top_k", "k": 2}}


def pooled(base=tiny_llama, **changes):
    model = molora.wrap(base(), {}, **{**POOL, **changes})
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def owners(model):
    banks = {name: layer.molora_bank["default"] for name, layer in routed_layers(model).items()}
    return {name: bank.owner if isinstance(bank, PooledBank) else bank for name, bank in banks.items()}


@pytest.mark.proves("unipool")
def test_layers_of_one_shape_share_one_bank_and_have_routers_of_their_own():
    model = pooled()
    by_shape = {}
    for name, owner in owners(model).items():
        layer = routed_layers(model)[name]
        by_shape.setdefault((layer.d_in, layer.d_out), set()).add(id(owner))
    assert len(by_shape) == 4 and all(len(ids) == 1 for ids in by_shape.values())
    routers = {id(layer.molora_router["default"].scorer.weight) for layer in routed_layers(model).values()}
    assert len(routers) == 14
    parameters = [n for n, _ in model.named_parameters() if n.endswith(".Bt")]
    assert len(parameters) == 4  # trained once
    by_name = pooled(experts={**POOL["experts"], "pool": "name"})
    assert len({id(owner) for owner in owners(by_name).values()}) == 7  # q, k, v, o, gate, up, down
    for name, owner in owners(by_name).items():
        assert owner is owners(by_name)[name.replace("layers.1", "layers.0")]


@pytest.mark.proves("unipool")
def test_a_pool_is_the_same_function_as_separate_banks_with_equal_weights_and_gets_their_summed_gradient():
    model, alone = pooled(), pooled(experts={**POOL["experts"], "pool": "none"})
    for name, layer in routed_layers(alone).items():
        own, shared = layer.molora_bank["default"], owners(model)[name]
        own.load_state_dict(shared.state_dict())
        router = routed_layers(model)[name].molora_router["default"]
        layer.molora_router["default"].load_state_dict(router.state_dict())
    inputs = tiny_inputs(model)
    for checkpointing in (False, True):
        outs = []
        for each in (model, alone):
            each.train().zero_grad()
            if checkpointing:
                each.gradient_checkpointing_enable({"use_reentrant": False})
            out = each(**inputs, labels=inputs["input_ids"])
            out.loss.backward()
            outs.append(out.logits)
        torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-6)
        for owner in {id(o): o for o in owners(model).values()}.values():
            members = [n for n, o in owners(model).items() if o is owner]
            for part in ("A", "Bt"):
                summed = sum(getattr(routed_layers(alone)[n].molora_bank["default"], part).grad for n in members)
                torch.testing.assert_close(getattr(owner, part).grad, summed, atol=1e-6, rtol=1e-4)


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_inputs(model)).logits


@pytest.mark.proves("unipool")
def test_a_pool_is_saved_once_by_peft_and_by_molora_and_survives_copies(tmp_path):
    from safetensors import safe_open

    model = pooled()
    model.save_pretrained(tmp_path / "peft")
    molora.save(model, tmp_path / "own")
    for folder in ("peft", "own"):
        with safe_open(tmp_path / folder / "adapter_model.safetensors", "pt") as file:
            assert len([key for key in file.keys() if key.endswith(".Bt")]) == 4  # noqa: SIM118
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft")
    own = molora.load(tiny_llama(), tmp_path / "own")
    lazy = PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft", low_cpu_mem_usage=True)
    copied = copy.deepcopy(model)
    for other in (loaded, own, lazy, copied):
        torch.testing.assert_close(logits(other), logits(model), atol=0, rtol=0)
    before = logits(model)
    some = next(iter(owners(copied).values()))
    some.A.data.zero_()  # the copy has a pool of its own, shared among its layers
    assert torch.equal(logits(model), before) and not torch.equal(logits(copied), before)
    assert (
        next(iter(owners(copied).values())).A
        is routed_layers(copied)["model.layers.1.self_attn.q_proj"].molora_bank["default"].A
    )


@pytest.mark.proves("unipool")
def test_a_pool_is_saved_by_transformers_itself(tmp_path):
    base = tiny_llama()
    base.add_adapter(molora.MoloraConfig(target_modules=["q_proj", "down_proj"], **POOL), adapter_name="default")
    for name, parameter in base.named_parameters():
        if "molora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    base.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path))
    inputs = tiny_inputs(base)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, base.eval()(**inputs).logits)
        assert (base(**inputs).logits - tiny_llama()(**inputs).logits).abs().max() > 1e-3


def test_stacks_have_pools_of_their_own():
    model = pooled(tiny_t5)
    stacks = {}
    for name, owner in owners(model).items():
        stacks.setdefault(id(owner), set()).add(name.split(".")[0])
    assert all(len(stack) == 1 for stack in stacks.values()) and len(stacks) > 4


def test_generation_and_frozen_pools():
    model = pooled().eval()
    ids = tiny_inputs(model)["input_ids"]
    runs = [model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*runs)
    partly = pooled(experts={**POOL["experts"], "frozen": [1]})
    frozen = [name for name, p in partly.named_parameters() if "frozen_" in name]
    assert len(frozen) == 8 and not any(p.requires_grad for n, p in partly.named_parameters() if n in frozen)
    inputs = tiny_inputs(partly)
    partly.train()(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_what_cannot_be_pooled_is_named():
    with pytest.raises(ConfigError, match=r"experts\.pool 'all' is unknown; known: none, shape, name"):
        molora.wrap(tiny_llama(), {}, experts={"pool": "all"})
    with pytest.raises(
        ConfigError, match=r"experts\.pool needs a form of stacked low-rank experts: lora, rank, shared_a"
    ):
        molora.wrap(tiny_llama(), {}, experts={"pool": "shape", "form": "module"}, share="block")
