"""The cross-system lattice: one system with an option turned to its end is another system, exactly.

Each arrow is checked on a whole tiny Llama: two models wrapped by two recipes (or by PEFT), with the same experts and
the same routers, must have the same logits. The arrows are those of the specification of trained mixtures; arrows of
single layers and of block experts are in tests/test_identities.py and in the tests of their systems.
"""

import pytest
import torch

import molora
from molora.control import routed_layers
from tests.needs import told
from tests.test_identities import NAMES, factors, peft_lora
from tests.tiny import tiny_inputs, tiny_llama

RANK = 4  # PEFT's reference is a LoRA of rank 4 and alpha 8, so its scale is 2
SCALE = {"rank": RANK, "scaling": 2.0, "dropout": 0.0}


def wrapped(recipe, experts, **changes):
    """A tiny Llama with this recipe on three layers per block and random weights in its routers."""
    changes.setdefault("target_modules", NAMES)
    model = molora.wrap(tiny_llama(), recipe, experts=experts, **changes).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "molora_router" in name and parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def write(model, pairs_of):
    """Put experts (A, B) into every layer: `pairs_of(path)` is a list of one pair per expert."""
    for path, layer in routed_layers(model).items():
        bank, pairs = layer.molora_bank["default"], pairs_of(path)
        downs = pairs[:1] if bank.form == "shared_a" else pairs
        bank.A.data.copy_(torch.cat([A for A, _ in downs]))
        bank.Bt.data.copy_(torch.cat([B.t() for _, B in pairs]))


def random_pairs(count, rank=RANK, one_a=False):
    """Per layer path, `count` random pairs, the same for every caller."""

    def of(path):
        generator = torch.Generator().manual_seed(sum(map(ord, path)))
        d_out, d_in = sizes[path]
        pairs = [
            (0.3 * torch.randn(rank, d_in, generator=generator), 0.3 * torch.randn(d_out, rank, generator=generator))
            for _ in range(count)
        ]
        return [(pairs[0][0] if one_a else A, B) for A, B in pairs]

    linears = [(n, m) for n, m in tiny_llama().named_modules() if isinstance(m, torch.nn.Linear)]
    sizes = {name: tuple(module.weight.shape) for name, module in linears}
    return of


def same_routers(model, source):
    """Copy the routers of another model."""
    mine = dict(model.named_parameters())
    for name, parameter in source.named_parameters():
        if "molora_router" in name:
            mine[name].data.copy_(parameter.data)


@torch.no_grad()
def same_logits(model, reference, atol=3e-6):
    inputs = tiny_inputs(tiny_llama())
    with told(model, 2):
        got = model(**inputs).logits
    if any("molora" in name for name, _ in reference.named_modules()):
        with told(reference, 2):
            expected = reference(**inputs).logits
    else:
        expected = reference(**inputs).logits
    assert (expected - tiny_llama()(**inputs).logits).abs().max() > 1e-2, "an adapter that does nothing proves nothing"
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-5)


# --- one expert, or identical experts whose gates sum to 1: plain LoRA ------------------------------------------------

TOP1 = {"selector": {"k": 1}}
ONE = {
    "molora": {},
    "hydralora": {},
    "mola": TOP1,
    "dynmole": {},
    "milora": {"target_modules": ["q_proj"], "selector": {"k": 1}},
    "ld_mole": {},
    "lora_mixer": {},
    "mixture_of_routers": TOP1,
    "remix": {"selector": {"k": 1}},
    "poly": {},
    "mhr": {},
    "mhr_mu": {},
    "switch": {},
    "gshard": TOP1,
    "mixtral": TOP1,
    "deepseek_v3": {"selector": {"k": 1, "n_group": 1, "topk_group": 1, "scale": 1.0}, "experts": {"shared": 0}},
    "dynamic_moe": {},
    "adamoe": {"selector": {"k": 1}, "experts": {"null": 0}},
    "da_moe": {},
    "dynamoe": {},
    "sam_bilevel": {"selector": {"k": 1, "n_group": 1}, "losses": []},
    "post_moe": {},
    "cosine_st_moe": TOP1,
    "router_tuning": {"selector": {"threshold": 0.0}},
}


