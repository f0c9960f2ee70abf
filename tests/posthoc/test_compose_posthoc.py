"""The routers without joint training through molora.compose, molora.posthoc.route and a live mixture."""

import shutil

import pytest
import torch

import molora
from molora.errors import ConfigError
from molora.posthoc import describing, prompted, route, train_gates
from molora.posthoc.arrow import build as arrow
from molora.posthoc.gates import save_gates
from molora.posthoc.registry import posthoc_routers
from tests.posthoc.library import library
from tests.posthoc.test_phatgoose import random_gates
from tests.posthoc.words import Words
from tests.tiny import tiny_inputs, tiny_llama

TEXTS = ["film", "law", "poem"]


def batch():
    return tiny_inputs(tiny_llama())


@torch.no_grad()
def logits(model):
    return model.eval()(**batch()).logits


@pytest.fixture
def folders(tmp_path):
    return library(tmp_path, 3)


def options_of(folders):
    return {
        "arrow": {"top_k": 2},
        "average": {"data": {e: [batch()] for e in range(3)}},
        "phatgoose": {"gates": random_gates(folders)},
        "glider": {"gates": random_gates(folders), "descriptions": TEXTS},
        "blocks": {"block": {"type": "Average", "children": ["lora0", "lora2"], "weights": [1, 3]}},
        "retrieval": {"embed": Words(), "examples": {e: [text] for e, text in enumerate(TEXTS)}},
        "router_retriever": {"embed": Words(), "queries": TEXTS, "quality": torch.eye(3)},
    }


@pytest.mark.parametrize("name", ["arrow", "average", "phatgoose", "glider", "blocks", "retrieval", "router_retriever"])
def test_compose_is_import_then_route(name, folders, tmp_path):
    assert name in posthoc_routers and posthoc_routers.summary(name)
    options = options_of(folders)[name]
    composed = molora.compose(tiny_llama(), folders, router={"name": name, **options})
    routed = route(molora.import_peft(tiny_llama(), folders), name, **options)
    told = {"glider": lambda m: describing(m, ["film", "poem"], Words())}
    told |= dict.fromkeys(("retrieval", "router_retriever"), lambda m: prompted(m, ["law", "film"]))
    found = []
    for model in (composed, routed):
        with told[name](model) if name in told else torch.no_grad():
            found.append(logits(model))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)
    assert composed.peft_config["default"].recipe == routed.peft_config["default"].recipe == f"posthoc/{name}"
    molora.save(composed, tmp_path / "saved")
    loaded = molora.load(tiny_llama(), tmp_path / "saved")
    if "retriev" not in name:  # those stand beside the model, and have files of their own
        with told[name](loaded) if name in told else torch.no_grad():
            torch.testing.assert_close(logits(loaded), found[0], atol=0, rtol=0)


def test_a_live_arrow_mixture_routes_to_an_expert_that_is_added(folders, tmp_path):
    model = molora.compose(tiny_llama(), folders[:2], router="arrow", slots=4)
    live = molora.live(model)
    torch.testing.assert_close(logits(model), logits(arrow(molora.import_peft(tiny_llama(), folders[:2]))))
    live.add("lora2", folders[2])
    torch.testing.assert_close(logits(model), logits(arrow(molora.import_peft(tiny_llama(), folders))))


def test_a_live_mixture_of_gates_lets_a_new_expert_begin_like_another(folders):
    gates = random_gates(folders)
    model = molora.compose(
        tiny_llama(), folders[:2], router={"name": "phatgoose", "gates": [*gates[:2], None, None]}, slots=4
    )
    before = logits(model)
    molora.live(model).add("lora2", folders[2], like="lora1")
    twin = route(molora.import_peft(tiny_llama(), folders), "phatgoose", gates=[*gates[:2], gates[1]])
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model), before, atol=1e-3)


def test_an_expert_that_joins_glider_needs_a_description(folders):
    gates = random_gates(folders)
    options = {"gates": [*gates[:2], None], "descriptions": TEXTS[:2]}
    model = molora.compose(tiny_llama(), folders[:2], router={"name": "glider", **options}, slots=3)
    with describing(model, ["film", "law"], Words()) as cosines:
        assert cosines.tolist() == [[1, 0, 0], [0, 1, 0]]
        before = logits(model)
    molora.live(model).add("lora2", folders[2], like="lora1")
    with pytest.raises(ConfigError, match="expert 'lora2' has no description"), describing(model, ["film"], Words()):
        pass
    route(model, "glider", gates=gates, descriptions=TEXTS)
    with describing(model, ["film", "poem"], Words()):
        assert not torch.allclose(logits(model)[1], before[1], atol=1e-3)


def test_gates_of_an_expert_in_a_mixture_route_that_mixture(folders):
    model = molora.compose(tiny_llama(), folders, router="uniform").eval()
    data = [{**batch(), "labels": batch()["input_ids"]}]
    gates = {name: train_gates(model, name, data, steps=3) for name in ("lora0", "lora2")}
    route(model, "phatgoose", gates=gates)
    with molora.record(model) as log:
        logits(model)
    assert all((routing.gates[..., 1] == 0).all() for routing in log.values())


