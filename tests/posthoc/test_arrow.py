"""Arrow: prototypes against torch's full SVD, routing against PEFT's Arrow where its power iteration is exact."""

import pytest
import torch
from peft import ArrowConfig, PeftModel, create_arrow_model

import molora
from molora.control import routed_layers
from molora.errors import ConfigError
from molora.posthoc.arrow import build, direction, refresh
from molora.routing.types import Context
from tests.posthoc.library import TARGETS, library, make_lora
from tests.tiny import tiny_inputs, tiny_llama


def mixture(folders, **options):
    model = molora.import_peft(tiny_llama(), folders).eval()
    return build(model, **options)


@torch.no_grad()
def logits(model, **options):
    return model(**tiny_inputs(tiny_llama(), **options)).logits


def top_vector(delta):
    """The right singular vector of a full matrix, in float64."""
    return torch.linalg.svd(delta.double()).Vh[0].float()


def factors(rank, values, d_in=64, d_out=40):
    """A and B whose product has these singular values, with the ranks mixed."""
    U = torch.linalg.qr(torch.randn(d_out, rank, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d_in, rank, dtype=torch.float64)).Q
    mixing = torch.randn(rank, rank, dtype=torch.float64)
    B = (U * torch.tensor(values, dtype=torch.float64)) @ mixing
    return torch.linalg.solve(mixing, V.T), B, V[:, 0].float()


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("gap", [0.5, 0.95, 0.9999])
def test_the_prototype_is_the_top_singular_vector_also_of_near_equal_values(rank, gap):
    A, B, first = factors(rank, [gap**i for i in range(rank)])
    v = direction(A, B)
    assert abs(float(v @ first)) > 1 - 1e-6 and abs(float(v.norm()) - 1) < 1e-6
    assert abs(float(v @ top_vector(B @ A))) > 1 - 1e-6


def test_fifteen_power_iterations_are_not_enough_where_ours_is_exact():
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    A, B, first = factors(8, [0.97**i for i in range(8)])
    config = ArrowConfig(rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = ["a"], []
    theirs = ArrowLoraLinearLayer(64, config).top_right_singular_vec_from_BA(A, B)
    assert abs(float(theirs @ first)) < 0.99 < 1 - 1e-6 < abs(float(direction(A, B) @ first))


def test_the_prototype_does_not_depend_on_how_an_update_is_written():
    A, B, _ = factors(4, [1.0, 0.9, 0.5, 0.1])
    v, G = direction(A, B), torch.randn(4, 4, dtype=torch.float64) + 3 * torch.eye(4)
    torch.testing.assert_close(direction(G @ A, B @ torch.linalg.inv(G)), v, atol=1e-6, rtol=0)
    for scale in (7.0, -0.01):
        torch.testing.assert_close(direction(A, scale * B), v, atol=1e-6, rtol=0)
    wide = torch.cat([A, A]), torch.cat([B, B], 1)  # a rank above that of the update
    torch.testing.assert_close(direction(*wide), v, atol=1e-6, rtol=0)
    assert direction(A, torch.zeros_like(B)) is None


def test_the_sign_of_a_prototype_does_not_matter(tmp_path):
    model = mixture(library(tmp_path), top_k=2)
    before = logits(model)
    for layer in routed_layers(model).values():
        layer.molora_router["default"].scorer.weight.data[1].neg_()
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)


def test_one_expert_is_plain_lora(tmp_path):
    folders = library(tmp_path, 1)
    plain = PeftModel.from_pretrained(tiny_llama(), folders[0]).eval()
    torch.testing.assert_close(logits(mixture(folders)), logits(plain), atol=1e-6, rtol=1e-6)


def test_a_token_along_an_expert_s_direction_goes_to_it(tmp_path):
    directions = torch.linalg.qr(torch.randn(32, 3)).Q.T

    def rank_one(number):
        def change(path, A, B):
            A.copy_(directions[number : number + 1])

        return change

    folders = [make_lora(tmp_path / str(e), e, rank=1, targets=["q_proj"], change=rank_one(e)) for e in range(3)]
    model = mixture(folders, top_k=1)
    for layer in routed_layers(model).values():
        gates = layer.molora_router["default"](directions[None] * 5, Context()).gates
        torch.testing.assert_close(gates[0], torch.eye(3))


