"""Identities between mixtures of LoRA experts, each exact: one mixture against another, or against PEFT's LoRA.

I1 to I8 hold for every mixture; then what is true of single systems; then arrows from system to system. A mixture that
is another mixture in a corner of its options must agree with it there, whoever wrote either.
"""

import inspect
import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

import molora
from molora.control import routed_layers
from molora.experts.bank import ExpertBank
from molora.routing.entropy import tsallis
from molora.routing.losses import switch_balance
from molora.routing.router import Router
from molora.routing.selectors import entropy_switch, selectors, softmax, top_k
from molora.routing.types import Context, Routing
from tests.needs import config_of, told
from tests.tiny import tiny_inputs, tiny_llama

NOBODY = Context()
NAMES = ["q_proj", "v_proj", "down_proj"]


def bank_of(ranks, form="lora", **options):
    bank = ExpertBank(6, 5, ranks, form=form, **options).double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    return bank


def tokens(dim=6):
    return torch.randn(2, 4, dim, dtype=torch.float64)


def gates_of(experts, **options):
    probs = torch.softmax(torch.randn(2, 4, experts, dtype=torch.float64), -1)
    return top_k(probs, NOBODY, **options) if options else probs


# --- I1 to I8 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "ranks"), [("lora", (2, 2, 2)), ("lora", (1, 3, 2)), ("rank", (1,) * 6), ("shared_a", (2, 2))]
)
def test_i1_summing_outputs_is_merging_products(form, ranks):
    bank, x = bank_of(ranks, form, scaling=0.7), tokens()
    gates = gates_of(bank.num_experts)
    y = bank(x, gates)
    for b, s in itertools.product(range(2), range(4)):
        torch.testing.assert_close(y[b, s], bank.delta_weight(gates[b, s]) @ x[b, s])


def test_i2_merging_factors_misses_their_covariance():
    bank = bank_of((2, 2, 2))
    w = torch.softmax(torch.randn(3, dtype=torch.float64), 0)
    pairs = [bank.pair(e) for e in range(3)]
    A = sum(w[e] * pairs[e][0] for e in range(3))
    B = sum(w[e] * pairs[e][1] for e in range(3))
    covariance = sum(w[e] * (pairs[e][1] - B) @ (pairs[e][0] - A) for e in range(3))
    merged = bank.delta_weight(w)
    torch.testing.assert_close(merged - B @ A, covariance)
    assert covariance.abs().max() > 0.1
    assert torch.linalg.matrix_rank(B @ A) == 2 and torch.linalg.matrix_rank(merged) == 5  # min(E r, d_out)


def test_i2_the_covariance_vanishes_for_a_shared_a_and_for_one_expert():
    shared = bank_of((2, 2, 2), "shared_a")
    w = torch.softmax(torch.randn(3, dtype=torch.float64), 0)
    B = sum(w[e] * shared.pair(e)[1] for e in range(3))
    torch.testing.assert_close(shared.delta_weight(w), B @ shared.A)
    bank, one_hot = bank_of((2, 2, 2)), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    A, B = bank.pair(1)
    torch.testing.assert_close(bank.delta_weight(one_hot), B @ A)


def test_i3_experts_are_blocks_of_one_larger_lora():
    lora, x = bank_of((2, 2, 2), scaling=1.5), tokens()
    ranks = bank_of((1,) * 6, "rank", scaling=1.5)
    ranks.load_state_dict(lora.state_dict())
    gates = gates_of(3)
    torch.testing.assert_close(ranks(x, gates.repeat_interleave(2, -1)), lora(x, gates))


def takes_probs_alone(name):
    """Whether a selector is a function of probs whose options all have defaults."""
    if inspect.isclass(selectors.get(name)) or set(selectors.fact(name, "given", ())) - {"price"}:
        return False
    return all(option.default is not option.empty for option in selectors.options(name).values())


