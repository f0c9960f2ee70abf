"""Routers that learn find the planted kinds of tokens; routers that cannot learn do not."""

import pytest

from tests.systems.planted import agreement, load_variation, train

# what a recipe needs to fit a layer of four experts of rank 1
FINDS = {
    "adamoe": {},
    "bip": {},
    "blockffn": {},
    "compete_smoe": {},
    "cosine_st_moe": {},
    "da_moe": {},
    "deepseek_v3": {},
    "dirichlet_prior": {},
    "dynamic_moe": {},
    "dynamoe": {},
    "dynmole": {},
    "expert_choice": {},
    "expert_router_coupling": {},
    "gshard": {},
    "hydralora": {"experts": {"rank": 4}},  # one A for all: as many ranks as there are maps
    "ladimo_policy": {},
    "ld_mole": {},
    "lora_mixer": {},
    "magnet": {},
    "mixtral": {},
    "mixture_of_routers": {},
    "mofme": {"experts": {"rank": 4}, "steps": 1000},  # one A and one B for all
    "mola": {},
    "molora": {},
    "omni_router": {},
    "post_moe": {},
    "promoe": {},
    "read_me_pregating": {},
    "rmoe": {},
    "s2moe": {},
    "sam_bilevel": {"selector": {"n_group": 2, "k": 2}, "seed": 1},
    "selective_sinkhorn": {},
    "similarity_aware": {},
    "smora": {},
    "speech_moe": {},
    "speech_moe2": {},
    "switch": {},
    "t2mir": {},
    "unipool": {"seed": 1},
    "vqmoe": {},
    "yuan_attention": {},
}
# These learn more slowly than the task lasts: each beats every router that cannot learn, and stays short of the rest.
STRUGGLES = ("base_layers", "hyper_router", "remoe")
CANNOT = ("hash", "thor", "smoe_dropout", "lora", "feature_gates", "mhr_mu", "stable_moe")
BALANCED = ("bip", "deepseek_v3", "expert_choice", "selective_sinkhorn", "smora", "base_layers", "switch", "mixtral")


@pytest.mark.parametrize("recipe", sorted(FINDS))
def test_learned_routers_find_the_kinds(recipe):
    model, task = train(recipe, **FINDS[recipe])
    assert agreement(model, task) >= 0.95
    if recipe in BALANCED:  # the kinds are equally frequent, so the experts are too
        assert load_variation(model, task) <= 0.15


@pytest.mark.parametrize("recipe", STRUGGLES)
def test_slow_learners_get_beyond_what_needs_no_learning(recipe):
    model, task = train(recipe, steps=800)
    assert agreement(model, task) >= 0.65


@pytest.mark.parametrize("recipe", CANNOT)
def test_routers_that_cannot_learn_do_not_find_them(recipe):
    model, task = train(recipe)
    assert agreement(model, task) < 0.6
