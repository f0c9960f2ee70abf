"""Systems with experts of their own form: MoV, Poly and MHR, SMEAR, BECoTTA, MoRA, MoFME, Chain-of-Experts.

Each is checked against its paper's equation in plain loops, against PEFT's implementation where there is one (Poly,
MHR, (IA)^3), and against the identities and closed forms of its specification.
"""

import copy
import itertools
import math

import pytest
import torch
from peft import IA3Config, LoraConfig, PolyConfig, get_peft_model
from torch.distributions import RelaxedBernoulli
from torch.nn import functional as F

import molora
from molora.control import routed_layers
from molora.errors import ConfigError, RoutingError
from molora.experts.bank import ExpertBank
from molora.experts.forms import build_experts
from molora.routing.load_losses import mutual_information
from molora.routing.response import activated
from molora.routing.router import Router
from molora.routing.smear import expert_dropout
from molora.routing.stochastic import relaxed_bernoulli
from molora.routing.types import Context, Memory, Routing
from tests.tiny import tiny_bert_classifier, tiny_inputs, tiny_llama, tiny_t5

NOBODY, TRAINING = Context(), Context(training=True)
LAYERS = ["q_proj", "v_proj", "up_proj"]


def wrapped(recipe, base=tiny_llama, seed=3, spread=0.3, **changes):
    """A tiny model with this recipe and random adapters."""
    model = molora.wrap(base(), recipe, **changes).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    return model


def watched(model, inputs):
    """The input and the output of every routed layer: {path: (layer, x, y)}."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda m, args, out, path=path: seen.update({path: (m, args[0], out)}))
        for path, layer in routed_layers(model).items()
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def double(tensors):
    return [t.detach().double() for t in tensors]


def logits(model, **told):
    with torch.no_grad(), molora.using(model, **told):
        return model(**tiny_inputs(model)).logits


def softmax(scores):
    powers = [math.exp(float(s) - float(max(scores))) for s in scores]
    return [p / sum(powers) for p in powers]


def each_token(x):
    return itertools.product(range(x.shape[0]), range(x.shape[1]))


# --- MoV (2309.05444) -------------------------------------------------------------------------------------------------


@pytest.mark.proves("mov")
@pytest.mark.parametrize("base", [tiny_llama, tiny_t5, tiny_bert_classifier])
def test_mov_is_its_equation(base):
    model = wrapped("mov", base)
    seen = watched(model, tiny_inputs(model))
    last = {tiny_llama: "down_proj", tiny_t5: "wo", tiny_bert_classifier: "output.dense"}[base]
    keys = {tiny_llama: "k_proj", tiny_t5: ".k", tiny_bert_classifier: "key"}[base]
    assert any(path.endswith(last) for path in seen) and any(path.endswith(keys) for path in seen)
    assert not any(path.endswith("attention.output.dense") for path in seen)
    for path, (layer, x, y) in seen.items():
        bank, W = layer.molora_bank["default"], layer.base_layer.weight.double()
        bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias.double()
        V, rows = double([bank.vectors, layer.molora_router["default"].scorer.weight])
        assert bank.on_input == path.endswith(last) and len(V) == 10
        for row, token in each_token(x):
            h = x[row, token].double()
            p = softmax([r @ h for r in rows])
            v = sum(p[e] * (1 + V[e]) for e in range(10))
            expected = W @ (h * v) + bias if bank.on_input else (W @ h + bias) * v
            torch.testing.assert_close(y[row, token].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.proves("mov")
def test_mov_with_equal_vectors_is_pefts_ia3():
    model = wrapped("mov")
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    reference = get_peft_model(tiny_llama(), config).eval()
    inside = dict(reference.base_model.model.named_modules())
    for path, layer in routed_layers(model).items():
        vector = 1 + 0.5 * torch.randn(layer.molora_bank["default"].vectors.shape[1])
        layer.molora_bank["default"].vectors.data.copy_((vector - 1).expand(10, -1))
        weight = inside[path].ia3_l["default"]
        weight.data = vector.view(weight.shape)
    expected = logits_of_peft(reference)
    assert (expected - logits(molora.wrap(tiny_llama(), "mov"))).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def logits_of_peft(model, **told):
    with torch.no_grad():
        return model.base_model(**tiny_inputs(model.base_model.model), **told).logits


@pytest.mark.proves("mov")
def test_mov_at_the_start_is_the_base_model_for_any_router():
    model = molora.wrap(tiny_llama(), "mov").eval()
    for layer in routed_layers(model).values():
        layer.molora_router["default"].scorer.weight.data.normal_(std=5.0)
    with torch.no_grad():
        assert torch.equal(model(**tiny_inputs(model)).logits, tiny_llama()(**tiny_inputs(model)).logits)


# --- Poly and MHR (2202.13914, 2211.03831) ----------------------------------------------------------------------------


def beside_poly(recipe, splits, base=tiny_llama, **changes):
    """The recipe and PEFT's Poly with the same tensors: 4 skills of rank 2, 3 tasks, scale 1 / r."""
    form = "factor" if splits == 1 else {"name": "factor", "splits": splits}
    model = wrapped(
        recipe,
        base,
        target_modules=LAYERS,
        experts={"form": form, "num": 4, "rank": 2, "alpha": 1},
        scorer={"name": "table", "num_tasks": 3},
        **changes,
    )
    reference = get_peft_model(
        base(), PolyConfig(r=2, target_modules=LAYERS, n_tasks=3, n_skills=4, n_splits=splits)
    ).eval()
    inside = dict(reference.base_model.model.named_modules())
    for path, layer in routed_layers(model).items():
        bank, theirs = layer.molora_bank["default"], inside[path]
        A = bank.A.data.view(4, 2, splits, -1).permute(2, 0, 3, 1)  # h, S, d / h, r
        B = bank.Bt.data.view(4, 2, splits, -1).permute(2, 0, 1, 3)  # h, S, r, o / h
        theirs.poly_lora_A["default"].data.copy_(A)
        theirs.poly_lora_B["default"].data.copy_(B)
        theirs.poly_router["default"].module_logits.data.copy_(layer.molora_router["default"].scorer.weight)
    return model, reference