@pytest.mark.parametrize("name", [name for name in selectors if takes_probs_alone(name)])
def test_i4_identical_experts_are_one_when_gates_sum_to_one(name):
    bank, one, x = bank_of((2, 2, 2), scaling=1.5), bank_of((2,), scaling=1.5), tokens()
    for e in range(3):
        bank.write(e, *one.pair(0), scale=1.5)
    options = {"normalise": "sum1"} if "normalise" in selectors.options(name) else {}
    probs = torch.softmax(torch.randn(2, 4, 3, dtype=torch.float64), -1)
    gates = selectors.get(name)(probs, NOBODY, **options)
    torch.testing.assert_close(bank(x, gates), one(x, torch.ones(1, dtype=torch.float64)))


@pytest.mark.parametrize("recipe", molora.recipes())
def test_i5_at_the_start_only_b_learns_from_the_task(recipe):
    model = molora.wrap(tiny_llama(), recipe, losses=[]).train()
    inputs = tiny_inputs(model)
    with told(model, 2):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    moving = [name for name, grad in grads.items() if grad.abs().max() > 0]
    for name in moving:  # vectors and biases, in forms that have them, are what B is in a LoRA
        assert name.endswith((".Bt", ".vectors", ".up_bias")), f"{name} moves at step 0"
    enough = 4 if config_of(recipe).experts["pool"] else 6  # the layers of a pool move together
    assert len(moving) >= enough or config_of(recipe).experts["frozen"] == "all"


@pytest.mark.parametrize("recipe", ["dynmole", "mola", "milora"])
def test_i5_an_auxiliary_loss_moves_routers_at_once(recipe):
    model = molora.wrap(tiny_llama(), recipe).train()
    inputs = tiny_inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    routers = {n: p.grad for n, p in model.named_parameters() if "molora_router" in n and n.endswith("scorer.weight")}
    if recipe == "mola":  # where both of two experts are always chosen, the load is even whatever the router does
        even = [n for n, grad in routers.items() if grad.shape[0] == 2]
        assert len(even) == 7 and all(routers.pop(n).abs().max() < 1e-9 for n in even)
    assert routers and all(grad.abs().max() > 0 for grad in routers.values())


def test_i6_gates_below_one_shrink_the_change_and_never_the_base():
    one, bank, x = bank_of((2,)), bank_of((2, 2, 2)), tokens()
    for e in range(3):
        bank.write(e, *one.pair(0))
    gates = gates_of(3, k=2, normalise="none")
    assert (gates.sum(-1) < 1).all()
    full = one(x, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(bank(x, gates), gates.sum(-1, keepdim=True) * full)
    fresh = molora.wrap(tiny_llama(), "molora", selector={"name": "top_k", "k": 1, "normalise": "none"}).eval()
    inputs = tiny_inputs(fresh)
    torch.testing.assert_close(fresh(**inputs).logits, tiny_llama()(**inputs).logits, atol=1e-6, rtol=1e-6)


def test_i7_effective_experts_and_tsallis():
    probs = torch.softmax(2 * torch.randn(50, 6, dtype=torch.float64), -1)
    effective = probs.sum(-1).square() / probs.square().sum(-1)
    raw = tsallis(probs, q=2.0) * (1 - 1 / 6)  # not normalised: 1 - sum p^2
    torch.testing.assert_close(effective, 1 / (1 - raw))
    assert (effective >= 1).all() and (effective <= 6).all()
    gates = top_k(probs[None], NOBODY, k=3)
    chosen = gates.sum(-1).square() / gates.square().sum(-1)
    assert (chosen >= 1 - 1e-9).all() and (chosen <= 3 + 1e-9).all()


def test_i8_balance_losses_at_perfect_balance():
    """The factors by which papers differ: k in Mixtral's code, the number of layers where they are summed."""
    uniform = torch.full((1, 6, 6), 1 / 6)
    for k in (1, 2, 3):
        gates = torch.stack([torch.roll(torch.tensor([1.0] * k + [0.0] * (6 - k)), s) for s in range(6)])[None]
        assert switch_balance(Routing(uniform, uniform, gates), NOBODY).item() == pytest.approx(1)
    dense = Routing(uniform, uniform, uniform)
    assert switch_balance(dense, NOBODY, load="gates").item() == pytest.approx(1)  # DynMoLE


def test_i8_a_sum_over_layers_grows_with_the_model_and_a_mean_does_not():
    def auxiliary(over, layers):
        loss = {"name": "switch_balance", "weight": 1.0, "over": over}
        model = molora.wrap(
            tiny_llama(num_hidden_layers=layers), "mola", losses=[loss], scorer={"name": "constant", "learn": True}
        ).train()
        inputs = tiny_inputs(model)
        return model(**inputs, labels=inputs["input_ids"]).aux_loss.item()

    # uniform probs: every layer's value is 1, whatever is chosen
    assert auxiliary("sum", 1) == pytest.approx(7) and auxiliary("sum", 2) == pytest.approx(14)
    assert auxiliary("mean", 1) == pytest.approx(1) and auxiliary("mean", 2) == pytest.approx(1)


# --- against PEFT -----------------------------------------------------------------------------------------------------


def peft_lora(rank, alpha, names=NAMES, **options):
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, **options)
    model = get_peft_model(tiny_llama(), config).eval()
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def factors(peft_model):
    """Layer path -> (A, B) of PEFT's LoRA."""
    return {
        name: (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
        for name, module in peft_model.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }


def fill(model, pairs, experts=None):
    """Write a LoRA's factors into the experts of every layer, as they are, for the bank's own scaling."""
    for path, layer in routed_layers(model).items():
        bank = layer.molora_bank["default"]
        A, B = pairs[path]
        for e in range(bank.num_experts) if experts is None else experts:
            if bank.form == "shared_a":
                bank.A.data.copy_(A)
                bank.B.data[:, e * A.shape[0] : (e + 1) * A.shape[0]] = B
            else:
                bank.write(e, A, B, scale=bank.scaling)


def shake_routers(model):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "molora_router" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def same_logits(model, reference, atol=2e-6):
    inputs = tiny_inputs(reference)
    with torch.no_grad():
        expected, got = reference(**inputs).logits, model(**inputs).logits
        base = tiny_llama()(**inputs).logits
    assert (expected - base).abs().max() > 1e-2, "the LoRA must change something for this test to mean something"
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-5)