def test_softmax_of_the_top_scores_is_softmax_then_top_k_then_renormalised(tmp_path):
    model = mixture(library(tmp_path, 4), top_k=2, temperature=0.7)
    router = routed_layers(model)["model.layers.0.self_attn.q_proj"].molora_router["default"]
    x = torch.randn(2, 5, 32)
    logits = (x @ router.scorer.weight.t()).abs() / 0.7
    best = logits.topk(2, -1)
    expected = torch.zeros_like(logits).scatter(-1, best.indices, torch.softmax(best.values, -1))
    torch.testing.assert_close(router(x, Context()).gates, expected, atol=2e-7, rtol=0)


def arrow_of_peft(folders, general=(), **options):
    config = ArrowConfig(use_gks=bool(general), rng_seed=0, **options)
    return create_arrow_model(
        tiny_llama(), [str(f) for f in folders], config, general_adapter_paths=[str(f) for f in general] or None
    ).eval()


@pytest.mark.parametrize(("top_k", "temperature"), [(3, 1.0), (2, 0.3), (1, 5.0)])
def test_it_is_peft_s_arrow_where_that_is_exact(tmp_path, top_k, temperature):
    folders = library(tmp_path, 4, rank=1)  # one power iteration finds the vector of a rank-1 update
    theirs = arrow_of_peft(folders, top_k=top_k, router_temperature=temperature)
    ours = mixture(folders, top_k=top_k, temperature=temperature)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(ours), logits(tiny_llama()), atol=1e-2)


def test_general_knowledge_subtracted_by_factors_is_peft_s(tmp_path):
    tasks, general = library(tmp_path / "t", 3, rank=1), library(tmp_path / "g", 2, rank=1, first=50)
    theirs = arrow_of_peft(tasks, general, top_k=2)
    model = molora.import_peft(tiny_llama(), [*tasks, *general], names=["a", "b", "c", "g0", "g1"]).eval()
    build(model, top_k=2, general=["g0", 4], subtract="factors")
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    with molora.record(model) as log:
        logits(model)
    assert all((routing.gates[..., 3:] == 0).all() for routing in log.values())


def test_general_knowledge_subtracted_in_delta_space_is_exact(tmp_path):
    folders = library(tmp_path, 4)
    model = mixture(folders, top_k=2, general=[1, 3])
    layers = routed_layers(model)
    assert len(layers) == 2 * len(TARGETS)
    x = torch.randn(2, 5, 48)
    for layer in layers.values():
        bank, router = layer.molora_bank["default"], layer.molora_router["default"]
        deltas = [bank.delta_weight(torch.eye(4)[e]).detach() for e in range(4)]
        mean = (deltas[1] + deltas[3]) / 2
        purified = {0: deltas[0] - mean, 2: deltas[2] - mean}
        for expert, delta in purified.items():
            assert abs(float(router.scorer.weight[expert] @ top_vector(delta))) > 1 - 1e-5
        h = x[..., : layer.d_in]
        scores = torch.stack([(h @ top_vector(delta)).abs() for delta in purified.values()], -1)
        weights = torch.softmax(scores, -1)
        expected = sum(weights[..., i, None] * (h @ d.T) for i, d in enumerate(purified.values()))
        gates = router(h, Context()).gates
        torch.testing.assert_close(gates.sum(-1), torch.zeros(2, 5), atol=1e-6, rtol=0)
        torch.testing.assert_close(bank(h, gates), expected, atol=1e-4, rtol=1e-4)


def test_layers_that_read_one_input_can_share_a_decision(tmp_path):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = mixture(library(tmp_path, targets=targets), share="group", top_k=1)
    layers = {path.rpartition(".")[2]: layer for path, layer in routed_layers(model).items() if ".0." in path}
    leaders = [leaf for leaf, layer in layers.items() if "default" in layer.molora_router]
    assert len(leaders) == 2 and "o_proj" in leaders
    leader = next(leaf for leaf in leaders if leaf != "o_proj")
    for expert in range(3):
        gates = torch.eye(3)[expert]
        deltas = [layers[leaf].molora_bank["default"].delta_weight(gates) for leaf in targets[:3]]
        v = layers[leader].molora_router["default"].scorer.weight[expert]
        assert abs(float(v @ top_vector(torch.cat(deltas).detach()))) > 1 - 1e-6


