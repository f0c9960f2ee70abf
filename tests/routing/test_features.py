"""Parts that make what routers read: their errors, and what they do where nothing is there to be read."""

import pytest
import torch

import molora
from molora.errors import ConfigError, RoutingError
from molora.routing.features import Place, features
from molora.routing.mixing import attention_key
from molora.routing.multitask import TaskMask
from molora.routing.pools import pools
from molora.routing.router import Router
from molora.routing.types import Context, Memory
from tests.tiny import tiny_inputs, tiny_llama, tiny_mamba


def test_features_follow_one_another():
    router = Router(6, 4, feature=[{"name": "concat", "size": 2}, {"name": "gru", "size": 3}, "similarity"])
    assert [feature.dim for feature in router.feature] == [8, 3, 3] and router.scorer.weight.shape == (4, 3)
    assert router(torch.randn(2, 5, 6), Context(extra=torch.randn(2, 1, 2))).gates.shape == (2, 5, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "concat", "size": 0}, "feature 'concat' needs size >= 1, got 0"),
        ({"name": "similarity", "measure": "l1"}, "similarity measure 'l1' is unknown; known: cosine, dot"),
        ({"name": "similarity", "temperature": 0}, "similarity needs a positive temperature, got 0"),
    ],
)
def test_wrong_options_of_features_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        Router(6, 4, feature=spec)


def test_similarity_gives_padding_no_weight_and_rows_sum_to_one():
    feature = features.build("similarity", 6, place=Place())
    x, valid = torch.randn(2, 5, 6), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1]]).bool()
    for causal in (True, False):
        a = feature.weights(x, x, valid, causal)
        torch.testing.assert_close(a.sum(-1), torch.ones(2, 5))
        off = a.masked_fill(torch.eye(5).bool(), 0)
        assert off.masked_select(~valid[:, None].expand(2, 5, 5)).eq(0).all()
        assert a.triu(1).eq(0).all() == causal


def test_attention_fits_caches_of_fixed_length_and_of_a_window():
    feature = features.build("attention", 6, place=Place("here", None, block="b"))
    past, x = torch.randn(1, 3, 6), torch.randn(1, 1, 6)
    whole = torch.softmax(torch.randn(1, 1, 4), -1)

    def mixed(attention):
        memory = Memory()
        memory.past["here:states"] = {"states": past, "valid": torch.ones(1, 3).bool()}
        memory.now[attention_key("b")] = attention
        return feature(x, Context(memory=memory))

    expected = whole @ torch.cat([past, x], 1)
    torch.testing.assert_close(mixed(whole), expected)
    torch.testing.assert_close(mixed(torch.cat([whole, torch.zeros(1, 1, 9)], -1)), expected)  # a static cache
    window = torch.softmax(torch.randn(1, 1, 2), -1)
    torch.testing.assert_close(mixed(window), window @ torch.cat([past[:, -1:], x], 1))


def test_a_router_that_runs_twice_per_forward_cannot_follow_a_cache():
    router = Router(6, 4, feature="similarity", place=Place("tied")).eval()
    memory = Memory()
    first = router(torch.randn(2, 5, 6), Context(memory=memory))
    again = router(torch.randn(2, 5, 6), Context(memory=memory))  # an encoder with tied layers: nothing is remembered
    assert first.gates.shape == again.gates.shape and memory.past["tied:states"]["states"].shape[1] == 5
    later = Memory()
    later.past = dict(memory.past)
    router(torch.randn(2, 1, 6), Context(memory=later))
    with pytest.raises(RoutingError, match=r"'tied' runs more than once per forward.*use_cache=False"):
        router(torch.randn(2, 1, 6), Context(memory=later))


def test_attention_needs_a_model_that_attends():
    with pytest.raises(ConfigError, match=r"MambaForCausalLM has no self-attention.*use feature: similarity"):
        molora.wrap(tiny_mamba(), {}, feature="attention", experts={"num": 3, "rank": 2})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "cross_attention", "features": 0}, "needs features, width >= 1"),
        ({"name": "transformer", "width": 6, "heads": 4}, "needs heads that divide width"),
    ],
)
def test_wrong_options_of_pools_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        pools.build(spec, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allowed": [[0], [4]]}, "task_mask.allowed names expert 4, but there are 4, from 0"),
        ({"allowed": [[0], []]}, "leaves task 1 without any expert"),
        ({"allowed": [[0]], "own": [[1], [2]]}, "one list per task, got 1 in allowed, 2 in own"),
    ],
)
def test_wrong_task_masks_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TaskMask(6, 4, **options)


def test_tasks_are_asked_for_and_checked():
    router = Router(6, 4, scorer={"name": "multi_gate", "num_tasks": 2}).eval()
    x = torch.randn(2, 3, 6)
    with pytest.raises(RoutingError, match="no task_ids reached the forward"):
        router(x, Context())
    with pytest.raises(RoutingError, match="task_ids holds 3 ids for a batch of 2"):
        router(x, Context(task_ids=torch.tensor([0, 1, 0])))
    with pytest.raises(RoutingError, match="task id 2 is out of range; this adapter knows 2"):
        router(x, Context(task_ids=torch.tensor([0, 2])))
    mean = router.scorer.weight.mean(0)
    torch.testing.assert_close(router(x, Context(task_ids=torch.tensor([-1, 1]))).scores[0], x[0] @ mean.t())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_site": True}, "per_site gives the layers of a shared decision their own gates"),
        ({"per_site": True, "share": "block", "experts": {"num": 4, "shared": 1}}, "does not go with null or shared"),
        ({"per_site": 1, "share": "block"}, "per_site must be true or false, got 1"),
    ],
)
def test_per_site_says_what_it_needs(changes, message):
    with pytest.raises(ConfigError, match=message):
        molora.wrap(tiny_llama(), {}, **changes)


@torch.no_grad()
def test_per_site_decides_per_token_too_where_layers_share_a_block():
    model = molora.wrap(tiny_llama(), {}, share="block", per_site=True, experts={"num": 3, "rank": 2}).eval()
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    layers = [
        layer for layer in molora.control.routed_layers(model).values() if "layers.0." in layer.sites["default"].name
    ]
    router = layers[0].molora_router["default"]
    assert len(layers) == 7 and router.scorer.weight.shape == (21, 32)
    seen = {}
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, args, out, number=number: seen.update({number: (args[0], out)}))
    model(**tiny_inputs(model))
    probs = torch.softmax((seen[0][0] @ router.scorer.weight.t()).unflatten(-1, (7, 3)), -1)
    for number, layer in enumerate(layers):
        x, y = seen[number]
        expected = layer.base_layer(x) + layer.molora_bank["default"](x, probs[..., number, :])
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