ALONE = [
    {"selector": "softmax"},
    {"selector": {"name": "top_k", "k": 1}},
    {"selector": {"name": "top_k", "k": 2, "clamp": True, "normalise": "sumk"}},
    {"selector": {"name": "top_k", "k": 1, "weight": "const", "normalise": "none"}},
    {"selector": {"name": "top_k", "k": 1}, "price": "sign"},
    {"selector": {"name": "top_k", "k": 1}, "link": "sigmoid"},
    {"selector": "top_p"},
    {"selector": "entropy_switch"},
    {"selector": "entropy_switch", "granularity": "prompt"},
    {"scorer": "cosine"},
    {"scorer": "mlp"},
    {"scorer": {"name": "constant", "learn": False}},
    {"experts": {"form": "shared_a"}},
    {"share": "block"},
    {"share": "model"},
]


@pytest.mark.parametrize("changes", ALONE, ids=lambda c: "-".join(str(v) for v in c.values())[:60])
def test_one_expert_is_pefts_lora_whatever_the_router(changes):
    reference = peft_lora(4, 8)
    changes = {**changes, "experts": {"num": 1, "rank": 4, "alpha": 8, **changes.get("experts", {})}}
    model = molora.wrap(tiny_llama(), {}, target_modules=NAMES, **changes).eval()
    shake_routers(model)
    fill(model, factors(reference))
    same_logits(model, reference)


def test_the_lora_recipe_is_pefts_lora_with_as_many_parameters():
    reference = peft_lora(8, 16, "all-linear")
    model = molora.wrap(tiny_llama(), "lora").eval()
    fill(model, factors(reference))
    same_logits(model, reference)
    assert molora.report(model).trainable == sum(p.numel() for p in reference.parameters() if p.requires_grad)


