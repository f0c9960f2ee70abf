"""The routers with training or search through molora.compose, on Conv1D bases and in half precision."""

import pytest
import torch

import molora
from molora import ConfigError
from molora.posthoc.registry import posthoc_routers
from molora.posthoc.rerouting import routers_of
from tests.posthoc.mixtures import save_loras
from tests.tiny import tiny_gpt2, tiny_inputs, tiny_llama

OPTIONS = {
    "xlora": {"top_k": 2, "per_layer": True},
    "fusion": {"width": 4},
    "lora_mixer": {"k": 2},
    "lorahub": {"weights": [0.5, -0.2, 1.0]},
    "kshot": {"experts": [2, 0], "k": 1},
    "mol_moe": {"base": False},
}


@torch.no_grad()
def logits(model, build):
    return model.eval()(**tiny_inputs(build())).logits


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize(("build", "targets"), [(tiny_llama, ["q_proj", "up_proj"]), (tiny_gpt2, ["c_attn", "c_fc"])])
def test_compose_is_import_then_build_and_is_saved(name, build, targets, tmp_path):
    folders = save_loras(tmp_path, 3, build, target_modules=targets)
    torch.manual_seed(3)
    composed = molora.compose(build(), folders, router={"name": name, **OPTIONS[name]})
    routed = posthoc_routers.get(name)(molora.import_peft(build(), folders), **OPTIONS[name])
    state = {n: p for n, p in composed.state_dict().items() if ".molora_router." in n}
    assert state.keys() <= routed.state_dict().keys()
    routed.load_state_dict(state, strict=False)
    torch.testing.assert_close(logits(routed, build), logits(composed, build), atol=1e-6, rtol=1e-6)
    assert (logits(composed, build) - logits(build(), build)).abs().max() > 1e-3
    molora.save(composed, tmp_path / "saved")
    loaded = molora.load(build(), tmp_path / "saved")
    assert torch.equal(logits(loaded, build), logits(composed, build))


@pytest.mark.parametrize("name", list(OPTIONS))
def test_half_precision_bases_keep_their_dtype_and_train(name, tmp_path):
    folders = save_loras(tmp_path, 3)
    model = molora.compose(tiny_llama().to(torch.bfloat16), folders, router={"name": name, **OPTIONS[name]})
    inputs = tiny_inputs(tiny_llama())
    learning = [p for p in model.parameters() if p.requires_grad]
    outputs = model.train()(**inputs, labels=inputs["input_ids"])
    assert outputs.logits.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in learning)
    if name == "lorahub":
        assert not learning
        return
    outputs.loss.backward()
    # with one expert per token of weight 1, a router has no gradient of the task
    given = [p for p in learning if p.grad is not None and p.grad.abs().max() > 0]
    assert given and all(torch.isfinite(p.grad).all() for p in given)


def test_what_needs_data_says_so(tmp_path):
    folders = save_loras(tmp_path, 3)
    for name, wanted in (("lorahub", "give either examples"), ("kshot", "give either examples or a score")):
        with pytest.raises(ConfigError, match=wanted):
            molora.compose(tiny_llama(), folders, router=name)


def test_roma_of_loras_begins_as_the_uniform_mixture_and_learns_in_the_last_blocks(tmp_path):
    folders = save_loras(tmp_path, 3)
    model = molora.compose(tiny_llama(), folders, router={"name": "roma", "layers": 1}).eval()
    assert torch.allclose(
        logits(model, tiny_llama), logits(molora.compose(tiny_llama(), folders), tiny_llama), atol=1e-6
    )
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all(".layers.1." in name and "molora_router" in name for name in learning)
    for router in routers_of(model):
        torch.nn.init.normal_(router.scorer.weight, std=0.2)
    molora.save(model, tmp_path / "saved")
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path / "saved"), tiny_llama), logits(model, tiny_llama))
    arrow = molora.compose(tiny_llama(), folders, router="arrow")
    with pytest.raises(ConfigError, match=r"nothing to learn.*router='roma'"):
        molora.posthoc.route(arrow, "roma")
