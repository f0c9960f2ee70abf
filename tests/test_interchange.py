"""import_peft and export_peft against PEFT itself: the same function, or a refusal that says why."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file

import molora
from molora import ConfigError, LoadError
from molora.control import routed_layers
from molora.to_peft import _factors
from tests.adapters import CONFIG, RECIPE, WEIGHTS, anatomy, change_config, change_tensors, logits, wrapped
from tests.tiny import tiny_bert_classifier, tiny_gpt2, tiny_inputs, tiny_llama, tiny_t5


def peft_lora(folder, seed=0, build=tiny_llama, dtype=torch.float32, **options):
    """Save a PEFT LoRA with random A and B; returns the folder."""
    model = get_peft_model(build(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **options}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    if dtype != torch.float32:
        change_tensors(folder, lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))
    return folder


def peft_says(folder, build=tiny_llama):
    return logits(PeftModel.from_pretrained(build(), folder).eval())


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """LoRAs that differ in everything that may differ."""
    root = tmp_path_factory.mktemp("loras")
    attention, mlp = ["q_proj", "v_proj"], ["gate_proj", "down_proj"]
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 6, "k_proj": 1}, "alpha_pattern": {"v_proj": 5}}
    return [
        peft_lora(root / "plain", 1, target_modules=attention),
        peft_lora(root / "odd scale", 2, r=3, lora_alpha=7, target_modules=mlp),
        peft_lora(root / "rslora", 3, r=2, use_rslora=True, target_modules="all-linear"),
        peft_lora(root / "patterns", 4, target_modules=["q_proj", "k_proj", "v_proj"], **patterns),
        peft_lora(root / "half", 5, r=8, dtype=torch.bfloat16, target_modules=["o_proj"]),
        peft_lora(root / "one layer", 6, target_modules=["up_proj"], layers_to_transform=[1]),
    ]


def one_hot(expert, count):
    return torch.eye(count)[expert]


def test_each_imported_expert_is_its_lora(loras):
    model = molora.import_peft(tiny_llama(), loras).eval()
    base = logits(tiny_llama())
    layers = routed_layers(model)
    touched = {
        key.rpartition(".lora_")[0].removeprefix("base_model.model.") for f in loras for key in load_file(f / WEIGHTS)
    }
    assert set(layers) == touched
    for number, folder in enumerate(loras):
        want = peft_says(folder)
        with molora.pin(model, one_hot(number, len(loras))):
            got = logits(model)
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()
        assert (want - base).abs().max() > 1e-2  # the LoRA does something
    assert model.peft_config["default"].experts["names"] == [folder.name for folder in loras]
    # no rank is wasted: a layer that a LoRA does not touch has one idle rank, which changes nothing
    config = LoraConfig.from_pretrained(loras[3])
    for path, layer in layers.items():
        bank = layer.molora_bank["default"]
        assert bank.ranks[0] == (4 if path.endswith(("q_proj", "v_proj")) else 1)
        assert bank.ranks[2] == 2
        if path.endswith("layers.0.self_attn.q_proj"):
            assert bank.ranks[3] == config.rank_pattern["layers.0.self_attn.q_proj"] == 6
        if not path.endswith(("q_proj", "v_proj")):
            assert not bank.pair(0)[1].any()


def test_the_default_is_the_even_mixture_of_peft(loras):
    """PEFT concatenates LoRAs with weights 1 / E; the default router starts there, and can learn to leave."""
    model = molora.import_peft(tiny_llama(), loras[:3]).eval()
    reference = PeftModel.from_pretrained(tiny_llama(), loras[0], adapter_name="a")
    for name, folder in zip("bc", loras[1:], strict=False):
        reference.load_adapter(folder, name)
    # PEFT 0.21 leaves layers out of "cat" that not all of them touch, so the sum is taken by hand, layer by layer
    base = tiny_llama()
    deltas = {}
    for name in "abc":
        for path, module in reference.get_base_model().named_modules():
            if hasattr(module, "lora_A") and name in module.lora_A:
                deltas.setdefault(path, []).append(module.get_delta_weight(name))
    for path, changes in deltas.items():
        base.get_submodule(path).weight.data += sum(changes) / 3
    assert (logits(model) - logits(base)).abs().max() <= 2e-6
    model.train()
    model(**tiny_inputs(base), labels=tiny_inputs(base)["input_ids"]).loss.backward()
    routers = [p for name, p in model.named_parameters() if "molora_router" in name]
    assert routers and all(p.requires_grad and p.grad.abs().sum() > 0 for p in routers)


def test_imported_mixtures_train_save_and_load(loras, tmp_path):
    recipe = {"selector": {"name": "top_k", "k": 2}, "scorer": "cosine"}
    model = molora.import_peft(
        tiny_llama(), loras[:4], recipe=recipe, names=list("abcd"), experts={"frozen": "all", "dropout": 0.1}
    )
    assert all(("molora_router" in name) == p.requires_grad for name, p in model.named_parameters())
    molora.save(model, tmp_path)
    model.eval()
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path)), logits(model))
    assert json.loads((tmp_path / CONFIG).read_text())["experts"]["names"] == list("abcd")
    # some experts frozen, others not; import into a wrapped model beside another adapter
    again = molora.load(tiny_llama(), tmp_path)
    molora.import_peft(again, loras[:3], adapter_name="second", experts={"frozen": [1]})
    again.set_adapter("second")
    with molora.pin(again, one_hot(1, 3)):
        assert (logits(again) - peft_says(loras[1])).abs().max() <= 2e-6
    again.set_adapter("default")
    assert torch.equal(logits(again), logits(model))


def test_one_scale_for_all_keeps_every_bit(tmp_path):
    folders = [peft_lora(tmp_path / name, seed, lora_alpha=7, r=3) for seed, name in enumerate("ab")]
    model = molora.import_peft(tiny_llama(), folders)
    for number, folder in enumerate(folders):
        tensors = load_file(folder / WEIGHTS)
        for path, layer in routed_layers(model).items():
            A, B = layer.molora_bank["default"].pair(number)
            assert torch.equal(A, tensors[f"base_model.model.{path}.lora_A.weight"])
            assert torch.equal(B, tensors[f"base_model.model.{path}.lora_B.weight"])
        molora.export_peft(model, tmp_path / "back", expert=number)
        back = load_file(tmp_path / "back" / WEIGHTS)
        assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in back)
        assert torch.equal(peft_says(tmp_path / "back"), peft_says(folder))


@pytest.mark.parametrize("build, target", [(tiny_gpt2, ["c_attn", "c_fc"]), (tiny_t5, ["q", "wo"])])
def test_other_architectures(build, target, tmp_path):
    folders = [peft_lora(tmp_path / str(n), n, build, r=n + 1, target_modules=target[n:]) for n in range(2)]
    model = molora.import_peft(build(), folders).eval()
    for number, folder in enumerate(folders):
        want = peft_says(folder, build)
        with molora.pin(model, one_hot(number, 2)):
            assert (logits(model) - want).abs().max() <= 2e-6 * max(1, want.abs().max())
        molora.export_peft(model, tmp_path / "back", expert=number)
        assert (peft_says(tmp_path / "back", build) - want).abs().max() <= 2e-6 * max(1, want.abs().max())
    assert json.loads((tmp_path / "back" / CONFIG).read_text())["fan_in_fan_out"] == (build is tiny_gpt2)


def test_names_come_from_folders_or_are_given(tmp_path):
    a, b = peft_lora(tmp_path / "x" / "same"), peft_lora(tmp_path / "y" / "same", 1)
    model = molora.import_peft(tiny_llama(), [a, str(b)])
    assert model.peft_config["default"].experts["names"] == ["same_0", "same_1"]
    for names in (["one"], ["one", "one"]):
        with pytest.raises(ConfigError, match="2 different names"):
            molora.import_peft(tiny_llama(), [a, b], names=names)
    with pytest.raises(ConfigError, match="needs a list of LoRA folders"):
        molora.import_peft(tiny_llama(), str(a))
    with pytest.raises(ConfigError, match="needs a list of LoRA folders"):
        molora.import_peft(tiny_llama(), [])


# --- what cannot become an expert -------------------------------------------------------------------------------------

CONFIGS = {
    "DoRA": ({"use_dora": True}, "use_dora=True: DoRA also rescales"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only': trained biases"),
    "bias of B": ({"lora_bias": True}, "lora_bias=True"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*trained whole"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices=.*embeddings"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters=.*bare parameters"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights as well"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "unknown key": ({"from_the_future": 3}, "from_the_future=3: molora does not know"),
    "another type": ({"peft_type": "IA3"}, "adapter of type 'IA3'"),
    "a mixture": ({"peft_type": "MOLORA"}, "adapter of type 'MOLORA'"),
    "alpha": ({"lora_alpha": "much"}, "lora_alpha 'much'"),
    "no rank": ({"r": 0}, r"r=0, which is no rank"),
    "rank": ({"r": 5}, r"needs A \(5, 32\) and B \(32, 5\), the file holds \(4, 32\)"),
}


@pytest.mark.parametrize("changes, message", CONFIGS.values(), ids=CONFIGS)
def test_configs_that_say_more_than_low_rank_pairs_are_refused(changes, message, tmp_path):
    change_config(peft_lora(tmp_path / "bad"), **changes)
    base = tiny_llama()
    before = anatomy(base)
    with pytest.raises(LoadError, match=message):
        molora.import_peft(base, [peft_lora(tmp_path / "good"), tmp_path / "bad"])
    assert anatomy(base) == before


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_peft_saves_beside_its_lora_is_the_bases_own_or_refused(tied, tmp_path):
    """PEFT adds the weight of a head, or an embedding, to the file of a LoRA on it, whether or not it was trained."""

    def build(**options):
        return tiny_llama(tie_word_embeddings=tied, **options)

    peft_lora(tmp_path / "plain", 1, build)
    folder = peft_lora(tmp_path / "head", 2, build, target_modules=["q_proj", "lm_head"])
    name = "base_model.model.lm_head.base_layer.weight"
    assert name in load_file(folder / WEIGHTS)  # or this test would prove nothing
    for make in (molora.import_peft, molora.compose):
        model = make(build(), [tmp_path / "plain", folder]).eval()
        with molora.pin(model, one_hot(1, 2)):
            assert (logits(model) - peft_says(folder, build)).abs().max() < 1e-5
    molora.live(model).swap("head", folder)  # into a model that runs
    with molora.pin(model, one_hot(1, 2)):
        assert (logits(model) - peft_says(folder, build)).abs().max() < 1e-5
    for make in (molora.import_peft, molora.compose):
        (note,) = molora.report(make(build(), [tmp_path / "plain", folder])).notes
        assert note == "'head' also holds the base's own weight of lm_head, which stays as it is"
    assert f"note: {note}" in str(molora.report(model))
    half = build().to(torch.bfloat16)  # the same weight, as this base has it
    assert molora.report(molora.import_peft(half, [folder])).notes
    change_tensors(folder, lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(32)}))
    assert "lm_head, model.norm" in molora.report(molora.import_peft(build(), [folder])).notes[0]
    cases = [
        (lambda t: t[name][3].mul_(1 + 2**-20), r"lm_head.base_layer.weight' differs from the base's own by up to \d"),
        (lambda t: t.update({name: t[name][:90].clone()}), r"is \(90, 32\), the base's own is \(96, 32\)"),
        (lambda t: t.update({name: t[name].fill_(torch.nan)}), "differs from the base's own"),
        (lambda t: t.update({"base_model.model.lm_hed.weight": t.pop(name)}), "lm_hed.weight' is a weight of the base"),
    ]
    whole = (folder / WEIGHTS).read_bytes()
    for change, message in cases:
        (folder / WEIGHTS).write_bytes(whole)
        change_tensors(folder, change)
        base = build()
        before = anatomy(base)
        with pytest.raises(LoadError, match=message):
            molora.import_peft(base, [folder])
        assert anatomy(base) == before


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS = {
    f"{LAYER}.lora_magnitude_vector": "belongs to DoRA",
    f"{LAYER}.base_layer.bias": "is a trained bias",
    "base_model.model.model.embed_tokens.lora_embedding_A": "LoRA on an embedding",
    "base_model.model.lm_head.weight": "trained whole",
    f"{LAYER}.lora_variant.weight": "is not the A or B",
    "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": "has no partner",
    LAYER.removeprefix("base_model.model.") + ".lora_A.weight": "is there twice",
}


def test_every_tensor_is_used_or_named(tmp_path):
    """All problems of all files come in one error, with the file they belong to."""
    change_tensors(
        peft_lora(tmp_path / "one"), lambda tensors: tensors.update({name: torch.ones(4, 32) for name in TENSORS})
    )
    peft_lora(tmp_path / "two", build=lambda **o: tiny_llama(num_hidden_layers=3, **o))
    peft_lora(tmp_path / "three", build=lambda **o: tiny_llama(hidden_size=64, **o))
    change_tensors(peft_lora(tmp_path / "four"), lambda tensors: next(iter(tensors.values())).fill_(torch.nan))
    peft_lora(tmp_path / "five")
    (tmp_path / "five" / WEIGHTS).rename(tmp_path / "five" / "adapter_model.bin")
    with pytest.raises(LoadError) as caught:
        molora.import_peft(tiny_llama(), [tmp_path / name for name in ("one", "two", "three", "four", "five")])
    text = str(caught.value)
    for name, why in TENSORS.items():
        assert any("'one'" in line and name in line and why in line for line in text.splitlines()), (name, text)
    assert "'two': the model has no linear layer 'model.layers.2.self_attn.q_proj'" in text
    assert "'three': layer 'model.layers.0.self_attn.q_proj' needs A (4, 32)" in text
    assert "'four': tensor" in text and "holds NaN" in text
    assert "'five': adapter_model.safetensors is missing; adapter_model.bin is a pickle" in text


def test_recipes_that_cannot_hold_loras(loras):
    base = tiny_llama()
    before = anatomy(base)
    with pytest.raises(ConfigError, match=r"experts.form 'rank' cannot hold LoRAs"):
        molora.import_peft(base, loras, recipe="smora")
    with pytest.raises(ConfigError, match=r"come from the LoRAs; leave out experts.num, experts.rank, target_modules"):
        molora.import_peft(base, loras, experts={"rank": 2, "num": 3}, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="k=3 with 2"):
        molora.import_peft(base, loras[:2], recipe={"selector": {"name": "top_k", "k": 3}})
    assert anatomy(base) == before
    model = molora.import_peft(base, loras[:2], recipe="mola")  # its list of numbers gives way to the two LoRAs
    assert model.peft_config["default"].experts["num"] == 2


# --- export -----------------------------------------------------------------------------------------------------------

MIXTURES = {
    "lora": RECIPE,
    "ranks": {"experts": {"num": 3, "rank": [1, 3, 2], "scaling": 0.7}},
    "odd scale": {"experts": {"num": 3, "rank": 3, "alpha": 7, "rslora": True}},
    "rank": {"experts": {"form": "rank", "rank": 1, "num": 3}},
    "shared_a": {"experts": {"form": "shared_a", "rank": 2, "num": 3}},
    "layers differ": RECIPE | {"layers": [{"match": "up_proj|layers.1.self_attn", "experts": {"rank": 5}}]},
    "scales differ": RECIPE | {"layers": [{"match": "up_proj", "experts": {"alpha": 3}}]},
    "some layers": RECIPE | {"target_modules": r"model.layers.1\..*(q_proj|down_proj)"},
}
GATES = [0.3, -1.25, 0.0]


CASES = [(name, tiny_llama) for name in MIXTURES] + [("odd scale", tiny_gpt2), ("layers differ", tiny_gpt2)]


@pytest.mark.parametrize("name, build", CASES)
def test_exports_are_the_same_function_in_stock_peft(name, build, tmp_path):
    recipe = MIXTURES[name]
    if build is tiny_gpt2 and "layers" in recipe:
        recipe = recipe | {"layers": [{"match": "c_fc", "experts": {"rank": 5}}]}
    model = wrapped(recipe=recipe, base=build())
    base = logits(build())
    cases = [(one_hot(e, 3), {"expert": e}) for e in range(3)] + [
        (torch.tensor(GATES), {"gates": GATES}),
        (torch.tensor(GATES), {"gates": {path: torch.tensor(GATES) for path in routed_layers(model)}}),
    ]
    for gates, how in cases:
        molora.export_peft(model, tmp_path, **how)
        reference = PeftModel.from_pretrained(build(), tmp_path).eval()
        with molora.pin(model, gates):
            want, exact = logits(model), logits(copy.deepcopy(model).double())
        # the float32 noise of a tiny GPT-2 alone is above 3e-6, so that one is compared in float64 only
        assert build is tiny_gpt2 or (logits(reference) - want).abs().max() <= 3e-6
        assert (logits(reference.double()) - exact).abs().max() <= 1e-6
        assert (exact - base).abs().max() > 1e-3
        merged = reference.merge_and_unload()  # so fan_in_fan_out is right, too
        assert (logits(merged) - exact).abs().max() <= 1e-6
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["fan_in_fan_out"] == (build is tiny_gpt2)
    assert "molora is not needed" in (tmp_path / "README.md").read_text()


def test_an_export_is_exact_by_its_own_formula(tmp_path):
    """scale * B A of the file, in float64, equals the sum over experts of g_e scaling B_e A_e from the bank."""
    model = wrapped(recipe=MIXTURES["ranks"])
    molora.export_peft(model, tmp_path, gates=GATES)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    for path, layer in routed_layers(model).items():
        bank = layer.molora_bank["default"]
        A, B = (tensors[f"base_model.model.{path}.lora_{part}.weight"].double() for part in "AB")
        assert A.shape[0] == 1 + 3 == config["r"]  # the expert of gate 0 is left out
        start = [0, 1, 4]
        want = sum(
            gate * 0.7 * bank.B[:, s : s + r].double() @ bank.A[s : s + r].double()
            for gate, s, r in zip(GATES, start, bank.ranks, strict=True)
        )
        assert torch.allclose(config["lora_alpha"] / config["r"] * B @ A, want, rtol=0, atol=1e-7)


@given(scale=st.floats(1e-3, 1e3), rank=st.integers(1, 300))
def test_the_scale_of_an_export_is_never_rounded(scale, rank):
    """PEFT computes alpha / rank; where no alpha gives the scale, it is 1 and the scale goes into B."""
    A, B = torch.ones(rank, 2), torch.ones(3, rank, dtype=torch.float64)
    tensors, shapes = _factors({"layer": (A, B, scale)})
    r, alpha = shapes["layer"]
    B = tensors["base_model.model.layer.lora_B.weight"]
    assert r == rank and (alpha / r) * B[0, 0].item() == scale


def test_one_layer_of_each_block(tmp_path):
    """With experts.form module, the experts are the layers of a block."""
    model = wrapped(recipe="milora")
    layers = list(routed_layers(model))
    count = len(layers) // 2
    for expert in (0, 4):
        with molora.pin(model, one_hot(expert, count)):
            want = logits(model)
        molora.export_peft(model, tmp_path, expert=expert)
        keys = {key.partition(".lora_")[0] for key in load_file(tmp_path / WEIGHTS)}
        assert keys == {f"base_model.model.{layers[block * count + expert]}" for block in range(2)}
        assert (peft_says(tmp_path) - want).abs().max() <= 2e-6
    gates = torch.linspace(-1, 1, count)
    with molora.pin(model, gates):
        want = logits(model)
    molora.export_peft(model, tmp_path, gates=gates)
    assert (peft_says(tmp_path) - want).abs().max() <= 2e-6
    with pytest.raises(ConfigError, match="there is no expert 7"):
        molora.export_peft(model, tmp_path, expert=7)


def test_numbers_of_experts_that_differ_by_layer(tmp_path):
    """MoLA: an expert that some layers do not have is an error that names them; gates by layer work."""
    model = wrapped(recipe="mola", experts={"num": [2, 3], "rank": 2}, selector={"k": 1})
    with pytest.raises(ConfigError, match=r"layer 'model.layers.0.*' has 2 experts, there is no expert 2") as caught:
        molora.export_peft(model, tmp_path, expert=2)
    assert str(caught.value).count("there is no expert 2") == 7
    with pytest.raises(ConfigError, match=r"gates \[1.0, 0.0\] do not fit"):
        molora.export_peft(model, tmp_path, gates=[1, 0])
    gates = {path: torch.rand(layer.molora_bank["default"].num_experts) for path, layer in routed_layers(model).items()}
    with molora.pin(model, gates):
        want = logits(model)
    molora.export_peft(model, tmp_path, gates=gates)
    assert (peft_says(tmp_path) - want).abs().max() <= 2e-6
    assert json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]


def test_a_trained_head_goes_along(tmp_path):
    model = wrapped(base=tiny_bert_classifier())
    with molora.pin(model, one_hot(1, 3)):
        want = logits(model)
    molora.export_peft(model, tmp_path, expert=1)
    assert (peft_says(tmp_path, tiny_bert_classifier) - want).abs().max() <= 2e-6
    assert (
        PeftModel.from_pretrained(tiny_bert_classifier(), tmp_path).peft_config["default"].task_type == TaskType.SEQ_CLS
    )


def test_experts_are_exported_by_name_and_from_any_adapter(loras, tmp_path):
    model = molora.import_peft(tiny_llama(), loras[:3], names=["news", "maths", "law"])
    model.add_adapter("other", copy.deepcopy(wrapped().peft_config["default"]))
    molora.export_peft(model, tmp_path / "maths", expert="maths")
    assert (peft_says(tmp_path / "maths") - peft_says(loras[1])).abs().max() <= 1e-6
    molora.export_peft(model, tmp_path / "fresh", expert=0, adapter="other")
    assert torch.equal(peft_says(tmp_path / "fresh"), logits(tiny_llama()))
    with pytest.raises(ConfigError, match="no expert is called 'math'; known: news, maths, law"):
        molora.export_peft(model, tmp_path / "x", expert="math")
    with pytest.raises(ConfigError, match="none has a name"):
        molora.export_peft(model, tmp_path / "x", expert="news", adapter="other")


def test_what_cannot_be_exported(tmp_path):
    model = wrapped()
    for how in ({}, {"expert": 0, "gates": [1, 0, 0]}):
        with pytest.raises(ConfigError, match="needs either expert"):
            molora.export_peft(model, tmp_path / "x", **how)
    for expert in (3, -1):
        with pytest.raises(ConfigError, match=f"has 3 experts, there is no expert {expert}"):
            molora.export_peft(model, tmp_path / "x", expert=expert)
    for gates in ([1, 0], [1, 0, float("nan")]):
        with pytest.raises(ConfigError, match="do not fit"):
            molora.export_peft(model, tmp_path / "x", gates=gates)
    with pytest.raises(ConfigError, match="all gates are 0"):
        molora.export_peft(model, tmp_path / "x", gates=[0, 0, 0])
    with pytest.raises(ConfigError, match=r"missing or unknown: .*nowhere"):
        gates = {path: [1, 0, 0] for path in routed_layers(model)} | {"nowhere": [1, 0, 0]}
        molora.export_peft(model, tmp_path / "x", gates=gates)
    assert not (tmp_path / "x").exists()