@pytest.mark.proves("poly", "mhr")
@pytest.mark.parametrize(("recipe", "splits"), [("poly", 1), ("mhr", 1), ("mhr", 4), ("mhr", 16)])
def test_poly_and_mhr_are_pefts_poly_tensor_by_tensor(recipe, splits):
    model, reference = beside_poly(recipe, splits)
    tasks = torch.tensor([2, 0])
    expected = logits_of_peft(reference, task_ids=tasks)
    assert (expected - tiny_llama()(**tiny_inputs(model)).logits).abs().max() > 1e-2
    torch.testing.assert_close(logits(model, task_ids=tasks), expected, atol=1e-5, rtol=1e-5)
    other = logits(model, task_ids=torch.tensor([1, 0]))
    torch.testing.assert_close(other[1], expected[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other[0], expected[0], atol=1e-3), "tasks must differ for this to mean something"


@pytest.mark.proves("poly", "mhr")
@pytest.mark.parametrize(("recipe", "splits"), [("poly", 1), ("mhr", 4)])
def test_poly_gradients_are_pefts(recipe, splits):
    """In evaluation mode, where neither draws; the gradients of tables and factors alike."""
    model, reference = beside_poly(recipe, splits)
    inputs, tasks = tiny_inputs(model), torch.tensor([2, 0])
    with molora.using(model, task_ids=tasks):
        model(**inputs).logits.square().sum().backward()
    reference.base_model(**inputs, task_ids=tasks).logits.square().sum().backward()
    inside = dict(reference.base_model.model.named_modules())
    for path, layer in routed_layers(model).items():
        bank, theirs = layer.molora_bank["default"], inside[path]
        table = layer.molora_router["default"].scorer.weight.grad
        torch.testing.assert_close(table, theirs.poly_router["default"].module_logits.grad, atol=1e-4, rtol=1e-3)
        A = bank.A.grad.view(4, 2, splits, -1).permute(2, 0, 3, 1)
        torch.testing.assert_close(A, theirs.poly_lora_A["default"].grad, atol=1e-4, rtol=1e-3)
        assert table[1].eq(0).all() and table[0].abs().max() > 0


@pytest.mark.proves("poly")
def test_poly_draws_the_relaxed_bernoulli_of_torch():
    logit = torch.randn(2, 1, 5)
    torch.manual_seed(9)
    drawn = RelaxedBernoulli(torch.tensor(0.7), logits=logit).rsample()
    torch.manual_seed(9)
    gates = relaxed_bernoulli(torch.sigmoid(logit), TRAINING, temperature=0.7, normalise="none", scores=logit)
    torch.testing.assert_close(gates, drawn)
    evaluated = relaxed_bernoulli(torch.sigmoid(logit), NOBODY, scores=logit)
    torch.testing.assert_close(evaluated, torch.sigmoid(logit) / torch.sigmoid(logit).sum(-1, keepdim=True))


@pytest.mark.proves("poly")
def test_a_draw_at_score_zero_is_uniform():
    zero = torch.zeros(1, 1, 200_000)
    draws = relaxed_bernoulli(torch.sigmoid(zero), TRAINING, normalise="none", scores=zero)
    assert draws.mean().item() == pytest.approx(0.5, abs=5e-3)
    assert draws.var().item() == pytest.approx(1 / 12, abs=2e-3)


@pytest.mark.proves("poly")
def test_poly_draws_in_training_only():
    model = wrapped("poly", scorer={"name": "table", "num_tasks": 3}, target_modules=LAYERS)
    told = {"task_ids": torch.tensor([2, 0])}
    assert torch.equal(logits(model, **told), logits(model, **told))
    model.train()
    with molora.using(model, **told):
        first, second = (model(**tiny_inputs(model)).logits for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.proves("poly", "mhr")
@pytest.mark.parametrize("splits", [1, 4])
def test_skills_that_are_equal_are_plain_lora(splits):
    model, _ = beside_poly("mhr", splits)
    reference = get_peft_model(tiny_llama(), LoraConfig(r=2, lora_alpha=1, target_modules=LAYERS)).eval()
    inside = dict(reference.base_model.model.named_modules())
    for path, layer in routed_layers(model).items():
        bank = layer.molora_bank["default"]
        for stack, module in ((bank.A, inside[path].lora_A), (bank.Bt, inside[path].lora_B)):
            stack.data.copy_(stack.data[:2].repeat(4, 1))
            module["default"].weight.data.copy_(stack.data[:2] if stack is bank.A else stack.data[:2].T)
    torch.testing.assert_close(
        logits(model, task_ids=torch.tensor([2, 0])), logits_of_peft(reference), atol=1e-5, rtol=1e-5
    )


@pytest.mark.proves("mhr")
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_a_task_never_has_more_rank_than_one_skill(splits):
    bank = build_experts({"name": "factor", "splits": splits}, 16, 24, [3] * 5).double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    delta = bank.delta_weight(torch.rand(bank.num_gates, dtype=torch.float64))
    assert torch.linalg.matrix_rank(delta) == 3
    product = sum(0.2 * B @ A for A, B in (bank.pair(e) for e in range(5)))
    assert torch.linalg.matrix_rank(product) == 15


@pytest.mark.proves("poly", "mhr", "smear")
def test_factor_merging_differs_from_product_merging_by_the_cross_term():
    """I2, on the layer's output."""
    factor, output = (build_experts(form, 6, 5, [2] * 4, scaling=0.5).double() for form in ("factor", "lora"))
    for parameter in factor.parameters():
        torch.nn.init.normal_(parameter)
    output.load_state_dict(factor.state_dict())
    x, w = torch.randn(3, 7, 6, dtype=torch.float64), torch.softmax(torch.randn(3, 1, 4, dtype=torch.float64), -1)
    pairs = [factor.pair(e) for e in range(4)]
    for row in range(3):
        A = sum(w[row, 0, e] * pairs[e][0] for e in range(4))
        B = sum(w[row, 0, e] * pairs[e][1] for e in range(4))
        cross = sum(w[row, 0, e] * (pairs[e][1] - B) @ (pairs[e][0] - A) for e in range(4))
        torch.testing.assert_close(output(x, w)[row] - factor(x, w)[row], 0.5 * x[row] @ cross.T)
        assert cross.abs().max() > 0.1


@pytest.mark.proves("mhr_mu", "poly", "mhr")
def test_a_table_of_zeros_is_mu():
    model, _ = beside_poly("mhr", 4)
    mu = copy.deepcopy(model)
    molora.few_shot(mu, "mu")
    mu.eval()
    tasks = torch.tensor([2, 0])
    for scale, near in ((0.0, 1e-6), (1e-3, 1e-4)):
        for layer in routed_layers(model).values():
            torch.nn.init.uniform_(layer.molora_router["default"].scorer.weight, -scale, scale)
        torch.testing.assert_close(logits(model, task_ids=tasks), logits(mu), atol=near, rtol=0)


@pytest.mark.proves("mhr_mu")
@torch.no_grad()
def test_mu_merges_into_the_base():
    model = wrapped("mhr_mu", target_modules=LAYERS)
    expected = logits(model)
    for layer in routed_layers(model).values():
        delta = layer.get_delta_weight("default")
        assert torch.linalg.matrix_rank(delta, rtol=1e-5) == 1, "8 skills of rank 1 average to rank 1"
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**tiny_inputs(merged)).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.proves("mhr_z", "mhr_mu", "mhr")
@pytest.mark.parametrize("mode", ["z", "mu", "full"])
def test_few_shot_modes_train_what_they_say(mode, tmp_path):
    model = wrapped("mhr", target_modules=LAYERS, scorer={"name": "table", "num_tasks": 3})
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "molora_bank" in name}
    old = logits(model, task_ids=torch.tensor([0, 0]))
    molora.few_shot(model, mode)
    tables = {name: p.shape for name, p in model.named_parameters() if "molora_router" in name}
    if mode == "mu":
        assert not tables
    else:
        blocks = {layer.molora_bank["default"].splits for layer in routed_layers(model).values()}
        assert {shape for shape in tables.values()} == {torch.Size((1, h * 8)) for h in blocks}
        assert not torch.allclose(logits(model, task_ids=torch.tensor([0, 0])), old, atol=1e-4), "the tables are new"
    model.train()
    inputs = tiny_inputs(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)  # all, as careless loops do
    for _ in range(3):
        optimizer.zero_grad()
        with molora.using(model, task_ids=torch.tensor([0, 0])):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    still = [torch.equal(p, before[name]) for name, p in model.named_parameters() if "molora_bank" in name]
    assert still and (all(still) if mode == "z" else not any(still))
    model.eval().save_pretrained(tmp_path)
    loaded = molora.load(tiny_llama(), tmp_path)
    assert loaded.peft_config["default"].experts["frozen"] == ("all" if mode == "z" else [])
    told = {"task_ids": torch.tensor([0, 0])}
    torch.testing.assert_close(logits(loaded, **told), logits(model, **told), atol=1e-6, rtol=1e-6)


