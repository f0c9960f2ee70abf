"""Where layers stand, how many experts they get, of which rank and scale; and what a config says about itself."""

import pytest
import torch

import molora
from molora.config import MoloraConfig, build_config
from molora.config_checks import EXPERTS
from molora.control import routed_layers
from molora.errors import ConfigError
from molora.plan import depth_of, experts_at, place_of, ranks_of, scaling_of
from tests.tiny import tiny_inputs, tiny_llama

# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "stack", "index", "block"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers", 3, "model.layers.3"),
        ("encoder.block.11.layer.0.SelfAttention.q", "encoder.block", 11, "encoder.block.11"),
        ("transformer.h.0.attn.c_attn", "transformer.h", 0, "transformer.h.0"),
        ("0.weight", "", 0, ".0"),
        ("bert.pooler.dense", "", None, ""),
    ],
)
def test_places(path, stack, index, block):
    place = place_of(path)
    assert (place.stack, place.index, place.block) == (stack, index, block)


def test_depth_counts_each_stack():
    paths = ["encoder.block.0.a", "encoder.block.5.a", "decoder.block.2.a", "decoder.block.2.layer.7.b", "shared"]
    assert depth_of(paths) == {"encoder.block": 6, "decoder.block": 3}


def numbers_over(num, blocks):
    depth = {"m.layers": blocks}
    return [experts_at(f"m.layers.{b}.q", {**EXPERTS, "num": num}, [], depth)["num"] for b in range(blocks)]


@pytest.mark.parametrize(
    ("num", "blocks", "expected"),
    [
        (4, 3, [4, 4, 4]),
        ([2, 4, 6, 8], 8, [2, 2, 4, 4, 6, 6, 8, 8]),
        ([2, 4, 6, 8], 4, [2, 4, 6, 8]),
        ([2, 4, 6, 8], 2, [2, 6]),
        ([2, 4, 6, 8], 1, [2]),
        ([2, 8], 3, [2, 2, 8]),
        ([5], 3, [5, 5, 5]),
    ],
)
def test_numbers_over_depth(num, blocks, expected):
    assert numbers_over(num, blocks) == expected


def test_the_authors_allocation():
    assert numbers_over([2, 4, 6, 8], 32) == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8


def test_layers_of_their_own_first_match_wins():
    entries = [
        {"match": r"\.1\..*q$", "experts": {"num": 7, "rank": 3}},
        {"match": r"\.1\.", "experts": {"num": 9}},
    ]
    depth, experts = {"m": 2}, {**EXPERTS, "num": 4}
    assert experts_at("m.1.q", experts, entries, depth)["num"] == 7
    assert experts_at("m.1.q", experts, entries, depth)["rank"] == 3
    assert experts_at("m.1.k", experts, entries, depth)["num"] == 9
    assert experts_at("m.0.q", experts, entries, depth)["num"] == 4
    assert experts["num"] == 4


def test_ranks_and_scales():
    spec = {**EXPERTS, "num": 3, "rank": 4, "alpha": 8}
    assert ranks_of(spec) == [4, 4, 4] and scaling_of(spec) == 2
    assert scaling_of({**spec, "rslora": True}) == 4
    assert scaling_of({**spec, "scaling": -0.5}) == -0.5
    assert ranks_of({**spec, "rank": [1, 2, 3]}) == [1, 2, 3]
    assert ranks_of({**spec, "form": "module", "rank": 5}) == [5]  # one LoRA per layer, whatever num says
    with pytest.raises(ConfigError, match="lists 2 ranks for 3 experts"):
        ranks_of({**spec, "rank": [1, 2]})
    with pytest.raises(ConfigError, match=r"different ranks need an explicit experts\.scaling"):
        scaling_of({**spec, "rank": [1, 2, 3]})


