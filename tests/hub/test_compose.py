"""compose: every expert is its LoRA exactly, whatever they are and where they come from; and routers by name."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import molora
from molora import ConfigError, LoadError
from molora.control import routed_layers, tuner_of
from molora.hub.compose import FREE, compose, live
from molora.posthoc.registry import posthoc_routers
from tests.adapters import CONFIG, WEIGHTS, anatomy, change_config, change_tensors, logits
from tests.test_interchange import peft_lora, peft_says
from tests.tiny import tiny_gpt2, tiny_inputs, tiny_llama


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """LoRAs that differ in rank, alpha, targets, scale rule, patterns and dtype."""
    root = tmp_path_factory.mktemp("loras")
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 5}}
    return [
        peft_lora(root / "plain", 1, target_modules=["q_proj", "v_proj"]),
        peft_lora(root / "odd", 2, r=3, lora_alpha=7, target_modules=["gate_proj", "down_proj"]),
        peft_lora(root / "rslora", 3, r=2, use_rslora=True, target_modules="all-linear"),
        peft_lora(root / "patterns", 4, target_modules=["q_proj", "v_proj"], **patterns),
        peft_lora(root / "half", 5, r=8, dtype=torch.bfloat16, target_modules=["o_proj"]),
        peft_lora(root / "float16", 6, r=5, dtype=torch.float16, target_modules=["up_proj"]),
    ]


def close(got, want):
    return (got - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("room", [{}, {"slots": 9, "max_rank": 10}, {"slots": 7}], ids=["exact", "much", "one more"])
def test_each_expert_is_its_lora(loras, room):
    model = compose(tiny_llama(), loras, **room).eval()
    mixture = live(model)
    assert mixture.names == [folder.name for folder in loras]
    assert mixture.free == room.get("slots", len(loras)) - len(loras)
    base = logits(tiny_llama())
    for folder in loras:
        want = peft_says(folder)
        with mixture.using(folder.name):
            assert close(logits(model), want)
        assert (want - base).abs().max() > 1e-2  # the LoRA does something
    ranks = {rank for layer in routed_layers(model).values() for rank in layer.molora_bank["default"].ranks}
    assert ranks == ({room.get("max_rank", 8)} if room else {1, 2, 3, 4, 5, 6, 8})


def test_uniform_is_the_mean_of_the_updates_whatever_room_there_is(loras):
    """Against the base with the mean of PEFT's own weight changes added, in plain torch."""
    merged = tiny_llama()
    for folder in loras:
        one = PeftModel.from_pretrained(tiny_llama(), folder)
        for path, layer in one.get_base_model().named_modules():
            if hasattr(layer, "get_delta_weight") and "default" in getattr(layer, "lora_A", {}):
                merged.get_submodule(path).weight.data += layer.get_delta_weight("default").float() / len(loras)
    want = logits(merged)
    for room in ({}, {"slots": 8}, {"slots": 11, "max_rank": 9}):
        assert (logits(compose(tiny_llama(), loras, **room).eval()) - want).abs().max() < 1e-5


def test_spare_slots_take_no_part_in_a_learned_router(loras):
    """A softmax over 3 experts gives the same gates with 5 free slots beside them, whatever those hold and score."""
    recipe = {"scorer": "linear", "selector": {"name": "top_k", "k": 2}, "link": "softmax"}
    narrow = compose(tiny_llama(), loras[:3], recipe).eval()
    wide = compose(tiny_llama(), loras[:3], recipe, slots=8).eval()
    for path, layer in routed_layers(wide).items():
        small, large = (m.molora_router["default"].scorer for m in (routed_layers(narrow)[path], layer))
        large.weight.data.copy_(100 * torch.randn(large.weight.shape))
        large.weight.data[:3] = small.weight.data
        bank = layer.molora_bank["default"]
        for slot in range(3, 8):  # as if something were being written there
            bank.write(slot, torch.randn(bank.ranks[slot], bank.d_in), torch.randn(bank.d_out, bank.ranks[slot]))
    with molora.record(wide) as seen:
        got = logits(wide)
    assert (got - logits(narrow)).abs().max() < 1e-5
    for routing in seen.values():
        assert (routing.gates[..., 3:] == 0).all() and (routing.probs[..., 3:] == 0).all()
        assert (routing.gates[..., :3].sum(-1) - 1).abs().max() < 1e-6
    wide.train()  # the same in training, where other kernels run and losses are collected
    assert (wide(**tiny_inputs(tiny_llama())).logits - got).abs().max() < 1e-5