def test_rslora_is_pefts_rslora():
    reference = peft_lora(4, 8, use_rslora=True)
    model = molora.wrap(
        tiny_llama(), "lora", target_modules=NAMES, experts={"rank": 4, "alpha": 8, "rslora": True}
    ).eval()
    fill(model, factors(reference))
    same_logits(model, reference)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "molora"},
        {"recipe": "hydralora"},
        {"recipe": "mola", "experts": {"num": 4}},
        {"recipe": "dynmole", "selector": {"normalise": "sum1"}},
    ],
    ids=lambda c: c["recipe"],
)
def test_identical_experts_are_pefts_lora(changes):
    reference = peft_lora(4, 8)
    changes = dict(changes)
    recipe = changes.pop("recipe")
    experts = {"rank": 4, "alpha": 8, **changes.pop("experts", {})}
    model = molora.wrap(tiny_llama(), recipe, target_modules=NAMES, experts=experts, **changes).eval()
    shake_routers(model)
    fill(model, factors(reference))
    same_logits(model, reference)


def test_a_one_hot_gate_is_that_lora_alone():
    loras = [peft_lora(4, 8), peft_lora(4, 8)]
    for parameter in loras[1].parameters():
        parameter.data = -0.7 * parameter.data if parameter.requires_grad else parameter.data
    model = molora.wrap(tiny_llama(), "molora", target_modules=NAMES, experts={"num": 2, "rank": 4, "alpha": 8}).eval()
    shake_routers(model)
    for e, reference in enumerate(loras):
        fill(model, factors(reference), experts=[e])
    for e, reference in enumerate(loras):
        with molora.pin(model, torch.eye(2)[e]):
            same_logits(model, reference)


# --- SMoRA (2501.15103) -----------------------------------------------------------------------------------------------


def smora_router(dim, ranks, k):
    router = Router(dim, ranks, link="sigmoid", selector={"name": "top_k", "k": k, "normalise": "sumk"}, price="sign")
    torch.nn.init.normal_(router.scorer.weight)
    return router


def test_smora_gates_sum_to_k():
    gates = smora_router(6, 16, k=5)(torch.randn(3, 7, 6), NOBODY).gates
    torch.testing.assert_close(gates.sum(-1), torch.full((3, 7), 5.0))
    assert gates.ne(0).sum(-1).eq(5).all() and (gates >= 0).all()


def test_smora_with_all_ranks_and_equal_scores_is_lora():
    """k = r makes every gate 1, and the scale alpha / k is alpha / r."""
    reference = peft_lora(8, 16)
    model = molora.wrap(
        tiny_llama(),
        "smora",
        target_modules=NAMES,
        experts={"num": 8, "rank": 1, "scaling": 16 / 8},
        selector={"k": 8},
        scorer={"name": "linear", "init": 0.0},
    ).eval()
    for path, layer in routed_layers(model).items():
        A, B = factors(reference)[path]
        layer.molora_bank["default"].A.data.copy_(A)
        layer.molora_bank["default"].B.data.copy_(B)
    same_logits(model, reference)


def test_smora_ignores_the_order_of_its_ranks():
    router, x = smora_router(6, 16, k=5), torch.randn(2, 4, 6)
    bank = bank_of((1,) * 16, "rank").float()
    router.price.value.normal_(std=0.1)
    before = bank(x, router(x, NOBODY).gates)
    order = torch.randperm(16)
    router.permute(order)
    bank.permute(order)
    torch.testing.assert_close(bank(x, router(x, NOBODY).gates), before)


@pytest.mark.parametrize("active", [1, 2, 3])
def test_smora_with_tied_blocks_is_a_mixture_of_loras(active):
    """Blocks of p ranks with one score each, k = m p: the m best blocks, renormalised sigmoids, scale alpha / p."""
    p, blocks, alpha = 2, 4, 16.0
    x = torch.randn(2, 5, 6)
    rows = torch.randn(blocks, 6)
    k = active * p
    ranks = ExpertBank(6, 5, (1,) * (blocks * p), form="rank", scaling=alpha / k)
    loras = ExpertBank(6, 5, (p,) * blocks, scaling=alpha / p)
    torch.nn.init.normal_(ranks.B)
    loras.load_state_dict(ranks.state_dict())
    fine = Router(6, blocks * p, link="sigmoid", selector={"name": "top_k", "k": k, "normalise": "sumk"})
    coarse = Router(6, blocks, link="sigmoid", selector={"name": "top_k", "k": active, "normalise": "sum1"})
    fine.scorer.weight.data.copy_(rows.repeat_interleave(p, 0))
    coarse.scorer.weight.data.copy_(rows)
    y = loras(x, coarse(x, NOBODY).gates)
    torch.testing.assert_close(ranks(x, fine(x, NOBODY).gates), y, atol=1e-5, rtol=1e-5)