@pytest.mark.proves(
    *("molora", "hydralora", "mola", "dynmole", "milora", "ld_mole", "lora_mixer", "mixture_of_routers", "remix"),
    *("poly", "mhr", "mhr_mu", "switch", "gshard", "mixtral", "deepseek_v3", "dynamic_moe", "adamoe", "da_moe"),
    *("dynamoe", "sam_bilevel", "post_moe", "cosine_st_moe", "router_tuning"),
)
@pytest.mark.parametrize("recipe", sorted(ONE))
def test_one_expert_is_lora(recipe):
    changes = dict(ONE[recipe])
    experts = {"num": 1, **SCALE, **changes.pop("experts", {})}
    model = wrapped(recipe, experts, **changes)
    reference = peft_lora(RANK, 2 * RANK, changes.get("target_modules", NAMES))
    pairs = factors(reference)
    write(model, lambda path: [pairs[path]])
    same_logits(model, reference)


IDENTICAL = {
    "molora": {},
    "hydralora": {},
    "mola": {"experts": {"num": 4}},
    "dynmole": {"selector": {"normalise": "sum1"}},
    "ld_mole": {},
    "lora_mixer": {},
    "mixture_of_routers": {},
    "poly": {},
    "mhr": {},
    "mhr_mu": {},
    "gshard": {},
    "mixtral": {},
    "deepseek_v3": {"selector": {"scale": 1.0}, "experts": {"shared": 0}},
    "da_moe": {},
    "dynamoe": {"experts": {"num": 4}},
    "cosine_st_moe": {},
}


@pytest.mark.proves(
    *("molora", "hydralora", "mola", "dynmole", "ld_mole", "lora_mixer", "mixture_of_routers", "poly", "mhr"),
    *("mhr_mu", "gshard", "mixtral", "deepseek_v3", "da_moe", "dynamoe", "cosine_st_moe"),
)
@pytest.mark.parametrize("recipe", sorted(IDENTICAL))
def test_identical_experts_are_lora_when_gates_sum_to_one(recipe):
    changes = dict(IDENTICAL[recipe])
    model = wrapped(recipe, {**SCALE, **changes.pop("experts", {})}, **changes)
    reference = peft_lora(RANK, 2 * RANK)
    pairs = factors(reference)
    counts = {path: layer.molora_bank["default"].num_experts for path, layer in routed_layers(model).items()}
    assert min(counts.values()) >= 4
    write(model, lambda path: [pairs[path]] * counts[path])
    same_logits(model, reference)


# --- soft mixtures ----------------------------------------------------------------------------------------------------


@pytest.mark.proves("hydralora", "molora")
def test_hydralora_is_molora_with_tied_a():
    hydra = wrapped("hydralora", {"num": 4, **SCALE})
    tied = wrapped("molora", {"num": 4, **SCALE})
    for model in (hydra, tied):
        write(model, random_pairs(4, one_a=True))
    same_routers(tied, hydra)
    same_logits(hydra, tied)


@pytest.mark.proves("dynmole", "molora")
def test_dynmole_that_always_switches_is_molora():
    dynmole = wrapped("dynmole", {"num": 5, **SCALE}, selector={"threshold": -0.1})
    dense = wrapped("molora", {"num": 5, **SCALE})
    for model in (dynmole, dense):
        write(model, random_pairs(5))
    same_routers(dense, dynmole)
    same_logits(dynmole, dense)


@pytest.mark.proves("dynmole", "mola")
@pytest.mark.parametrize("k", [1, 3])
def test_dynmole_that_never_switches_and_keeps_no_mass_is_mola(k):
    never = {"threshold": 1.0, "p": 0.0, "min_k": k, "normalise": "sum1"}
    dynmole = wrapped("dynmole", {"num": 5, **SCALE}, selector=never)
    mola = wrapped("mola", {"num": 5, **SCALE}, selector={"k": k})
    for model in (dynmole, mola):
        write(model, random_pairs(5))
    same_routers(mola, dynmole)
    same_logits(dynmole, mola)