@pytest.mark.proves("mhr_z")
def test_the_recipe_of_z_is_what_few_shot_makes():
    made, recipe = wrapped("mhr", target_modules=LAYERS), molora.wrap(tiny_llama(), "mhr_z", target_modules=LAYERS)
    molora.few_shot(made, "z", num_tasks=8)
    for key in ("experts", "scorer", "link", "selector", "granularity", "share"):
        assert getattr(made.peft_config["default"], key) == getattr(recipe.peft_config["default"], key)
    trainable = [{n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (made, recipe)]
    assert trainable[0] == trainable[1] and all("scorer" in name for name in trainable[0])


def test_few_shot_refuses_what_it_cannot_do():
    model = wrapped("molora", target_modules=LAYERS)
    with pytest.raises(ConfigError, match="this adapter has scorer 'linear'"):
        molora.few_shot(model, "z")
    model = wrapped("mhr", target_modules=LAYERS)
    with pytest.raises(ConfigError, match="few-shot mode 'zero' is unknown; known: full, z, mu"):
        molora.few_shot(model, "zero")


@pytest.mark.proves("poly", "mhr")
def test_an_unknown_task_gets_the_mean_row():
    model, _ = beside_poly("mhr", 4)
    unknown = logits(model, task_ids=torch.tensor([-1, -1]))
    for layer in routed_layers(model).values():
        weight = layer.molora_router["default"].scorer.weight
        weight.data[0] = weight.data.mean(0)
    torch.testing.assert_close(logits(model, task_ids=torch.tensor([0, 0])), unknown)
    with pytest.raises(RoutingError, match="routes by task, but no task_ids reached the forward"):
        logits(model)


@pytest.mark.proves("poly", "mhr")
@pytest.mark.parametrize("base", [tiny_llama, tiny_t5])
def test_task_ids_follow_the_beams_of_generate(base):
    names = LAYERS if base is tiny_llama else ["q", "v", "wo"]
    model = wrapped("mhr", base, spread=0.6, target_modules=names, scorer={"name": "table", "num_tasks": 3})
    inputs = {k: v for k, v in tiny_inputs(model, batch=2).items() if k != "labels"}
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    tasks = torch.tensor([2, 0])
    with torch.no_grad():
        together = model.generate(**inputs, **options, task_ids=tasks)
        for row in range(2):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            alone = model.generate(**one, **options, task_ids=tasks[row : row + 1])
            assert torch.equal(alone[0], together[row]), "beams of one row must have the task of that row"
        wrong = pytest.raises(RoutingError, match="task_ids holds 2 ids for a batch of 4; give one per row")
        with wrong, molora.using(model, task_ids=tasks):
            model(**tiny_inputs(model, batch=4))


# --- SMEAR (2306.03745) -----------------------------------------------------------------------------------------------


def smear(**changes):
    return wrapped("smear", target_modules=LAYERS, experts={"num": 4, "rank": 3}, **changes)


@pytest.mark.proves("smear")
def test_smear_is_its_equation():
    model = smear()
    inputs = tiny_inputs(model)
    inputs["attention_mask"][0, :2] = 0
    for layer, x, y in watched(model, inputs).values():
        bank, scorer = layer.molora_bank["default"], layer.molora_router["default"].scorer
        A, B = bank.A.double().view(4, 3, -1), bank.Bt.double().view(4, 3, -1)
        down, up, rows, bias = double([bank.down_bias, bank.up_bias, scorer.weight, scorer.bias])
        gain, shift, row_gain, row_shift = double(
            [scorer.norm.weight, scorer.norm.bias, scorer.row_norm.weight, scorer.row_norm.bias]
        )
        for row in range(2):
            real = [t for t in range(x.shape[1]) if inputs["attention_mask"][row, t]]
            h = sum(x[row, t].double() for t in real) / len(real)
            h = gain * (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt() + shift
            centred = [(r - r.mean()) / (r.var(unbiased=False) + 1e-5).sqrt() for r in rows]
            p = softmax([(row_gain * c + row_shift) @ h + b for c, b in zip(centred, bias, strict=True)])
            D, d = sum(p[e] * A[e] for e in range(4)), sum(p[e] * down[e] for e in range(4))
            U, u = sum(p[e] * B[e] for e in range(4)), sum(p[e] * up[e] for e in range(4))
            for token in range(x.shape[1]):
                z = x[row, token].double()
                hidden = D @ z + d
                expected = layer.base_layer.weight.double() @ z + (hidden / (1 + torch.exp(-hidden))) @ U + u
                torch.testing.assert_close(y[row, token].double(), expected, atol=1e-5, rtol=1e-5)


def merged_adapter(experts=4):
    bank = build_experts({"name": "factor", "activation": "silu", "bias": True}, 6, 5, [2] * experts).double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    return bank


@pytest.mark.proves("smear")
def test_smear_with_a_one_hot_router_is_that_adapter():
    bank, x = merged_adapter(), torch.randn(3, 7, 6, dtype=torch.float64)
    for e in range(4):
        A, B = bank.A[2 * e : 2 * e + 2], bank.Bt[2 * e : 2 * e + 2]
        alone = F.silu(x @ A.T + bank.down_bias[e]) @ B + bank.up_bias[e]
        torch.testing.assert_close(bank(x, F.one_hot(torch.tensor(e), 4).double()), alone)


@pytest.mark.proves("smear")
def test_smear_with_equal_experts_is_one_adapter_for_any_router():
    bank, one, x = merged_adapter(), merged_adapter(1), torch.randn(3, 7, 6, dtype=torch.float64)
    for name, parameter in one.named_parameters():
        dict(bank.named_parameters())[name].data.copy_(parameter.repeat(4, 1))
    gates = torch.softmax(torch.randn(3, 1, 4, dtype=torch.float64), -1)
    torch.testing.assert_close(bank(x, gates), one(x, torch.ones(1, dtype=torch.float64)))


@pytest.mark.proves("smear")
def test_smear_without_an_activation_under_product_merging_is_a_soft_mixture():
    """I1: of the merge of products, the sum of outputs; the merge of weights differs (I2, above) and so does silu."""
    lora = ExpertBank(6, 5, [2] * 4).double()
    torch.nn.init.normal_(lora.Bt)
    x, p = torch.randn(7, 6, dtype=torch.float64), torch.softmax(torch.randn(4, dtype=torch.float64), -1)
    product = sum(p[e] * B @ A for e, (A, B) in enumerate(lora.pair(e) for e in range(4)))
    torch.testing.assert_close(lora(x, p), x @ product.T)


@pytest.mark.proves("smear")
def test_smear_reads_the_prompt_alone_and_decodes_with_its_decision():
    model = smear()
    ids = tiny_inputs(model, length=8)["input_ids"]
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad(), molora.record(model) as log:
        whole = model(input_ids=ids, labels=labels).logits
        before = {path: routing.gates for path, routing in log.items()}
        changed = torch.where(labels == -100, ids, (ids + 7) % 90 + 4)
        model(input_ids=changed, labels=torch.where(labels == -100, labels, changed))
        assert all(torch.equal(before[path], routing.gates) for path, routing in log.items())
        assert all(gates.shape == (2, 1, 4) for gates in before.values())
        step = model(input_ids=ids[:, :5], use_cache=True)
        pieces, cache = [step.logits], step.past_key_values
        for t in range(5, 8):
            step = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.proves("smear")
def test_smear_drops_experts_in_training():
    probs = torch.softmax(torch.randn(4000, 1, 5), -1)
    gates = expert_dropout(probs, TRAINING, p=0.3)
    assert (gates < 1e-6).float().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(gates.sum(-1), torch.ones(4000, 1))
    kept = gates > 1e-6
    ratio = (gates / probs)[kept.all(-1).logical_not()]
    assert ratio.max() > 1, "what is dropped is shared among the others"
    assert torch.equal(expert_dropout(probs, NOBODY, p=0.3), probs)


# --- BECoTTA (2402.08712) ---------------------------------------------------------------------------------------------


def becotta(**changes):
    return wrapped("becotta_mode", target_modules=LAYERS, **changes)


@pytest.mark.proves("becotta_mode")
def test_becotta_is_its_equation():
    model, domains = becotta(), torch.tensor([3, 1])
    inputs = tiny_inputs(model)
    inputs["attention_mask"][0, :2] = 0
    with molora.using(model, task_ids=domains):
        seen = watched(model, inputs)
    for layer, x, y in seen.values():
        bank, scorer = layer.molora_bank["default"], layer.molora_router["default"].scorer
        A, B = bank.A.double().view(4, 6, -1), bank.Bt.double().view(4, 6, -1)
        down, up, routers = double([bank.down_bias, bank.up_bias, scorer.clean.weight])
        for row, domain in enumerate(domains.tolist()):
            real = [t for t in range(x.shape[1]) if inputs["attention_mask"][row, t]]
            h = sum(x[row, t].double() for t in real) / len(real)
            scores = [float(routers[domain, e] @ h) for e in range(4)]
            best = sorted(range(4), key=lambda e: -scores[e])[:3]
            p = dict(zip(best, softmax([scores[e] for e in best]), strict=True))  # softmax over the top scores
            for token in range(x.shape[1]):
                z = x[row, token].double()
                adapters = sum(p[e] * (F.gelu(A[e] @ z + down[e]) @ B[e] + up[e]) for e in best)
                expected = layer.base_layer.weight.double() @ z + adapters
                torch.testing.assert_close(y[row, token].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.proves("becotta_mode")
def test_becotta_treats_each_row_alone():
    model, domains = becotta(), torch.tensor([3, 1])
    both = logits(model, task_ids=domains)
    inputs = tiny_inputs(model)
    for row in range(2):
        with torch.no_grad(), molora.using(model, task_ids=domains[row : row + 1]):
            alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits
        torch.testing.assert_close(alone[0], both[row], atol=1e-5, rtol=1e-5)


@pytest.mark.proves("becotta_mode")
def test_becotta_with_one_domain_is_a_plain_mixture_of_adapters():
    model = becotta(scorer={"name": "noisy", "scorer": {"name": "multi_gate", "num_tasks": 1}})
    plain = becotta(scorer="linear", losses=[])
    theirs = routed_layers(plain)
    for path, layer in routed_layers(model).items():
        theirs[path].molora_bank["default"].load_state_dict(layer.molora_bank["default"].state_dict())
        weight = layer.molora_router["default"].scorer.clean.weight
        theirs[path].molora_router["default"].scorer.weight.data.copy_(weight[0])
    torch.testing.assert_close(logits(model, task_ids=torch.zeros(2).long()), logits(plain))


@pytest.mark.proves("becotta_mode")
def test_becotta_routers_learn_from_the_task():
    """Finite differences of the task loss: in the released code this gradient is cut, so it is zero."""
    model, domains = becotta(losses=[]), torch.tensor([3, 1])
    layer = next(iter(routed_layers(model).values()))
    weight, inputs = layer.molora_router["default"].scorer.clean.weight, tiny_inputs(model)

    def loss():
        with molora.using(model, task_ids=domains):
            return model(**inputs, labels=inputs["input_ids"]).loss

    (grad,) = torch.autograd.grad(loss(), weight)
    direction = torch.zeros_like(weight)
    direction[3] = grad[3] / grad[3].norm()
    values = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            weight += step * direction
            values.append(float(loss()))
            weight -= step * direction
    measured = (values[0] - values[1]) / 2e-2
    assert abs(measured) > 1e-6 and measured == pytest.approx(float(grad[3].norm()), rel=0.1)
    assert grad[0].eq(0).all(), "domains that are not in the batch stay as they are"


@pytest.mark.proves("becotta_mode")
def test_becotta_information_lies_between_independence_and_a_permutation():
    def information(probs):
        routing = Routing(probs.log(), probs, probs)
        return -float(mutual_information(routing, Context(task_ids=torch.arange(4))))

    same = torch.tensor([0.4, 0.3, 0.2, 0.1]).expand(4, 1, 4)
    assert information(same) == pytest.approx(0, abs=1e-6)
    apart = torch.eye(4)[torch.tensor([2, 0, 3, 1])][:, None].clamp_min(1e-12)
    assert information(apart) == pytest.approx(math.log(4), abs=1e-5)
    for _ in range(20):
        probs = torch.softmax(3 * torch.randn(4, 1, 4), -1)
        by_hand = sum(
            p / 4 * math.log(p / float(probs[:, 0, e].mean()))
            for d in range(4)
            for e, p in enumerate(probs[d, 0].tolist())
        )
        assert 0 <= information(probs) <= math.log(4)
        assert information(probs) == pytest.approx(by_hand, abs=1e-5)


# --- MoRA, self-activated (2506.21035) --------------------------------------------------------------------------------


def mora(experts=6, selector=None, temperature=0.1):
    bank = ExpertBank(8, 5, [1] * experts, form="rank")
    torch.nn.init.normal_(bank.A)
    torch.nn.init.normal_(bank.Bt)
    link = {"name": "softmax", "temperature": temperature}
    router = Router(8, experts, scorer="response", link=link, selector=selector or "activated")
    router.reads(bank)
    return bank, router


def mora_delta(bank, router, x):
    return bank(x, router(x, NOBODY).gates)


@pytest.mark.proves("mora_self_activated")
def test_mora_is_its_equation():
    model = wrapped("mora_self_activated", target_modules=LAYERS)
    used = set()
    for layer, x, y in watched(model, tiny_inputs(model)).values():
        bank = layer.molora_bank["default"]
        A, B = bank.A.double(), bank.B.double()
        assert len(A) == 16 and not list(layer.molora_router["default"].parameters())
        for row, token in each_token(x):
            h = x[row, token].double()
            z = [float(A[i] @ h) for i in range(16)]
            s = [v / math.sqrt(sum(u * u for u in z)) for v in z]
            assert sum(v * v for v in s) == pytest.approx(1)
            w = softmax([v / 0.1 for v in s])
            kept = [i for i in sorted(range(16), key=lambda i: -s[i])[:8] if s[i] >= 0]
            used.add(len(kept))
            expected = layer.base_layer.weight.double() @ h + 16 * sum(w[i] * B[:, i] * z[i] for i in kept)
            torch.testing.assert_close(y[row, token].double(), expected, atol=1e-4, rtol=1e-4)
    assert len(used) > 1, "the threshold must bind for some tokens and not for others"


@pytest.mark.proves("mora_self_activated")
def test_mora_is_homogeneous_but_not_odd():
    bank, router = mora(selector={"name": "activated", "k": 3, "threshold": 0.1})
    x = torch.randn(2, 7, 8)
    y = mora_delta(bank, router, x)
    torch.testing.assert_close(mora_delta(bank, router, 2.5 * x), 2.5 * y, atol=1e-4, rtol=1e-4)
    assert (mora_delta(bank, router, -x) + y).abs().max() > 0.1


@pytest.mark.proves("mora_self_activated")
def test_mora_when_hot_is_lora_and_when_cold_one_rank():
    x = torch.randn(2, 7, 8)
    bank, router = mora(temperature=1e6)
    torch.testing.assert_close(mora_delta(bank, router, x), x @ bank.A.T @ bank.B.T / 6, atol=1e-4, rtol=1e-4)
    bank, router = mora(temperature=1e-4)
    z = x @ bank.A.T
    best = z.argmax(-1, keepdim=True)
    expected = torch.zeros_like(z).scatter(-1, best, z.gather(-1, best)) @ bank.B.T
    torch.testing.assert_close(mora_delta(bank, router, x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.proves("mora_self_activated")
def test_mora_thresholds_and_bounds():
    x = torch.randn(2, 50, 8)
    bank, router = mora(selector={"name": "activated", "threshold": 1.01})
    assert mora_delta(bank, router, x).eq(0).all(), "no score passes 1"
    for temperature in (0.1, 0.5, 2.0):
        gates = mora(temperature=temperature)[1](x, NOBODY).gates
        ratio = gates.amax(-1) / gates.amin(-1)
        assert (ratio <= math.exp(math.sqrt(2) / temperature) * (1 + 1e-4)).all() and ratio.max() > 1.5
    every = mora(selector={"name": "activated", "k": 6})
    dense = mora()
    dense[0].load_state_dict(every[0].state_dict())
    torch.testing.assert_close(mora_delta(*every, x), mora_delta(*dense, x))


@pytest.mark.proves("mora_self_activated")
def test_mora_threshold_may_be_one_of_test_time():
    scores = torch.tensor([[[0.9, -0.3, 0.1]]])
    probs = torch.softmax(scores, -1)
    options = {"threshold": 0.0, "in_training": False, "scores": scores}
    assert (activated(probs, TRAINING, **options) > 0).all()
    assert (activated(probs, NOBODY, **options) > 0).tolist() == [[[True, False, True]]]


@pytest.mark.proves("mora_self_activated")
def test_mora_grows_by_a_task_and_keeps_the_old_ranks(tmp_path):
    model = wrapped("mora_self_activated", target_modules=LAYERS, experts={"num": 6}).train()
    banks = {path: layer.molora_bank["default"] for path, layer in routed_layers(model).items()}
    stacks = {path: [t.clone() for t in bank.stack()] for path, bank in banks.items()}
    molora.grow(model, 4)
    for path, layer in routed_layers(model).items():
        bank = layer.molora_bank["default"]
        assert bank.num_experts == 10 and bank.frozen == tuple(range(6))
        assert bank.Bt.eq(0).all() and bank.A.shape[0] == 4, "new ranks start at zero"
        assert all(torch.equal(a, b) for a, b in zip(bank.pair(3), banks[path].pair(3), strict=True))
    inputs = tiny_inputs(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    moved = 0
    for path, layer in routed_layers(model).items():
        A, B = layer.molora_bank["default"].stack()
        assert torch.equal(A[:6], stacks[path][0]) and torch.equal(B[:, :6], stacks[path][1])
        moved += bool(B[:, 6:].abs().max() > 0)
    assert moved == len(stacks), "the new ranks learn"
    molora.grow(model, 2)  # and a third task
    model.eval().save_pretrained(tmp_path)
    loaded = molora.load(tiny_llama(), tmp_path)
    assert loaded.peft_config["default"].experts["num"] == 12
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)


@pytest.mark.proves("mora_self_activated")
def test_ranks_that_are_new_take_part_in_the_gates_of_the_old():
    model = wrapped(
        "mora_self_activated", target_modules=LAYERS, experts={"num": 6}, selector={"k": None, "threshold": None}
    )
    old = logits(model)
    molora.grow(model, 4)
    assert not torch.allclose(logits(model.eval()), old, atol=1e-4), "they take softmax mass before they say anything"


def test_growing_keeps_rows_prices_null_and_shared_experts():
    model = wrapped(
        "molora",
        target_modules=LAYERS,
        experts={"num": 3, "rank": 2, "null": 2, "shared": 1, "names": ["a", "b", "c", "common"]},
        scorer={"name": "linear", "bias": True},
        selector={"name": "top_k", "k": 2},
        price={"name": "sign", "rate": 0.1},
    )
    layers = routed_layers(model)
    routers = {path: copy.deepcopy(layer.molora_router["default"]) for path, layer in layers.items()}
    shared = {path: layer.molora_bank["default"].pair(3) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.molora_router["default"].price.value.copy_(torch.arange(5.0))
        routers[path].price.value.copy_(torch.arange(5.0))
    before = logits(model)
    molora.grow(model, 2, freeze=False)
    assert model.peft_config["default"].experts["names"] == ["a", "b", "c", "expert_3", "expert_4", "common"]
    for path, layer in layers.items():
        router, old = layer.molora_router["default"], routers[path]
        rows = [0, 1, 2, 5, 6]
        assert router.num_experts == 5 and router.null == 2
        assert torch.equal(router.scorer.weight[rows], old.scorer.weight)
        assert torch.equal(router.scorer.bias[rows], old.scorer.bias)
        assert torch.equal(router.price.value[rows], old.price.value)
        bank = layer.molora_bank["default"]
        assert bank.num_experts == 6 and bank.frozen == ()
        assert all(torch.equal(a, b) for a, b in zip(bank.pair(5), shared[path], strict=True))
    for layer in layers.values():  # nobody can pay the new experts, so the model is what it was
        layer.molora_router["default"].price.value[3:5] = 1e6
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "changes", "num", "message"),
    [
        ("hydralora", {}, 2, "experts of form 'shared_a' have no slots to add; forms lora and rank have"),
        ("molora", {}, 0, "it needs a whole number of experts >= 1, got 0"),
        ("mola", {}, 2, "different numbers or ranks of experts"),
        ("milora", {}, 2, "experts of form 'module' have no slots to add"),
    ],
)
def test_what_cannot_grow_says_so_and_stays(recipe, changes, num, message):
    model = wrapped(recipe, **changes)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=message):
        molora.grow(model, num)
    assert before.keys() == dict(model.named_parameters()).keys()


# --- MoFME (2312.16610) -----------------------------------------------------------------------------------------------


@pytest.mark.proves("mofme")
def test_mofme_is_its_equation():
    model = wrapped("mofme", target_modules=LAYERS)
    for layer, x, y in watched(model, tiny_inputs(model)).values():
        bank = layer.molora_bank["default"]
        A, B, v, rows = double([bank.A, bank.Bt.t(), bank.scales, layer.molora_router["default"].scorer.weight])
        assert v.shape == (8, 8)
        for row, token in each_token(x):
            h = x[row, token].double()
            p = softmax([r @ h for r in rows])
            experts = sum(p[e] * B @ (v[e] * (A @ h)) for e in range(8))
            expected = layer.base_layer.weight.double() @ h + 16 / 8 * experts
            torch.testing.assert_close(y[row, token].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.proves("mofme")
def test_mofme_softens_scores_where_its_passes_disagree():
    router = Router(12, 5, scorer={"name": "uncertainty_aware", "passes": 6, "dropout": 0.3})
    router.scorer.weight.data.normal_()
    x = torch.randn(2, 3, 12)
    memory = Memory()
    memory.seed = 5
    ctx = Context(training=True, memory=memory)
    scores = router(x, ctx).scores
    draws = torch.rand((6, 2, 3, 12), generator=memory.generator("/scorer", x.device))
    for b, s in each_token(x):
        passes = [
            softmax([sum(w * v * float(u >= 0.3) / 0.7 for w, v, u in zip(r, x[b, s], draws[m, b, s], strict=True))
                     for r in router.scorer.weight])
            for m in range(6)
        ]  # fmt: skip
        mean = [sum(p[e] for p in passes) / 6 for e in range(5)]
        trace = sum(sum((p[e] - mean[e]) ** 2 for p in passes) / 6 for e in range(5))
        expected = torch.tensor([math.log(m) / (1 + trace) for m in mean])
        torch.testing.assert_close(scores[b, s], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(router(x, ctx).scores, scores), "a recompute must draw the same"
    torch.testing.assert_close(router(x, NOBODY).scores, x @ router.scorer.weight.T)  # one pass, no dropout


@pytest.mark.proves("mofme")
def test_mofme_with_equal_scales_is_lora():
    bank = build_experts("film", 6, 5, [3] * 4, scaling=0.5).double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    bank.scales.data.copy_(bank.scales.data[:1].expand(4, -1))
    x, gates = torch.randn(2, 7, 6, dtype=torch.float64), torch.softmax(torch.randn(2, 7, 4, dtype=torch.float64), -1)
    torch.testing.assert_close(bank(x, gates), 0.5 * (x @ bank.A.T * bank.scales[0]) @ bank.Bt)


# --- Chain-of-Experts (2506.18945) ------------------------------------------------------------------------------------


@pytest.mark.proves("chain_of_experts")
def test_chain_is_its_equation():
    model = wrapped("chain_of_experts", target_modules=LAYERS)
    for layer, x, y in watched(model, tiny_inputs(model)).values():
        bank = layer.molora_bank["default"]
        A, B, C, rows = double([bank.A, bank.Bt.t(), bank.C, layer.molora_router["default"].scorer.weight])
        assert rows.shape[0] == 2 * 8, "a router for every step"
        for row, token in each_token(x):
            z = x[row, token].double()
            h = A @ z
            for step in range(2):
                p = softmax([r @ z for r in rows[8 * step : 8 * step + 8]])
                best = sorted(range(8), key=lambda e: -p[e])[:2]
                h = h + sum(p[e] / sum(p[b] for b in best) * C[e] @ h for e in best)
            expected = layer.base_layer.weight.double() @ z + 16 / 8 * B @ h
            torch.testing.assert_close(y[row, token].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.proves("chain_of_experts")
def test_a_chain_of_one_step_is_a_plain_mixture_beside_a_shared_expert():
    """n = 1: h^1 = A x + sum_e g_e C_e A x, so experts B C_e that share A, and B itself always on."""
    chain = build_experts({"name": "chain", "steps": 1}, 6, 5, [3] * 4, scaling=0.5).double()
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter)
    plain = ExpertBank(6, 5, [3] * 5, form="shared_a", scaling=0.5).double()
    plain.A.data.copy_(chain.A)
    plain.Bt.data.copy_(torch.cat([*((chain.Bt.T @ C).T for C in chain.C), chain.Bt]))
    x, gates = torch.randn(2, 7, 6, dtype=torch.float64), torch.rand(2, 7, 4, dtype=torch.float64)
    always = torch.cat([gates, torch.ones(2, 7, 1, dtype=torch.float64)], -1)
    torch.testing.assert_close(chain(x, gates), plain(x, always))


@pytest.mark.proves("chain_of_experts")
def test_a_chain_of_nothing_is_lora_and_steps_do_not_commute():
    chain = build_experts("chain", 6, 5, [3] * 4).double()
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter)
    x, gates = torch.randn(2, 7, 6, dtype=torch.float64), torch.rand(2, 7, 8, dtype=torch.float64)
    swapped = torch.cat([gates[..., 4:], gates[..., :4]], -1)
    assert not torch.allclose(chain(x, gates), chain(x, swapped)), "what acts first matters"
    chain.C.data.zero_()
    torch.testing.assert_close(chain(x, gates), x @ chain.A.T @ chain.Bt)
