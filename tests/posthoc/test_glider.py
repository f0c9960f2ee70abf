"""GLIDER: PHATGOOSE plus a bias per request, in closed form."""

import pytest
import torch

import molora
from molora.control import routed_layers
from molora.errors import ConfigError, RoutingError
from molora.posthoc import phatgoose
from molora.posthoc.glider import Describer, build, describing
from molora.routing.types import Context
from tests.posthoc.library import library
from tests.posthoc.test_phatgoose import random_gates
from tests.posthoc.words import Words
from tests.tiny import tiny_inputs, tiny_llama

TEXTS = ["film film", "law", "poem star", "code"]
phatgoose_build = phatgoose.build if hasattr(phatgoose, "build") else phatgoose


@pytest.fixture
def folders(tmp_path):
    return library(tmp_path, 4)


def mixture(folders, **options):
    options = {"descriptions": TEXTS, **options}
    return build(molora.import_peft(tiny_llama(), folders).eval(), gates=random_gates(folders), **options)


@torch.no_grad()
def run(model, extra=None, **options):
    """(logits, log of the decisions)"""
    given = {} if extra is None else {"router_extra": extra}
    with molora.record(model) as log:
        out = model(**tiny_inputs(tiny_llama(), **options), **given)
    return out.logits, log


def test_gamma_zero_is_phatgoose_bit_for_bit(folders):
    plain = phatgoose_build(molora.import_peft(tiny_llama(), folders).eval(), gates=random_gates(folders))
    model = mixture(folders, gamma=0.0)
    assert torch.equal(run(model)[0], run(plain)[0])
    assert torch.equal(run(model, torch.randn(2, 4))[0], run(plain)[0])


def test_the_score_is_phatgoose_s_plus_gamma_times_the_cosine(folders):
    plain = phatgoose_build(molora.import_peft(tiny_llama(), folders).eval(), gates=random_gates(folders))
    model, cosines = mixture(folders, gamma=2.5), torch.randn(2, 4).tanh()
    for path, layer in routed_layers(model).items():
        x = torch.randn(2, 5, layer.d_in)
        local = routed_layers(plain)[path].molora_router["default"](x, Context()).scores
        found = layer.molora_router["default"](x, Context(extra=cosines[:, None])).scores
        torch.testing.assert_close(found, local + 2.5 * cosines[:, None], atol=1e-6, rtol=1e-6)


def test_a_huge_gamma_gives_the_same_experts_everywhere(folders):
    cosines = torch.tensor([[0.9, 0.1, 0.8, -0.5], [0.2, 0.7, -0.1, 0.3]])
    _, log = run(mixture(folders, gamma=1e4), cosines)
    chosen = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    for routing in log.values():  # the second best weighs exp(-1000) = 0 at this gamma, so what counts is the choice
        best = routing.probs.argmax(-1)
        assert (best == torch.tensor([[0], [1]])).all()
        ranked = routing.scores.topk(2, -1).indices
        assert torch.zeros_like(routing.scores, dtype=torch.bool).scatter(-1, ranked, True).eq(chosen[:, None]).all()


def test_a_constant_added_to_all_cosines_changes_nothing(folders):
    model, cosines = mixture(folders), torch.randn(2, 4).tanh()
    torch.testing.assert_close(run(model, cosines + 0.25)[0], run(model, cosines)[0], atol=1e-5, rtol=1e-5)


def test_two_requests_in_one_batch_route_as_if_alone(folders):
    model, cosines, inputs = mixture(folders), torch.randn(2, 4).tanh(), tiny_inputs(tiny_llama())
    with torch.no_grad():
        together = model(**inputs, router_extra=cosines).logits
        apart = [
            model(**{key: v[i : i + 1] for key, v in inputs.items()}, router_extra=cosines[i : i + 1]).logits
            for i in range(2)
        ]
        swapped = model(**inputs, router_extra=cosines.flip(0)).logits
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together, swapped, atol=1e-3)