@pytest.mark.proves("mixture_of_routers", "mola", "mixtral")
@pytest.mark.parametrize("mode", ["prob", "logit"])
def test_mixture_of_one_router_is_mola_and_mixtral(mode):
    mixture = wrapped("mixture_of_routers", {"num": 5, **SCALE}, scorer={"routers": 1, "mode": mode})
    others = [wrapped(recipe, {"num": 5, **SCALE}) for recipe in ("mola", "mixtral")]
    for model in (mixture, *others):
        write(model, random_pairs(5))
    scorers = {path: layer.molora_router["default"].scorer for path, layer in routed_layers(mixture).items()}
    for other in others:
        for path, layer in routed_layers(other).items():
            layer.molora_router["default"].scorer.weight.data.copy_(scorers[path].weight[0])
        same_logits(mixture, other)


@pytest.mark.proves("smora", "mola")
def test_smora_with_tied_blocks_is_mola_up_to_link_and_scale():
    """4 of 8 ranks, tied in pairs: the best 2 of 4 experts of rank 2, sigmoids over their sum, scale c k / p."""
    smora = wrapped("smora", {"num": 8, "rank": 1, "scaling": 0.7, "dropout": 0.0}, selector={"k": 4})
    mola = wrapped("mola", {"num": 4, "rank": 2, "scaling": 0.7 * 4 / 2, "dropout": 0.0}, link="sigmoid")
    pairs = random_pairs(4, rank=2)
    write(mola, pairs)
    for path, layer in routed_layers(smora).items():
        bank, other = layer.molora_bank["default"], pairs(path)
        bank.A.data.copy_(torch.cat([A for A, _ in other]))
        bank.Bt.data.copy_(torch.cat([B.t() for _, B in other]))
        rows = layer.molora_router["default"].scorer.weight.data
        rows.copy_(rows[::2].repeat_interleave(2, 0))
    of = routed_layers(smora)
    for path, layer in routed_layers(mola).items():
        weight = of[path].molora_router["default"].scorer.weight
        layer.molora_router["default"].scorer.weight.data.copy_(weight[::2])
    same_logits(smora, mola)


@pytest.mark.proves("ld_mole", "mhr_mu")
def test_ld_mole_at_minus_infinity_is_the_uniform_average_of_products():
    """Which is one LoRA of rank E r with scale c / E, and not the average of factors that Poly makes."""
    ld_mole = wrapped("ld_mole", {"num": 3, **SCALE})
    for layer in routed_layers(ld_mole).values():
        layer.molora_router["default"].selector.mlp[2].bias.data.fill_(-1e12)
    pairs = random_pairs(3)
    write(ld_mole, pairs)
    stacked = peft_lora(3 * RANK, 2.0 * RANK)
    fill_peft(stacked, pairs)
    same_logits(ld_mole, stacked)
    mu = wrapped("mhr_mu", {"form": "lora", "num": 3, **SCALE})
    write(mu, pairs)
    same_logits(mu, stacked)
    factors_averaged = wrapped("mhr_mu", {"form": "factor", "num": 3, **SCALE})
    write(factors_averaged, pairs)
    with pytest.raises(AssertionError):
        same_logits(factors_averaged, stacked)


def fill_peft(model, pairs_of):
    """Put the stack of all pairs of a layer into PEFT's LoRA."""
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            pairs = pairs_of(path)
            module.lora_A["default"].weight.data.copy_(torch.cat([A for A, _ in pairs]))
            module.lora_B["default"].weight.data.copy_(torch.cat([B for _, B in pairs], 1))


@pytest.mark.proves("remix")
@pytest.mark.parametrize("training", [False, True])
def test_remix_with_all_experts_is_one_stacked_lora(training):
    remix = wrapped("remix", {"num": 3, **SCALE}, selector={"k": 3}).train(training)
    pairs = random_pairs(3)
    write(remix, pairs)
    stacked = peft_lora(3 * RANK, 2.0 * 3 * RANK)
    fill_peft(stacked, pairs)
    same_logits(remix, stacked)


@pytest.mark.proves("milora")
def test_milora_with_all_layers_on_is_lora():
    model = wrapped(
        "milora", {"rank": RANK, "scaling": 2.0}, target_modules="all-linear", selector={"k": 7, "weight": "const"}
    )
    reference = peft_lora(RANK, 2 * RANK, "all-linear")
    pairs = factors(reference)
    write(model, lambda path: [pairs[path]])
    same_logits(model, reference)


