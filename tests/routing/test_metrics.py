"""Routing statistics against counts by hand, closed forms and scipy."""

import json
import math

import pytest
import torch
from scipy.stats import entropy as scipy_entropy

import molora
from molora.control import routed_layers, trace_of
from molora.errors import ConfigError, LoadError
from molora.routing.diagnostics import change_rate
from molora.routing.metrics import Usage
from molora.routing.trace import Site
from molora.routing.types import Context, Routing
from tests.tiny import tiny_bert_classifier, tiny_inputs, tiny_llama

SITE = Site("layer.0", "default", "site:layer.0:main")


def routing(gates, probs=None):
    gates = torch.as_tensor(gates, dtype=torch.float32)
    probs = gates if probs is None else torch.as_tensor(probs, dtype=torch.float32)
    return Routing(probs.log(), probs, gates)


def one_hot(choices, experts):
    return torch.nn.functional.one_hot(torch.tensor(choices), experts).float()


def test_even_top_1_is_perfect_balance():
    usage = Usage()
    usage(SITE, routing(one_hot([[0, 1, 2, 3]], 4), torch.full((1, 4, 4), 0.25)), Context())
    figures = usage.figures("layer.0")
    assert figures.tokens == 4
    assert figures.load == [0.25] * 4
    assert figures.gate_mass == [0.25] * 4
    assert figures.token_entropy == pytest.approx(1)
    assert figures.mean_entropy == pytest.approx(1)
    assert figures.effective_experts == pytest.approx(4)
    assert figures.experts_per_token == 1
    assert figures.dead == []


def test_sure_tokens_that_spread_and_sure_tokens_that_collapse():
    spread, collapsed = Usage(), Usage()
    spread(SITE, routing(one_hot([[0, 1], [2, 3]], 4)), Context())
    collapsed(SITE, routing(one_hot([[2, 2], [2, 2]], 4)), Context())
    a, b = spread.figures("layer.0"), collapsed.figures("layer.0")
    assert (a.token_entropy, a.mean_entropy, a.effective_experts) == pytest.approx((0, 1, 4), abs=1e-6)
    assert (b.token_entropy, b.mean_entropy, b.effective_experts) == pytest.approx((0, 0, 1), abs=1e-6)
    assert b.load == [0, 0, 1, 0]
    assert b.dead == [0, 1, 3]


def test_soft_gates_against_scipy():
    probs = torch.rand(3, 5, 6).softmax(-1)
    gates = probs * (probs > 0.15)
    usage = Usage()
    usage(SITE, routing(gates, probs), Context())
    figures = usage.figures("layer.0")
    flat, flat_gates = probs.reshape(-1, 6).double().numpy(), gates.reshape(-1, 6).double().numpy()
    assert figures.tokens == 15
    assert figures.token_entropy == pytest.approx(scipy_entropy(flat, axis=1).mean() / math.log(6), rel=1e-5)
    assert figures.mean_entropy == pytest.approx(scipy_entropy(flat.mean(0)) / math.log(6), rel=1e-5)
    assert figures.effective_experts == pytest.approx(math.exp(scipy_entropy(flat.mean(0))), rel=1e-5)
    assert figures.gate_mass == pytest.approx(flat_gates.mean(0))
    assert figures.gate_share == pytest.approx(flat_gates.sum(0) / flat_gates.sum())
    assert figures.load == pytest.approx((flat_gates > 0).sum(0) / (flat_gates > 0).sum())
    assert figures.experts_per_token == pytest.approx((flat_gates > 0).sum(1).mean())


def test_probs_that_do_not_sum_to_one_are_divided_by_their_sum():
    usage = Usage()
    usage(SITE, routing([[[1.0, 1.0]]], [[[0.2, 0.6]]]), Context())
    expected = scipy_entropy([0.25, 0.75])
    assert usage.figures("layer.0").token_entropy == pytest.approx(expected / math.log(2), rel=1e-6)
    assert usage.figures("layer.0").effective_experts == pytest.approx(math.exp(expected), rel=1e-6)