def test_an_expert_is_not_chosen_in_layers_that_it_does_not_touch(tmp_path):
    folders = [
        make_lora(tmp_path / "a", 1, rank=2, targets=["q_proj", "up_proj"]),
        make_lora(tmp_path / "b", 2, rank=6, alpha=3, targets=["q_proj"]),
    ]
    model = mixture(folders)
    with molora.record(model) as log:
        logits(model)
    for path, routing in log.items():
        assert (routing.gates[..., 1] == 0).all() == path.endswith("up_proj")
        torch.testing.assert_close(routing.gates.sum(-1), torch.ones(2, 7))


def test_it_is_saved_loaded_and_generates(tmp_path):
    model = mixture(library(tmp_path), top_k=2, temperature=0.5)
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    molora.save(model, tmp_path / "saved")
    loaded = molora.load(tiny_llama(), tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)
    inputs = tiny_inputs(tiny_llama())
    with torch.no_grad():
        written = [m.generate(**inputs, max_new_tokens=5, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*written)
    assert loaded.peft_config["default"].experts["names"] == ["lora0", "lora1", "lora2"]


def test_a_new_expert_in_a_slot_gets_its_own_prototype(tmp_path):
    folders = library(tmp_path, 3)
    model, other = mixture(folders[:2]), mixture([folders[0], folders[2]])
    source = routed_layers(other)
    pairs = {path: layer.molora_bank["default"].pair(1) for path, layer in source.items()}
    molora.write_expert(model, 1, pairs, scale=next(iter(source.values())).molora_bank["default"].scaling)
    assert not torch.allclose(logits(model), logits(other), atol=1e-4)
    before = [layer.molora_router["default"].scorer.weight[0].clone() for layer in routed_layers(model).values()]
    refresh(model, slot=1)
    torch.testing.assert_close(logits(model), logits(other), atol=1e-6, rtol=1e-6)
    after = [layer.molora_router["default"].scorer.weight[0] for layer in routed_layers(model).values()]
    assert all(map(torch.equal, before, after))
    refresh(model)
    torch.testing.assert_close(logits(model), logits(other), atol=1e-6, rtol=1e-6)


def test_a_new_general_expert_changes_all_prototypes(tmp_path):
    folders = library(tmp_path, 4)
    model, other = mixture(folders[:3], general=[2]), mixture([*folders[:2], folders[3]], general=[2])
    source = routed_layers(other)
    pairs = {path: layer.molora_bank["default"].pair(2) for path, layer in source.items()}
    molora.write_expert(model, 2, pairs, scale=next(iter(source.values())).molora_bank["default"].scaling)
    refresh(model, slot=2)
    torch.testing.assert_close(logits(model), logits(other), atol=1e-6, rtol=1e-6)


def test_what_cannot_be_is_said(tmp_path):
    model = molora.import_peft(tiny_llama(), [*library(tmp_path, 2), make_lora(tmp_path / "wide", 1, rank=6)])
    with pytest.raises(ConfigError, match="expert 'lora9' is unknown; did you mean"):
        build(model, general=["lora9"])
    with pytest.raises(ConfigError, match="an expert that is not general"):
        build(model, general=[0, 1, 2])
    with pytest.raises(ConfigError, match=r"ranks \[4, 6\].*\n.*"):
        build(model, general=[0], subtract="factors")
    with pytest.raises(ConfigError, match="known: delta, factors"):
        build(model, subtract="product")
    with pytest.raises(ConfigError, match="temperature must be positive"):
        build(model, temperature=0.0)
    with pytest.raises(ConfigError, match="not routed by Arrow"):
        refresh(model)
    assert model.peft_config["default"].scorer == {"name": "linear", "init": 0.0}  # nothing was changed