def test_the_rule_is_sure_only_where_an_expert_is_clearly_meant(folders):
    model = mixture(folders, gamma=2.0, sure=100.0, threshold=0.8)
    cosines = torch.tensor([[0.9, 0.1, 0.2, 0.0], [0.7, 0.1, 0.2, 0.0]])
    x = torch.randn(2, 5, 32)
    router = routed_layers(model)["model.layers.0.self_attn.q_proj"].molora_router["default"]
    local = router(x, Context(extra=torch.zeros(2, 1, 4))).scores
    found = router(x, Context(extra=cosines[:, None])).scores
    torch.testing.assert_close(
        found - local, torch.stack([100 * cosines[0], 2 * cosines[1]])[:, None].expand(-1, 5, -1)
    )


def test_an_expert_that_cannot_act_does_not_make_it_sure(folders):
    gates = [*random_gates(folders)[:3], None]
    model = molora.import_peft(tiny_llama(), folders).eval()
    build(model, gates=gates, descriptions=TEXTS, gamma=1.0, sure=50.0, threshold=0.8)
    router = routed_layers(model)["model.layers.0.self_attn.q_proj"].molora_router["default"]
    x, cosines = torch.randn(1, 5, 32), torch.tensor([[[0.1, 0.2, 0.3, 1.0]]])
    difference = router(x, Context(extra=cosines)).scores - router(x, Context(extra=0 * cosines)).scores
    torch.testing.assert_close(difference[..., :3], cosines[..., :3].expand(-1, 5, -1))


def test_top_p_keeps_the_mass(folders):
    cosines = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    _, log = run(mixture(folders, gamma=20.0, top_p=0.9), cosines)
    for routing in log.values():
        assert (routing.selected[0].sum(-1) == 1).all() and (routing.selected[1].sum(-1) > 1).any()
        torch.testing.assert_close(routing.gates.sum(-1), torch.ones(2, 7))


def test_requests_are_described_by_the_writer_and_compared_with_the_experts(folders):
    model, embed = mixture(folders, embedder="words"), Words()
    asked = []

    def write(request):
        asked.append(request)
        return {"Rate it!": "film star", "Sue him!": "law"}[request]

    with describing(model, ["Rate it!", "Sue him!"], embed, write) as cosines:
        expected = torch.tensor([[0.5**0.5, 0, 0.5, 0], [0, 1, 0, 0]])
        torch.testing.assert_close(cosines, expected)
        inside = run(model)[0]
    assert asked == ["Rate it!", "Sue him!"]
    torch.testing.assert_close(inside, run(model, cosines)[0], atol=0, rtol=0)
    describer, calls = Describer(model, embed, write), embed.calls
    for _ in range(2):
        with describing(model, ["Sue him!"], describer):
            pass
    assert embed.calls == calls + 2  # the experts' descriptions were embedded once


def test_it_generates_with_beams_and_a_cache_and_after_loading(folders, tmp_path):
    model, inputs = mixture(folders), tiny_inputs(tiny_llama())
    molora.save(model, tmp_path / "saved")
    loaded = molora.load(tiny_llama(), tmp_path / "saved")
    written = []
    for one, options in ((model, {}), (loaded, {}), (model, {"use_cache": False})):
        with torch.no_grad(), describing(one, ["film", "code"], Words()):
            written.append(one.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False, **options))
    assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])


def test_what_is_missing_is_said(folders):
    model = mixture(folders, embedder="words")
    with pytest.raises(RoutingError, match="needs 4 cosines per row, one per expert, but none"):
        run(model)
    with pytest.raises(RoutingError, match="but 3 per row"):
        run(model, torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="belong to embedder 'words', but this one is called None"):
        Describer(model, lambda texts: torch.ones(len(texts), 2))
    with pytest.raises(ConfigError, match="expert 'lora3' has no description"):
        mixture(folders, descriptions=TEXTS[:3])
    with pytest.raises(ConfigError, match="no expert 4 for 'more'"):
        mixture(folders, descriptions=[*TEXTS, "more"])
    with pytest.raises(ConfigError, match="both sure and threshold"):
        mixture(folders, sure=9.0)
    with pytest.raises(ConfigError, match="not routed by glider"):
        Describer(molora.import_peft(tiny_llama(), folders), Words())