def test_dead_by_choices_and_by_gate_mass():
    # 40 tokens over 4 experts: even share 0.25, threshold 0.1 * 0.25 = 0.025 of the choices, that is 1 of 40
    choices = [0] * 20 + [1] * 18 + [2] * 2
    usage = Usage()
    usage(SITE, routing(one_hot([choices], 4)), Context())
    assert usage.figures("layer.0").dead == [3]
    assert 2 in _with(Usage(dead_below=0.3), one_hot([choices], 4)).dead  # 0.05 < 0.3 * 0.25
    # a soft mixture chooses everybody, but expert 1 weighs nearly nothing
    soft = torch.tensor([0.99, 0.01]).expand(1, 10, 2)
    assert _with(Usage(), soft).load == [0.5, 0.5]
    assert _with(Usage(), soft).dead == [1]
    # negative gates are used gates
    assert _with(Usage(), torch.tensor([1.0, -1.0]).expand(1, 10, 2), torch.full((1, 10, 2), 0.5)).dead == []
    with pytest.raises(ConfigError, match="dead_below"):
        Usage(dead_below=0)


def _with(usage, gates, probs=None):
    usage(SITE, routing(gates, probs), Context())
    return usage.figures("layer.0")


def test_nothing_selected_is_not_a_division_by_zero():
    usage = Usage()
    usage(SITE, routing(torch.zeros(1, 2, 3), torch.full((1, 2, 3), 1 / 3)), Context())
    figures = usage.figures("layer.0")
    assert figures.load == figures.gate_share == [0, 0, 0]
    assert figures.experts_per_token == 0
    assert figures.dead == [0, 1, 2]
    assert Usage().sites == []


def test_one_expert():
    figures = _with(Usage(), torch.ones(2, 3, 1))
    assert (figures.effective_experts, figures.load, figures.dead) == (1, [1], [])


def test_padding_does_not_count():
    gates, garbage = torch.rand(2, 3, 4).softmax(-1), torch.rand(2, 2, 4).softmax(-1)
    plain, padded = Usage(), Usage()
    plain(SITE, routing(gates), Context())
    valid = torch.tensor([[0, 0, 1, 1, 1]] * 2).bool()
    padded(SITE, routing(torch.cat([garbage, gates], 1)), Context(valid=valid))
    assert padded.figures("layer.0") == plain.figures("layer.0")


def test_tasks_are_counted_apart_and_add_up():
    gates = torch.rand(4, 3, 5).softmax(-1)
    valid = torch.ones(4, 3).bool()
    valid[2, 1:] = False
    usage = Usage(["a", "b", "c"])
    usage(SITE, routing(gates), Context(valid=valid, task_ids=torch.tensor([1, 0, 1, -1])))
    assert usage.counted_tasks == ["a", "b"]
    assert usage.figures("layer.0", "c") is None
    assert [usage.figures("layer.0", t).tokens for t in ("a", "b", None)] == [3, 4, 10]
    only_b = torch.cat([gates[0], gates[2, :1]])
    assert usage.figures("layer.0", "b").gate_mass == pytest.approx(only_b.double().mean(0).tolist())
    assert usage.figures("layer.0", "b") == _with_ids(gates[[0, 2]], valid[[0, 2]])
    with pytest.raises(KeyError):
        usage.figures("layer.0", "d")


def _with_ids(gates, valid):
    usage = Usage()
    usage(SITE, routing(gates), Context(valid=valid))
    return usage.figures("layer.0")


def test_batches_add_up_and_files_are_exact():
    whole, parts, other = Usage(["a"]), Usage(["a"]), Usage(["a"])
    gates = torch.rand(6, 3, 5).softmax(-1)
    whole(SITE, routing(gates), Context(task_ids=torch.zeros(6)))
    for i, usage in ((0, parts), (2, parts), (4, other)):
        usage(SITE, routing(gates[i : i + 2]), Context(task_ids=torch.zeros(2)))
    parts.add(other)
    for name, value in vars(whole.figures("layer.0")).items():
        assert getattr(parts.figures("layer.0"), name) == pytest.approx(value)
    again = Usage.from_dict(json.loads(json.dumps(parts.to_dict())))
    assert again.to_dict() == parts.to_dict()
    assert again.figures("layer.0", "a") == parts.figures("layer.0", "a")
    with pytest.raises(ConfigError, match="cannot be added"):
        whole.add(Usage(["b"]))