# --- MoLA (2402.08562) ------------------------------------------------------------------------------------------------


def test_mola_costs_what_its_experts_cost_wherever_they_are():
    def count(num):
        model = molora.wrap(tiny_llama(num_hidden_layers=4), "mola", experts={"num": num})
        return molora.report(model).trainable

    assert count([2, 4, 6, 8]) == count([5, 5, 5, 5]) == count([2, 8, 8, 2]) == count(5)


def test_mola_with_one_expert_in_a_block_is_lora_there():
    reference = peft_lora(4, 8)
    model = molora.wrap(
        tiny_llama(),
        "mola",
        target_modules=NAMES,
        experts={"num": [1, 2], "rank": 4, "alpha": 8},
        selector={"clamp": True},
    ).eval()
    counts = {path: layer.molora_bank["default"].num_experts for path, layer in routed_layers(model).items()}
    assert set(counts.values()) == {1, 2}
    shake_routers(model)
    pairs = factors(reference)
    fill(model, pairs)
    same_logits(model, reference)  # the block with two has them identical, the other needs nothing


# --- DynMoLE (2504.00661) ---------------------------------------------------------------------------------------------


def some_probs(experts=6, rows=4, length=20):
    return torch.softmax(1.5 * torch.randn(rows, length, experts), -1)


def test_dynmole_below_zero_is_dense():
    p = some_probs()
    assert torch.equal(entropy_switch(p, NOBODY, threshold=-1e-9), softmax(p, NOBODY))


def test_dynmole_that_never_switches_and_keeps_all_mass_is_dense():
    p = some_probs(rows=50)
    assert torch.equal(entropy_switch(p, NOBODY, threshold=1.0, p=1.0), p)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("normalise", ["none", "sum1"])
def test_dynmole_that_never_switches_with_no_mass_is_mola(k, normalise):
    p = some_probs()
    got = entropy_switch(p, NOBODY, threshold=1.0, p=0.0, min_k=k, normalise=normalise)
    torch.testing.assert_close(got, top_k(p, NOBODY, k=k, normalise=normalise), rtol=0, atol=0)


def test_dynmole_gate_mass_jumps_at_the_switch():
    """Below the threshold the crossing expert is dropped, and the mass with it; above, all of it is there."""
    p = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]])
    entropy = tsallis(p, q=1.1).item()
    below = entropy_switch(p, NOBODY, threshold=entropy + 1e-3)
    above = entropy_switch(p, NOBODY, threshold=entropy - 1e-3)
    assert below.sum().item() == pytest.approx(0.7) and above.sum().item() == pytest.approx(1)


def test_dynmole_starts_dense():
    """At the default start about 79% of tokens with inputs of unit variance are above the threshold."""
    router = Router(2048, 6, selector="entropy_switch")
    gates = router(torch.randn(4, 500, 2048), NOBODY).gates
    dense = gates.ne(0).all(-1).float().mean().item()
    assert 0.6 < dense < 0.95


def test_dynmole_balance_is_one_for_uniform_routers():
    router = Router(6, 5, scorer={"name": "linear", "init": 0.0}, selector="entropy_switch")
    routing = router(torch.randn(2, 3, 6), NOBODY)
    assert switch_balance(routing, NOBODY, load="gates").item() == pytest.approx(1)


# --- MiLoRA (2410.18035) ----------------------------------------------------------------------------------------------


def milora(**changes):
    model = molora.wrap(tiny_llama(), "milora", **changes).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".activation." not in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_milora_with_all_layers_on_is_lora():
    reference = peft_lora(8, 16, "all-linear")
    model = milora(selector={"k": 7, "weight": "const"})
    fill(model, factors(reference))
    same_logits(model, reference)