def test_adapters_come_from_memory_too(loras, tmp_path):
    loaded = PeftModel.from_pretrained(tiny_llama(), loras[2], adapter_name="mine")
    pair = json.loads((loras[0] / CONFIG).read_text()), load_file(loras[0] / WEIGHTS)
    typed = LoraConfig.from_pretrained(loras[1]), load_file(loras[1] / WEIGHTS)
    model = compose(tiny_llama(), [loaded, pair, typed, str(loras[4])]).eval()
    assert live(model).names == ["mine", "expert_1", "expert_2", "half"]
    for name, folder in zip(live(model).names, [loras[2], loras[0], loras[1], loras[4]], strict=True):
        with molora.using_experts(model, name):
            assert close(logits(model), peft_says(folder))


def test_adapters_come_from_a_library_by_name(loras, tmp_path):
    from molora.hub.store import Hub

    hub = Hub(tmp_path / "library")
    for folder in (loras[0], loras[4]):
        hub.add(folder, name=folder.name)
    model = compose(tiny_llama(), ["plain", "half@1"], hub=tmp_path / "library", slots=3).eval()
    with live(model).using("half"):
        assert close(logits(model), peft_says(loras[4]))
    live(model).add("again", "plain")  # the library is remembered
    with live(model).using("again"):
        assert close(logits(model), peft_says(loras[0]))


def test_a_name_without_its_library_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match=r"there is no folder 'law@2'.*; to find it in a library, say which \(hub=\)"):
        compose(tiny_llama(), ["law@2"])


def test_gpt2_whose_weights_are_transposed(tmp_path):
    folder = peft_lora(tmp_path / "a", build=tiny_gpt2, target_modules=["c_attn", "c_fc"])
    model = compose(tiny_gpt2(), {"one": folder}, slots=2).eval()
    with molora.using_experts(model, "one"):
        assert close(logits(model), peft_says(folder, tiny_gpt2))


def test_fixed_weights_are_the_weighted_sum(loras):
    model = compose(tiny_llama(), loras[:3], slots=4).eval()
    weights = {"plain": 0.7, "rslora": -0.4}
    with molora.using_experts(model, weights) as request:
        got = logits(model)
        assert request.gates.flatten().tolist() == pytest.approx([0.7, 0, -0.4, 0])
    with molora.pin(model, torch.tensor([0.7, 0.0, -0.4, 0.0])):
        assert torch.equal(logits(model), got)
    assert (logits(model) - got).abs().max() > 1e-3  # the router decides again


def test_targets_make_room_for_adapters_to_come(loras):
    model = compose(tiny_llama(), loras[:1], targets=["down_proj"], max_rank=6, slots=2).eval()
    assert {path.rpartition(".")[2] for path in routed_layers(model)} == {"q_proj", "v_proj", "down_proj"}
    with molora.using_experts(model, "plain"):
        assert close(logits(model), peft_says(loras[0]))
    every = compose(tiny_llama(), loras[:1], targets="all-linear")
    assert {path.rpartition(".")[2] for path in routed_layers(every)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_all_problems_are_told_at_once_and_nothing_changes(loras, tmp_path):
    dora = peft_lora(tmp_path / "dora", use_dora=True)
    nan = peft_lora(tmp_path / "nan")
    change_tensors(nan, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    base = tiny_llama()
    before = anatomy(base)
    with pytest.raises(LoadError) as error:
        compose(base, [loras[0], dora, nan, tmp_path / "nowhere"])
    for part in ("'dora'", "DoRA", "'nan'", "NaN", "'nowhere'"):
        assert part in str(error.value)
    assert anatomy(base) == before
    change_config(nan, use_dora=True)
    held = json.loads((nan / CONFIG).read_text()), load_file(nan / WEIGHTS)
    with pytest.raises(LoadError, match=r"(?s)DoRA.*NaN"):
        compose(base, [held])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"slots": 1}, "slots must be a whole number of at least 2"),
        ({"max_rank": 2}, "max_rank must be a whole number of at least 4"),
        ({"targets": ["q_prj"]}, "'q_prj' ends no linear layer's name; did you mean 'q_proj'"),
        ({"names": ["one"]}, "names must hold 2 different names"),
        ({"names": ["one", "free:3"]}, "does not begin with 'free:'"),
        ({"router": "arow"}, "router 'arow' is unknown; did you mean 'arrow'"),
        ({"router": {"name": "arow"}}, "did you mean 'arrow'"),
        ({"router": {"name": "arrow", "top": 1}}, "top_k"),
    ],
)
def test_wrong_arguments(loras, given, says):
    base = tiny_llama()
    before = anatomy(base)
    with pytest.raises(ConfigError, match=says):
        compose(base, [loras[0], loras[1]], **given)
    assert anatomy(base) == before