@pytest.mark.parametrize("spoil", ["format", "missing", "short", "type"])
def test_damaged_files_are_refused(spoil):
    usage = Usage(["a"])
    usage(SITE, routing(torch.rand(1, 2, 3).softmax(-1)), Context())
    data = usage.to_dict()
    if spoil == "format":
        data["format"] = 99
    elif spoil == "missing":
        del data["sites"]["layer.0"]["sums"]["-1"]["probs"]
    elif spoil == "short":
        data["sites"]["layer.0"]["sums"]["-1"]["probs"].pop()
    else:
        data["sites"] = 5
    with pytest.raises(LoadError, match="routing statistics"):
        Usage.from_dict(data)


def test_decisions_per_row_and_one_id_for_a_batch():
    usage = Usage(["a", "b"])
    valid = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    per_prompt = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    usage(SITE, routing(per_prompt), Context(valid=valid, task_ids=torch.tensor([0, 1])))
    assert usage.figures("layer.0").tokens == 2  # rows, not tokens
    assert usage.figures("layer.0", "a").load == [1, 0]
    usage(SITE, routing(per_prompt), Context(task_ids=torch.tensor([1])))
    assert usage.figures("layer.0", "b").tokens == 3


def test_other_adapters_are_left_out():
    usage = Usage(adapter="mine")
    usage(SITE, routing(torch.ones(1, 1, 2)), Context())
    assert usage.sites == []


def test_on_a_model_with_padding_and_shared_decisions():
    model = molora.wrap(tiny_llama(), {"experts": {"num": 4}, "selector": {"name": "top_k", "k": 2}})
    inputs = tiny_inputs(model.get_base_model(), batch=3, length=6)
    inputs["attention_mask"][0, :2] = 0
    usage = Usage(["a", "b"])
    model.eval()
    with usage.reading(trace_of(model)), molora.record(model) as log, torch.no_grad():
        model(**inputs, task_ids=torch.tensor([0, 1, 1]))
    model(**inputs)  # nobody reads
    assert usage.sites == list(log) == list(routed_layers(model))
    for site, one in log.items():
        kept = one.gates[inputs["attention_mask"].bool()]
        figures = usage.figures(site)
        assert figures.tokens == 16
        assert figures.experts_per_token == 2
        assert figures.load == pytest.approx(((kept != 0).double().mean(0) / 2).tolist())
        assert usage.figures(site, "b").gate_mass == pytest.approx(
            one.gates[1:].reshape(-1, 4).double().mean(0).tolist()
        )


def test_a_shared_decision_counts_once():
    model = molora.wrap(tiny_bert_classifier(), {"share": "block", "experts": {"num": 3}})
    usage = Usage()
    with usage.reading(trace_of(model)), torch.no_grad():
        model(**tiny_inputs(model.get_base_model(), batch=2, length=5))
    assert len(usage.sites) == 3  # two blocks, and the pooler
    assert [bool(usage.group(site)) for site in usage.sites] == [True, True, False]
    assert [usage.figures(site).tokens for site in usage.sites] == [10, 10, 2]


def test_change_rate():
    before = {"s": routing(one_hot([[0, 1, 2, 3]], 4))}
    moved = {"s": routing(one_hot([[0, 1, 3, 3]], 4))}
    assert change_rate(before, before) == {"s": 0}
    assert change_rate(before, moved) == {"s": 0.25}
    assert change_rate(before, moved, torch.tensor([[1, 1, 0, 1]]).bool()) == {"s": 0}
    two = {"s": routing([[[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]]])}
    half = {"s": routing([[[0.5, 0, 0.5, 0], [0.5, 0.5, 0, 0]]])}
    assert change_rate(two, half) == {"s": 0.25}  # one of two choices changed, for one of two tokens
    none = {"s": routing(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 0.25))}
    assert change_rate(none, none) == {"s": 0}
    assert change_rate(none, two) == {"s": 1}
    soft, other = {"s": routing([[[0.6, 0.4]]])}, {"s": routing([[[0.4, 0.6]]])}
    assert change_rate(soft, other) == {"s": 0}
    assert change_rate(soft, other, by="top") == {"s": 1}


def test_change_rate_refuses_strangers():
    a = {"s": routing(torch.ones(1, 2, 2))}
    with pytest.raises(ConfigError, match="same batch"):
        change_rate(a, {"s": routing(torch.ones(1, 3, 2))})
    with pytest.raises(ConfigError, match="only one of the two"):
        change_rate(a, {})
    with pytest.raises(ConfigError, match="known: selected, top"):
        change_rate(a, a, by="both")