def test_milora_switches_whole_layers_per_row():
    model = milora(selector={"weight": "const"})
    inputs, changed = tiny_inputs(model, batch=4), {}
    for path, layer in routed_layers(model).items():
        layer.register_forward_hook(
            lambda m, args, out, path=path: changed.update(
                {path: (out - m.base_layer(args[0])).abs().amax((1, 2)) > 1e-6}
            )
        )
    with torch.no_grad():
        model(**inputs)
    for block in range(2):
        table = torch.stack([on for path, on in changed.items() if path.startswith(f"model.layers.{block}.")])
        assert table.shape == (7, 4) and table.sum(0).eq(3).all()
    everything = torch.stack(list(changed.values()))
    assert (everything != everything[:, :1]).any(), "the rows must differ for this test to mean something"


def decisions_of(model, call):
    with molora.record(model) as log:
        call()
    return {path: routing.gates for path, routing in log.items()}


def prompt_and_answer():
    ids = tiny_inputs(tiny_llama(), length=8)["input_ids"]
    labels = ids.clone()
    labels[:, :5] = -100
    return ids, labels


def test_milora_decides_the_same_teacher_forced_and_cached():
    model, (ids, labels) = milora(), prompt_and_answer()
    with torch.no_grad():
        whole = model(input_ids=ids, labels=labels).logits
        step = model(input_ids=ids[:, :5], use_cache=True)
        pieces, cache = [step.logits], step.past_key_values
        for t in range(5, 8):
            step = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        unmasked = model(input_ids=ids).logits  # without labels, all of it counts as prompt
    assert (unmasked - whole).abs().max() > 1e-4, "the prompt must matter for this test to mean something"


@torch.no_grad()
def test_milora_does_not_see_the_answer():
    model, (ids, labels) = milora(), prompt_and_answer()
    before = decisions_of(model, lambda: model(input_ids=ids, labels=labels))
    other_ids, other_labels = ids.clone(), labels.clone()
    other_ids[:, 5:] = other_labels[:, 5:] = (ids[:, 5:] + 7) % 90 + 4
    after = decisions_of(model, lambda: model(input_ids=other_ids, labels=other_labels))
    assert len(before) == 2 and all(torch.equal(after[path], gates) for path, gates in before.items())


@torch.no_grad()
def test_milora_decides_once_per_block_and_generation():
    model, calls = milora(), []
    for layer in routed_layers(model).values():
        for router in layer.molora_router.values():
            router.register_forward_hook(lambda *_: calls.append(1))
    inputs = tiny_inputs(model)
    model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(calls) == 2  # blocks


# --- HydraLoRA (2404.19245) and MoLoRA (2309.05444) -------------------------------------------------------------------


def test_hydralora_is_molora_with_one_a():
    hydra, mixture, x = bank_of((2, 2, 2), "shared_a", scaling=1.5), bank_of((2, 2, 2), scaling=1.5), tokens()
    mixture.A.data.copy_(hydra.A.repeat(3, 1))
    mixture.B.data.copy_(hydra.B)
    gates = gates_of(3)
    torch.testing.assert_close(hydra(x, gates), mixture(x, gates))


def test_hydralora_parameters():
    model = molora.wrap(tiny_llama(), "hydralora", target_modules=["up_proj"], experts={"num": 5, "rank": 3})
    (layer, *_), d, o = list(routed_layers(model).values()), 32, 48
    bank, router = layer.molora_bank["default"], layer.molora_router["default"]
    counted = sum(p.numel() for p in [*bank.parameters(), *router.parameters()])
    assert counted == 3 * d + 5 * 3 * o + 5 * d


def test_molora_without_renormalising_keeps_the_mass_of_the_chosen():
    p = some_probs()
    gates = top_k(p, NOBODY, k=3, normalise="none")
    torch.testing.assert_close(gates.sum(-1), p.sort(-1, descending=True).values[..., :3].sum(-1))


# --- constants quoted above -------------------------------------------------------------------------------------------


def test_router_start_is_not_neutral():
    """At unit variance and width 2048, kaiming rows give scores a deviation of 0.58, normal(0.02) one of 0.91."""
    x = torch.randn(1, 1000, 2048)
    assert Router(2048, 8)(x, NOBODY).scores.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.05)
    normal = Router(2048, 8, scorer={"name": "linear", "init": 0.02})(x, NOBODY).scores.std().item()
    assert normal == pytest.approx(0.02 * math.sqrt(2048), rel=0.05)