def test_saved_and_loaded_it_is_the_same_mixture_with_its_free_slots(loras, tmp_path):
    model = compose(tiny_llama(), loras[:2], slots=4).eval()
    live(model).add("more", loras[0])
    live(model).remove("plain")
    want = logits(model)
    molora.save(model, tmp_path / "saved")
    names = json.loads((tmp_path / "saved" / CONFIG).read_text())["experts"]["names"]
    assert names == [f"{FREE}0", "odd", "more", f"{FREE}3"]
    with pytest.warns(UserWarning, match=r"has 2 slots for experts to come.*molora.live\(model\) closes them"):
        again = molora.load(tiny_llama(), tmp_path / "saved").eval()
    assert live(again).names == ["odd", "more"] and live(again).free == 2
    assert torch.equal(logits(again), want)
    assert live(again) is live(again)


def test_a_copy_has_experts_and_requests_of_its_own(loras):
    model = compose(tiny_llama(), loras[:2], slots=3, targets="all-linear").eval()
    want = logits(model)
    twin = copy.deepcopy(model)
    assert live(twin) is not live(model)
    live(twin).swap("plain", loras[2])
    assert torch.equal(logits(model), want)
    with live(twin).using("plain"):
        assert close(logits(twin), peft_says(loras[2]))


def test_export_of_one_expert_is_its_lora_again(loras, tmp_path):
    model = compose(tiny_llama(), loras[:3], slots=4, max_rank=6).eval()
    live(model).swap("plain", loras[3])
    molora.export_peft(model, tmp_path / "out", expert="plain")
    assert close(peft_says(tmp_path / "out"), peft_says(loras[3]))


def test_arrow_by_name_routes_by_the_weights(loras):
    model = compose(tiny_llama(), loras[:3], {"name": "arrow", "top_k": 1}, slots=4).eval()
    assert tuner_of(model).peft_config["default"].recipe == "posthoc/arrow"
    with molora.record(model) as seen:
        logits(model)
    for path, routing in seen.items():
        assert ((routing.gates != 0).sum(-1) == 1).all() and (routing.gates[..., 3] == 0).all()
        bank = routed_layers(model)[path].molora_bank["default"]
        for slot in range(3):
            A, B = bank.pair(slot)
            vector = routed_layers(model)[path].molora_router["default"].scorer.weight[slot]
            if B.any():
                want = torch.linalg.svd(B.double() @ A.double()).Vh[0].float()
                assert (vector @ want).abs() == pytest.approx(1.0, abs=1e-5)


def test_a_router_of_another_package_is_found_by_name(loras):
    calls = []

    def build(model, adapter="default", *, strength: float = 1.0):
        """Note that it was asked."""
        calls.append((adapter, strength))

    posthoc_routers.register("noted")(build)
    try:
        compose(tiny_llama(), loras[:2], {"name": "noted", "strength": 2.0}, adapter_name="mix")
    finally:
        del posthoc_routers._components["noted"], posthoc_routers._facts["noted"]
    assert calls == [("mix", 2.0)]


def test_a_peft_model_with_another_kind_of_adapter_is_refused(loras):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(LoadError, match="DoRA"):
        compose(tiny_llama(), [model])