# --- merged factors ---------------------------------------------------------------------------------------------------


def factor_model(recipe, splits=1, **changes):
    form = {"name": "factor", "splits": splits}
    model = wrapped(recipe, {"form": form, "num": 3, **SCALE}, **changes)
    write(model, random_pairs(3))
    return model


@pytest.mark.proves("poly", "mhr_mu")
def test_poly_with_a_table_of_zeros_is_mhr_mu():
    poly, mu = factor_model("poly"), factor_model("mhr_mu")
    for layer in routed_layers(poly).values():
        layer.molora_router["default"].scorer.weight.data.zero_()
    same_logits(poly, mu, atol=1e-6)


@pytest.mark.proves("mhr", "mhr_mu")
def test_mhr_with_a_table_of_zeros_is_mhr_mu():
    mhr, mu = factor_model("mhr", splits=4), factor_model("mhr_mu", splits=4)
    for layer in routed_layers(mhr).values():
        layer.molora_router["default"].scorer.weight.data.zero_()
    same_logits(mhr, mu, atol=1e-6)


@pytest.mark.proves("mhr", "poly", "mhr_z")
def test_mhr_in_one_block_is_poly():
    poly = factor_model("poly")
    for recipe in ("mhr", "mhr_z"):
        mhr = factor_model(recipe)
        tables = {path: layer.molora_router["default"].scorer.weight for path, layer in routed_layers(poly).items()}
        for path, layer in routed_layers(mhr).items():
            layer.molora_router["default"].scorer.weight.data.copy_(tables[path])
        same_logits(mhr, poly)


# --- one-hot routers --------------------------------------------------------------------------------------------------


@pytest.mark.proves("lora_mixer", "lora_mixer_router", "poly", "smear", "molora", "mixtral", "router_tuning")
@pytest.mark.parametrize(
    "recipe", ["lora_mixer", "lora_mixer_router", "poly", "smear", "molora", "mixtral", "router_tuning"]
)
def test_a_one_hot_router_is_that_adapter_alone_in_peft(recipe):
    """Also ACCORD's: a decision per prompt that loads one of several adapters, each trained apart."""
    form = {"form": "factor"} if recipe in ("poly", "smear") else {}
    model = wrapped(recipe, {"num": 3, **SCALE, **form})
    pairs = random_pairs(3)
    write(model, pairs)
    for e in range(3):
        alone = peft_lora(RANK, 2 * RANK)
        fill_peft(alone, lambda path, e=e: [pairs(path)[e]])
        with molora.pin(model, torch.eye(3)[e]):
            same_logits(model, alone)


@pytest.mark.proves("smear")
def test_smear_with_a_one_hot_router_is_that_nonlinear_adapter():
    model = wrapped("smear", {"num": 3, **SCALE})
    single = wrapped("smear", {"num": 1, **SCALE})
    pairs = random_pairs(3)
    write(model, pairs)
    for path, layer in routed_layers(model).items():
        bank = layer.molora_bank["default"]
        for bias in (bank.down_bias, bank.up_bias):
            bias.data = 0.3 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(len(path)))
    banks = {path: layer.molora_bank["default"] for path, layer in routed_layers(model).items()}
    for e in range(3):
        write(single, lambda path, e=e: [pairs(path)[e]])
        for path, layer in routed_layers(single).items():
            layer.molora_bank["default"].down_bias.data.copy_(banks[path].down_bias[e : e + 1])
            layer.molora_bank["default"].up_bias.data.copy_(banks[path].up_bias[e : e + 1])
        with molora.pin(model, torch.eye(3)[e]):
            same_logits(model, single)


# --- MoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("mora_self_activated")
def test_mora_at_infinite_temperature_is_lora_over_r():
    model = wrapped(
        "mora_self_activated",
        {"num": RANK, "rank": 1, "scaling": 2.0 * RANK},
        link={"temperature": 1e9},
        selector={"k": RANK, "threshold": -1e9},
    )
    reference = peft_lora(RANK, 2 * RANK)
    pairs = factors(reference)
    write(model, lambda path: [pairs[path]])
    same_logits(model, reference)