def test_layers_of_their_own_in_a_model():
    model = molora.wrap(
        tiny_llama(),
        "molora",
        experts={"num": 2, "rank": 2},
        layers=[
            {"match": "down_proj", "experts": {"num": 3, "rank": [1, 2, 4], "scaling": 1.0}},
            {"match": r"layers\.0\.", "experts": {"frozen": [1], "form": "lora"}},
        ],
    )
    banks = {path: layer.molora_bank["default"] for path, layer in routed_layers(model).items()}
    assert banks["model.layers.0.mlp.down_proj"].ranks == (1, 2, 4)
    assert banks["model.layers.0.mlp.down_proj"].frozen == ()  # the first match counts, alone
    assert banks["model.layers.0.mlp.up_proj"].frozen == (1,)
    assert banks["model.layers.1.mlp.up_proj"].ranks == (2, 2) and banks["model.layers.1.mlp.up_proj"].frozen == ()
    assert torch.isfinite(model(**tiny_inputs(model)).logits).all()


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 3}, "experts must be a mapping, got 3"),
        ({"experts": {"number": 3}}, "experts has no key 'number'; did you mean 'num'"),
        ({"experts": {"num": 0}}, "experts.num must be a whole number >= 1"),
        ({"experts": {"num": []}}, "experts.num must be a whole number >= 1"),
        ({"experts": {"rank": [4, True]}}, "experts.rank must be a whole number >= 1"),
        ({"experts": {"alpha": "x"}}, "experts.alpha must be a positive number, got 'x'"),
        ({"experts": {"alpha": -1}}, "experts.alpha must be a positive number, got -1"),
        ({"experts": {"scaling": 0}}, "experts.scaling must be a number other than 0, or null, got 0"),
        ({"experts": {"rslora": "yes"}}, "experts.rslora must be true or false"),
        ({"experts": {"dropout": 1}}, "experts.dropout must be in"),
        ({"experts": {"frozen": "some"}}, "experts.frozen must be a list of expert numbers or 'all'"),
        ({"losses": None}, "losses must be a list, got None"),
        ({"layers": {"match": "q"}}, "layers must be a list"),
        ({"layers": [{"match": "q"}]}, "layers entry"),
        ({"layers": [{"match": "(", "experts": {}}]}, "layers.match '(' is not a regular expression"),
        ({"layers": [{"match": "q", "experts": {"nun": 2}}]}, "layers.experts has no key 'nun'"),
        ({"scorer": 5}, "scorer 5 is neither a name nor a mapping"),
        ({"scorer": {"name": ["linear"]}}, "is neither a name nor a mapping"),
        ({"scorer": {"name": "table", "num_tasks": 3}}, "does not go with scorer 'table'"),
        ({"granularity": "task"}, "does not go with scorer 'linear'"),
        ({"granularity": "word"}, "granularity 'word' is unknown"),
        ({"share": "layer"}, "share 'layer' is unknown"),
        ({"experts": {"form": "module"}}, "set share: block, not site"),
        (
            {"scorer": {"name": "linear", "init": {"schedule": "linear", "from": 0, "to": 1}}},
            "cannot follow a schedule",
        ),
        (
            {"selector": {"name": "top_p", "p": {"schedule": "linear", "from": 1}}},
            "selector.p: schedule 'linear' needs",
        ),
        ({"price": {"name": "sign", "rte": 1}}, "price 'sign' has no option 'rte'; did you mean 'rate'"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(changes, message):
    with pytest.raises(ConfigError) as error:
        MoloraConfig(**changes)
    assert message in str(error.value)


def test_changes_are_merged_key_by_key_and_renamed_components_replaced():
    config = build_config("dynmole", {"experts": {"num": 3}, "selector": {"p": 0.5}})
    assert config.experts["num"] == 3 and config.experts["rank"] == 24
    assert config.selector["p"] == 0.5 and config.selector["threshold"] == 0.9
    config = build_config("dynmole", {"selector": {"name": "top_k", "k": 1}, "scorer": {"bias": True}})
    assert config.selector == {"name": "top_k", "k": 1}
    assert config.scorer == {"name": "linear", "bias": True}  # the recipe gives the name alone
    again = build_config(config, {"link": "sigmoid"})
    assert again.link == "sigmoid" and again.selector == config.selector
    assert build_config("dynmole", {}).selector["p"] == 0.75  # recipes themselves are untouched


# --- profiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ("uniform", [8, 8, 8, 8, 8]),
        ("ascending", [2, 4, 5, 7, 8]),  # 2, 3.5, 5, 6.5, 8: halves are rounded up
        ("descending", [8, 7, 5, 4, 2]),
        ("pyramid", [2, 5, 8, 5, 2]),
        ("inverse_pyramid", [8, 5, 2, 5, 8]),
        ("wave", [5, 8, 5, 2, 5]),
        ("step", [2, 2, 2, 8, 8]),
        ([2, 6], [2, 2, 2, 6, 6]),
    ],
)
def test_profiles_over_depth(profile, expected):
    assert numbers_over({"profile": profile, "min": 2, "max": 8}, 5) == expected


@pytest.mark.parametrize("profile", ["uniform", "ascending", "descending", "pyramid", "wave", "step", [1, 3, 9]])
@pytest.mark.parametrize(("blocks", "total"), [(4, 4), (4, 5), (5, 23), (12, 96), (32, 100)])
def test_a_total_is_kept_to_the_expert_and_the_shape_too(profile, blocks, total):
    spec = {"profile": profile, "min": 2, "max": 8}
    numbers, free = numbers_over({**spec, "total": total}, blocks), numbers_over(spec, blocks)
    assert sum(numbers) == total and min(numbers) >= 1
    for a, b in zip(range(blocks - 1), range(1, blocks), strict=True):  # more never becomes fewer, but for a rounding
        assert (numbers[b] - numbers[a]) * (free[b] - free[a]) >= 0 or abs(numbers[b] - numbers[a]) <= 1


def test_a_total_of_the_free_profile_changes_nothing_and_one_of_twice_as_many_doubles_it():
    spec = {"profile": [2, 4, 6, 8], "total": 20}
    assert numbers_over(spec, 4) == [2, 4, 6, 8]
    assert numbers_over({**spec, "total": 40}, 4) == [4, 8, 12, 16]


@pytest.mark.parametrize(
    ("num", "message"),
    [
        ({"profile": "ascend"}, "experts.num.profile 'ascend' is unknown; did you mean 'ascending'"),
        ({"profile": "uniform", "mean": 3}, "experts.num has no key 'mean'"),
        ({"profile": "uniform", "max": 0}, "experts.num.max must be a whole number >= 1"),
        ({"profile": "uniform", "min": 5, "max": 2}, "min 5 is more than max 2"),
        ({"profile": [2, 0]}, "a list of numbers >= 1"),
        ({"min": 2, "max": 8}, "experts.num.profile None is unknown"),
        ({"profile": "uniform", "max": 4, "total": 1}, "experts.num.total is 1, less than one expert for each of 2"),
    ],
)
def test_wrong_profiles_are_named(num, message):
    with pytest.raises(ConfigError, match=message):
        molora.wrap(tiny_llama(), {}, experts={"num": num})


def test_a_profile_in_a_model():
    model = molora.wrap(
        tiny_llama(num_hidden_layers=3), {}, experts={"num": {"profile": "ascending", "min": 2, "max": 6}, "rank": 2}
    )
    for name, layer in routed_layers(model).items():
        assert layer.molora_bank["default"].num_experts == 2 + 2 * place_of(name).index
    inputs = tiny_inputs(model)
    assert torch.isfinite(model(**inputs).logits).all()
