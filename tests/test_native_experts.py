"""LoRAs on the 3-D expert parameters of native mixtures, against PEFT's target_parameters and plain loops."""

import copy
import pickle
import types

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model

import molora
from molora.compat.native import native_experts
from molora.control import routed_layers
from molora.errors import ConfigError
from molora.native_experts import RoutedExperts
from tests.tiny import SPECIAL, VOCAB, _build, tiny_inputs, tiny_llama, tiny_qwen3_moe

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    **SPECIAL,
}
ONE = {"experts": {"num": 1, "rank": 2, "alpha": 4}, "target_modules": ["experts"]}
FOUR = {
    "experts": {"num": 4, "rank": 2, "alpha": 4},
    "selector": {"name": "top_k", "k": 2, "normalise": "sum1"},
    "target_modules": ["experts"],
}


def tiny_mixtral():
    return _build(tf.MixtralForCausalLM, tf.MixtralConfig(**SIZES, num_local_experts=4), 0)


def tiny_gpt_oss():  # transposed, with biases, gate and up interleaved
    config = tf.GptOssConfig(
        **SIZES,
        num_local_experts=4,
        head_dim=8,
        rope_scaling=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    return _build(tf.GptOssForCausalLM, config, 0)


FAMILIES = {"qwen3_moe": tiny_qwen3_moe, "mixtral": tiny_mixtral, "gpt_oss": tiny_gpt_oss}


def shaken(model, recipe, **changes):
    model = molora.wrap(model, recipe, **changes).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = (0.4 if "router" in name else 0.3) * torch.randn(parameter.shape, generator=generator)
    return model


def peft_copy(model, base):
    """PEFT's own LoRA on the same parameters, with the weights of a mixture of one LoRA per native expert."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    lora = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=names)).eval()
    for path, layer in routed_layers(model).items():
        wrapper = lora.base_model.model.get_submodule(path)
        for _ in names:  # PEFT nests one wrapper per parameter
            bank = layer.molora_bank["default"].banks[wrapper.parameter_name]
            A, B = bank.stack()
            wrapper.lora_A.default.weight.data = A.detach().clone()
            by_rank = B.detach().unflatten(1, (4, 2)).transpose(1, 2)  # there ranks come first, then native experts
            wrapper.lora_B.default.weight.data = by_rank.flatten(1).clone()
            wrapper = wrapper.base_layer
    return lora


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_lora_per_native_expert_is_pefts(family, implementation):
    base = FAMILIES[family]()
    base.set_experts_implementation(implementation)
    model, inputs = shaken(FAMILIES[family](), ONE), tiny_inputs(base)
    lora = peft_copy(model, base)
    mine, theirs = (m(**inputs, labels=inputs["input_ids"]) for m in (model, lora))
    torch.testing.assert_close(mine.logits, theirs.logits, atol=2e-5, rtol=1e-5)
    assert (mine.logits - FAMILIES[family]()(**inputs).logits).abs().max() > 0.01
    mine.loss.backward()
    theirs.loss.backward()
    for path, layer in routed_layers(model).items():
        wrapper = lora.base_model.model.get_submodule(path)
        for _ in range(2):
            bank = layer.molora_bank["default"].banks[wrapper.parameter_name]
            grad = wrapper.lora_B.default.weight.grad.unflatten(1, (2, 4)).transpose(1, 2).flatten(1)
            torch.testing.assert_close(bank.Bt.grad.t(), grad, atol=1e-6, rtol=1e-3)
            torch.testing.assert_close(bank.A.grad, wrapper.lora_A.default.weight.grad, atol=1e-6, rtol=1e-3)
            wrapper = wrapper.base_layer


@torch.no_grad()
def test_routed_loras_equal_a_loop_over_tokens_and_experts():
    model, inputs = shaken(tiny_mixtral(), FOUR), tiny_inputs(tiny_mixtral())
    seen = {}
    for path, layer in routed_layers(model).items():
        layer.register_forward_hook(lambda _, args, out, path=path: seen.update({path: (args, out)}))
    model(**inputs)
    assert len(seen) == 2
    for path, ((x, index, weights), out) in seen.items():
        layer = routed_layers(model)[path]
        bank, base = layer.molora_bank["default"], layer.base_layer
        router = layer.molora_router["default"].scorer.weight
        for token in range(x.shape[0]):
            probs = torch.softmax(router @ x[token], 0)
            best = probs.topk(2)
            gates = dict(zip(best.indices.tolist(), (best.values / best.values.sum()).tolist(), strict=True))
            y = torch.zeros(32)
            for e, w in zip(index[token].tolist(), weights[token].tolist(), strict=True):

                def product(name, v, e=e, gates=gates, base=base, bank=bank):
                    y = getattr(base, name)[e] @ v
                    for j, gate in gates.items():
                        A, B = bank.banks[name].pair(e * 4 + j)
                        y = y + gate * 2 * B @ (A @ v)
                    return y

                gate, up = product("gate_up_proj", x[token]).chunk(2)
                y = y + w * product("down_proj", torch.nn.functional.silu(gate) * up)
            torch.testing.assert_close(out[token], y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("recipe", [ONE, FOUR], ids=["one", "four"])
def test_fresh_saved_copied_disabled_generated(family, recipe, tmp_path):
    build = FAMILIES[family]
    base, inputs = build(), tiny_inputs(build())
    with torch.no_grad():
        fresh = molora.wrap(build(), recipe).eval()
        torch.testing.assert_close(fresh(**inputs).logits, base(**inputs).logits, atol=1e-6, rtol=1e-6)
        model = shaken(build(), recipe)
        logits = model(**inputs).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
        for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(**inputs).logits, logits, atol=1e-6, rtol=1e-6)
        with loaded.disable_adapter():
            assert torch.equal(loaded(**inputs).logits, base(**inputs).logits)
        kwargs = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        assert torch.equal(loaded.generate(**inputs, **kwargs), loaded.generate(**inputs, **kwargs, use_cache=False))


def test_checkpointing_gives_the_same_gradients():
    grads = []
    recipe = {**FOUR, "losses": [{"name": "switch_balance", "weight": 0.1}]}
    for checkpointing in (False, True):
        model = shaken(tiny_qwen3_moe(), recipe).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = tiny_inputs(model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any("router" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_lora_each_can_be_merged(family):
    model, inputs = shaken(FAMILIES[family](), ONE), tiny_inputs(FAMILIES[family]())
    expected = model(**inputs).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, RoutedExperts) for module in merged.modules())
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=2e-5, rtol=1e-5)


def test_routed_loras_cannot_be_merged_or_exported(tmp_path):
    model = shaken(tiny_mixtral(), FOUR)
    with pytest.raises(ConfigError, match="routes by its input"):
        model.merge_and_unload()
    with pytest.raises(ConfigError, match="leave 'experts' out"):
        molora.export_peft(model, tmp_path / "x", expert=0)


def test_all_linear_takes_native_experts_when_asked():
    plain = molora.report(molora.wrap(tiny_qwen3_moe(), FOUR | {"target_modules": "all-linear"}))
    path = "model.layers.0.mlp.experts"
    assert "native_experts: true" in plain.skipped[path] and path not in plain.wrapped
    model = molora.wrap(tiny_qwen3_moe(), FOUR | {"target_modules": "all-linear", "native_experts": True})
    asked = molora.report(model)
    assert set(asked.wrapped) == {*plain.wrapped, path, "model.layers.1.mlp.experts"} and not asked.skipped
    assert asked.decisions == plain.decisions + 2
    dense = molora.report(molora.wrap(tiny_llama(), {"native_experts": True}))
    assert len(dense.wrapped) == 14


def test_unknown_layouts_are_skipped_with_the_reason():
    class Stacked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.q = torch.nn.Module(), torch.nn.Linear(4, 4)
            self.experts.weight = torch.nn.Parameter(torch.randn(2, 4, 4))

    report = molora.report(molora.wrap(Stacked(), {"experts": {"num": 2}}, target_modules=["q", "experts"]))
    assert report.wrapped == ["q"]
    assert "3-D expert parameters of Module are quantised, sharded or of an unknown layout" in report.skipped["experts"]


def test_other_forms_are_skipped_with_the_reason():
    with pytest.raises(ConfigError, match=r"shared_a.*cannot adapt native experts"):
        molora.wrap(tiny_mixtral(), FOUR, experts={"form": "shared_a"})
    report = molora.report(
        molora.wrap(
            tiny_qwen3_moe(),
            {"experts": {"form": "module"}, "share": "block"},
            target_modules=["experts", "q_proj"],
        )
    )
    assert "experts of form 'module' cannot act" in report.skipped["model.layers.0.mlp.experts"]


def test_sharded_experts_are_not_taken():
    experts = tiny_mixtral().model.layers[0].mlp.experts
    assert native_experts(experts) == {"gate_up_proj": (32, 32), "down_proj": (16, 32)}
    experts._is_expert_parallel = True
    assert native_experts(experts) is None
    assert native_experts(types.SimpleNamespace()) is None