def test_gates_beside_the_adapters_are_found(folders, tmp_path):
    data = [{**batch(), "labels": batch()["input_ids"]}]
    gates = {folder.name: train_gates(tiny_llama(), folder, data, steps=3) for folder in folders}
    with pytest.raises(ConfigError, match=r"no molora_gates\.safetensors beside 'lora0', 'lora1', 'lora2'"):
        molora.compose(tiny_llama(), folders, router="phatgoose")
    hub = molora.Hub(tmp_path / "hub")
    for folder in folders:
        copy = tmp_path / "with gates" / folder.name
        shutil.copytree(folder, copy)
        save_gates(gates[folder.name], copy)
        hub.add(copy, folder.name)
    given = molora.compose(tiny_llama(), folders, router={"name": "phatgoose", "gates": gates}).eval()
    for router in ("phatgoose", {"name": "phatgoose", "top_k": 2}):
        found = molora.compose(tiny_llama(), [folder.name for folder in folders], router=router, hub=hub, slots=4)
        torch.testing.assert_close(logits(found.eval()), logits(given), atol=1e-6, rtol=1e-6)  # a slot more
    # those that are given win
    other = {name: {path: -vector for path, vector in own.items()} for name, own in gates.items()}
    model = molora.compose(tiny_llama(), list(gates), router={"name": "phatgoose", "gates": other}, hub=hub).eval()
    assert not torch.allclose(logits(model), logits(given), atol=1e-4)


def test_a_second_router_leaves_nothing_of_the_first(folders):
    model = molora.import_peft(tiny_llama(), folders)
    options = options_of(folders)
    for name in ("glider", "blocks", "average", "arrow"):
        route(model, name, **options[name])
    torch.testing.assert_close(logits(model), logits(arrow(molora.import_peft(tiny_llama(), folders), top_k=2)))


def test_every_router_works_on_conv1d_and_in_half_precision(tmp_path):
    from tests.tiny import tiny_gpt2

    folders = library(tmp_path, 2, base=tiny_gpt2, targets=["c_attn", "c_fc"])
    for base, dtype in ((tiny_gpt2, torch.float32), (tiny_gpt2, torch.bfloat16)):
        plain = base().to(dtype)
        inputs = tiny_inputs(plain)
        with torch.no_grad():
            alone = plain(**inputs).logits
            model = route(molora.import_peft(plain, folders), "arrow").eval()
            assert torch.isfinite(model(**inputs).logits).all()
            assert (model(**inputs).logits - alone).abs().max() > 0.01
        data = [{**inputs, "labels": inputs["input_ids"]}]
        route(model, "phatgoose", gates=[train_gates(model, e, data, steps=2) for e in range(2)])
        with torch.no_grad():
            assert model.generate(**inputs, max_new_tokens=3).shape == (2, 10)


def test_an_encoder_decoder_is_routed_and_generates(tmp_path):
    from tests.tiny import tiny_t5

    folders = library(tmp_path, 3, base=tiny_t5, targets=["q", "v", "wo"])  # also those of cross-attention
    model, inputs = molora.import_peft(tiny_t5(), folders).eval(), tiny_inputs(tiny_t5())
    ids = {key: value for key, value in inputs.items() if key != "labels"}
    gates = [train_gates(model, e, [inputs], steps=2) for e in range(3)]
    route(model, "glider", gates=gates, descriptions=TEXTS, gamma=50.0)
    with torch.no_grad(), describing(model, ["film", "poem"], Words()):
        found = model.generate(**ids, max_new_tokens=4, num_beams=2, do_sample=False)
        with molora.record(model) as log:
            model(**inputs)
    assert {routing.gates.argmax(-1)[0].unique().item() for routing in log.values()} == {0}
    assert {routing.gates.argmax(-1)[1].unique().item() for routing in log.values()} == {2}
    for row, text in enumerate(["film", "poem"]):
        with torch.no_grad(), describing(model, [text], Words()):
            alone = {key: value[row : row + 1] for key, value in ids.items()}
            written = model.generate(**alone, max_new_tokens=4, num_beams=2, do_sample=False)[0]
        assert found[row][: len(written)].tolist() == written.tolist()
    route(model, "average", data={e: [inputs] for e in range(3)}, pool="last")
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_wrong_options_are_said(folders):
    model = molora.import_peft(tiny_llama(), folders)
    with pytest.raises(ConfigError, match="did you mean 'arrow'"):
        route(model, "arow")
    with pytest.raises(ConfigError, match="no option 'topk'; did you mean 'top_k'"):
        route(model, "arrow", topk=2)
    with pytest.raises(ConfigError, match=r"needs gates= of the experts"):
        route(model, "phatgoose")
    shared = molora.wrap(tiny_llama(), {"experts": {"num": 2, "rank": 2, "shared": 1}})
    with pytest.raises(ConfigError, match="has shared experts"):
        route(shared, "arrow")
    before = {"experts": {"num": 2, "rank": 4, "form": {"name": "factor", "splits": 2}}}
    for recipe, target, message in (
        (before, "q_proj", "experts of form 'factor' are no LoRAs"),
        ({"experts": {"num": 2, "rank": 2}}, "embed_tokens", "'model.embed_tokens' is no linear layer"),
        ({"experts": {"num": 2, "rank": 2, "form": "block"}}, r".*mlp\..*", "no linear layer with experts of its own"),
    ):
        other = molora.wrap(tiny_llama(), recipe, target_modules=target if "*" in target else [target])
        kept = other.state_dict()
        with pytest.raises(ConfigError, match=message):
            route(other, "arrow")
        assert other.state_dict().keys() == kept.keys()
    with pytest.raises(ConfigError, match="adapter 'other' is unknown"):
        route(model, "arrow", "other")
