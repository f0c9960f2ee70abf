"""Routers that learn find the planted kinds of tokens; routers that cannot learn do not."""

import pytest

from tests.systems.planted import agreement, load_variation, train

# ReMoE aims at 1 - k / E gates that are zero: at a half with k = 2 of 4, where its recipe has 2 of 8
HALF_OFF = [{"name": "weighted_l1", "k": 2, "weight": {"controller": "sign", "start": 1e-8, "target": 0.5}}]

# what a recipe needs to fit a layer of four experts of rank 1
FINDS = {
    "adamoe": {},
    # its gates say how good an expert is, not which is better: near 0, they teach neither the expert nor its centroid
    "base_layers": {"scorer": {"name": "linear", "init": 0.3}, "lr": 0.1, "steps": 1000},
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
    # 16 numbers learn for 4 (16 + 1) weights: at noise 0.7, told the kinds outright, its network stays below 0.95
    "hyper_router": {"noise": 0.5, "lr": 0.3, "steps": 800},
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
    "remoe": {"losses": HALF_OFF, "lr": 0.06, "steps": 800},
    "rmoe": {},
    "s2moe": {},
    "sam_bilevel": {"selector": {"n_group": 2, "k": 2}, "scorer": {"name": "linear", "init": 0.3}},
    "selective_sinkhorn": {},
    "similarity_aware": {},
    "smora": {},
    "speech_moe": {},
    "speech_moe2": {},
    "switch": {},
    "t2mir": {},
    "unipool": {"lr": 0.05, "steps": 1000},
    "vqmoe": {},
    "yuan_attention": {},
}
CANNOT = ("hash", "thor", "smoe_dropout", "lora", "feature_gates", "mhr_mu", "stable_moe")
BALANCED = ("bip", "deepseek_v3", "expert_choice", "selective_sinkhorn", "smora", "base_layers", "switch", "mixtral")


@pytest.mark.parametrize("recipe", sorted(FINDS))
def test_learned_routers_find_the_kinds(recipe):
    # Two seeds, one of which must do: rounding, which differs among processors, sends a run now and then into a poor
    # optimum (unipool: .995, .997, .894 at seeds 0 to 2; remoe: .990, .994, .679). What cannot learn stays below .6 at
    # any seed.
    found = [_found(recipe, seed=0)]
    if not _is_found(recipe, *found[0]):
        found.append(_found(recipe, seed=1))
    assert _is_found(recipe, *found[-1]), found


def _found(recipe, seed):
    model, task = train(recipe, seed=seed, **FINDS[recipe])
    return agreement(model, task), load_variation(model, task)


def _is_found(recipe, agreed, variation):
    # the kinds are equally frequent, so balanced experts are too
    return agreed >= 0.95 and (recipe not in BALANCED or variation <= 0.15)


@pytest.mark.parametrize("recipe", CANNOT)
def test_routers_that_cannot_learn_do_not_find_them(recipe):
    model, task = train(recipe)
    assert agreement(model, task) < 0.6


def test_the_quieter_task_of_hyper_router_still_takes_learning():
    model, task = train("smoe_dropout", **FINDS["hyper_router"])  # a frozen random router in its place
    assert agreement(model, task) < 0.7
