"""Systems that route by prices, by assignment, by token id or by chance, against loops over tokens and experts."""

import copy
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F

import molora
from molora.control import routed_layers
from molora.routing.features import Place, features
from molora.routing.ids import Distilled, Hash
from molora.routing.losses import Parts
from molora.routing.pregating import Block, response_match, responses
from molora.routing.price import Price, prices
from molora.routing.router import Router
from molora.routing.scorers import scorers
from molora.routing.selectors import selectors
from molora.routing.types import Context, Memory, Routing
from tests.tiny import tiny_bert_classifier, tiny_inputs, tiny_llama

LENGTH = 9


def shaken(recipe, **changes):
    """The recipe on a tiny Llama, with random weights and prices, so that experts act and routers differ."""
    model = molora.wrap(tiny_llama(), recipe, **changes).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spread = 1.0 if "embedding" in name or "light" in name else 0.3 if "router" in name else 0.2
            parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    for router in routers_of(model):
        if router.price is not None:
            router.price.value.copy_(0.1 * torch.randn(router.num_experts, generator=generator))
            if recipe == "expert_choice":  # thresholds: near the even share, so that some tokens pass
                router.price.value.add_(0.12)
    return model


def routers_of(model):
    return [module for module in model.modules() if isinstance(module, Router)]


def watched(model, inputs):
    """Run the model; return per routed layer its input and output, and the input of the layer that decides for it."""
    seen, handles = {}, []
    for name, layer in routed_layers(model).items():
        handles.append(layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)})))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    leaders = {
        layer.sites["default"].group: (layer, seen[name][0])
        for name, layer in routed_layers(model).items()
        if "default" in layer.molora_router
    }
    return [
        (name, layer, *seen[name], *leaders[layer.sites["default"].group])
        for name, layer in routed_layers(model).items()
    ]


def dot(row, x):
    return sum(a * b for a, b in zip(row.tolist(), x.tolist(), strict=True))


def softmax(scores):
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def sigmoid(score):
    return 1 / (1 + math.exp(-score))


def linear_scores(router, x):
    return [dot(row, x) for row in router.scorer.weight.double()]


# --- gates of one token in evaluation, one function per system: (router, x (d,), token id) -> [g_e] -------------------


def hash_gates(router, x, token):
    return [1.0 if e == int(router.scorer.table[0, token]) else 0.0 for e in range(8)]


def base_gates(router, x, token):
    s, price = linear_scores(router, x), router.price.value.tolist()
    best = max(range(8), key=lambda e: s[e] - price[e])
    return [sigmoid(s[e]) if e == best else 0.0 for e in range(8)]


def stable_gates(router, x, token):
    s, scorer = linear_scores(router, x), router.scorer
    z = [dot(row, scorer.embedding[token].double()) for row in scorer.light.double()]
    best = max(range(8), key=lambda e: z[e])
    return [sigmoid(s[e]) if e == best else 0.0 for e in range(8)]


def sinkhorn_gates(router, x, token):
    p = softmax(linear_scores(router, x))
    best = sorted(range(8), key=lambda e: -p[e])[:2]
    return [p[e] / sum(p[f] for f in best) if e in best else 0.0 for e in range(8)]


def bip_gates(router, x, token):
    p, q = softmax(linear_scores(router, x)), router.price.value.tolist()
    best = sorted(range(8), key=lambda e: q[e] - p[e])[:2]
    return [p[e] if e in best else 0.0 for e in range(8)]


def expert_choice_gates(router, x, token):
    p, price = softmax(linear_scores(router, x)), router.price.value.tolist()
    return [p[e] if p[e] > price[e] else 0.0 for e in range(8)]


def thor_gates(router, x, token):
    return [1 / 8] * 8


EQUATIONS = {
    "hash": hash_gates,
    "base_layers": base_gates,
    "stable_moe": stable_gates,
    "selective_sinkhorn": sinkhorn_gates,
    "bip": bip_gates,
    "expert_choice": expert_choice_gates,
    "thor": thor_gates,
}


@pytest.mark.proves(*EQUATIONS)
@pytest.mark.parametrize("recipe", sorted(EQUATIONS))
@torch.no_grad()
def test_layers_equal_the_equation_in_evaluation(recipe):
    model = shaken(recipe)
    inputs = tiny_inputs(model, batch=2, length=LENGTH)
    inputs["attention_mask"][0, :2] = 0
    used = set()
    for name, layer, x, y, leader, read in watched(model, inputs):
        bank, router = layer.molora_bank["default"], leader.molora_router["default"]
        assert len(bank.ranks) == 8 and bank.ranks[0] == 8 and bank.scaling == 2.0
        base = layer.base_layer.weight.double()
        for row, position in ((0, 4), (1, 0), (1, LENGTH - 1)):
            gates = EQUATIONS[recipe](router, read[row, position].double(), int(inputs["input_ids"][row, position]))
            token = x[row, position].double()
            expected = base @ token
            for e, gate in enumerate(gates):
                A, B = (factor.double() for factor in bank.pair(e))
                expected = expected + 16 / 8 * gate * (B @ (A @ token))
            torch.testing.assert_close(y[row, position].double(), expected, atol=2e-5, rtol=1e-4, msg=name)
            used |= {e for e, gate in enumerate(gates) if gate}
    assert len(used) > 1, "every token went to the same expert, so the choice was not seen"


# --- training decisions -----------------------------------------------------------------------------------------------


def training_decisions(recipe, **changes):
    model = shaken(recipe, **changes).train()
    inputs = tiny_inputs(model, batch=3, length=8)
    inputs["attention_mask"][0, 6:] = 0
    seen = {}
    hooks = [
        router.register_forward_hook(lambda r, args, out: seen.update({r: (args[0], out)}))
        for router in routers_of(model)
    ]
    model(**inputs, labels=inputs["input_ids"])
    for hook in hooks:
        hook.remove()
    molora.drop_aux(model)
    return [(router, x, routing, inputs["attention_mask"].bool()) for router, (x, routing) in seen.items()]


@pytest.mark.proves("base_layers")
def test_base_layers_train_on_the_best_balanced_assignment():
    """22 real tokens and 8 experts: at most 3 each, at the total score of scipy's linear_sum_assignment."""
    for router, x, routing, valid in training_decisions("base_layers"):
        scores = (x @ router.scorer.weight.t())[valid].double().detach()
        chosen = (routing.gates[valid] != 0).double()
        assert chosen.sum(1).eq(1).all() and chosen.sum(0).max() <= 3 and routing.gates[~valid].eq(0).all()
        columns = scores.repeat_interleave(3, 1).numpy()
        rows, best = linear_sum_assignment(columns, maximize=True)
        assert (scores * chosen).sum().item() == pytest.approx(columns[rows, best].sum(), rel=1e-6)
        torch.testing.assert_close(routing.gates[valid], (torch.sigmoid(scores) * chosen).float())


@pytest.mark.proves("expert_choice")
def test_expert_choice_trains_with_exactly_even_loads():
    for router, x, routing, valid in training_decisions("expert_choice"):
        probs = torch.softmax(x @ router.scorer.weight.t(), -1)
        for e in range(8):
            ranked = probs[..., e][valid].sort(descending=True).values
            expected = torch.where(probs[..., e] >= ranked[5], probs[..., e], 0.0) * valid
            torch.testing.assert_close(routing.gates[..., e], expected)  # round(2 x 22 / 8) = 6 tokens each


@pytest.mark.proves("selective_sinkhorn")
def test_selective_sinkhorn_trains_on_the_plan():
    """Rows of the plan sum to 1, columns to T / E (loops of plain alternating division), gates are its 2 largest."""
    for router, x, routing, valid in training_decisions("selective_sinkhorn", selector={"chance": 1.0}):
        plan = torch.exp((x @ router.scorer.weight.t())[valid].double().detach())
        for _ in range(2000):
            plan = plan / plan.sum(0, keepdim=True) * (len(plan) / 8)
            plan = plan / plan.sum(1, keepdim=True)
        kept = torch.where(plan >= plan.topk(2, -1).values[:, 1:], plan, 0.0)
        expected = (kept / kept.sum(-1, keepdim=True)).float()
        torch.testing.assert_close(routing.gates[valid], expected, atol=2e-3, rtol=2e-3)
        assert routing.gates[~valid].eq(0).all()


@pytest.mark.proves("thor")
def test_thor_draws_one_expert_per_block_and_forward():
    model = shaken("thor").train()
    inputs, draws = tiny_inputs(model), []
    for seed in range(12):
        torch.manual_seed(seed)
        with molora.record(model) as log:
            model(**inputs, labels=inputs["input_ids"])
        chosen = {name.split(".")[2]: routing.gates for name, routing in log.items()}
        assert len(log) == 2  # one decision for all layers of a block
        for gates in chosen.values():
            assert torch.equal(gates, gates[:1, :1].expand_as(gates)) and gates[0, 0].sum() == 1
        draws.append(tuple(int(gates[0, 0].argmax()) for gates in chosen.values()))
    assert len(set(draws)) > 8 and any(a != b for a, b in draws)


@pytest.mark.proves("thor")
def test_thor_loss_is_both_task_losses_and_the_symmetric_divergence():
    model = shaken("thor").train()
    inputs = tiny_inputs(model)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :3] = -100
    torch.manual_seed(3)
    kept = []
    hook = model.register_forward_hook(lambda _, args, out: kept.append((out.loss, out.logits)))
    loss = molora.objective_loss(model, inputs)
    hook.remove()
    (first, p), (second, q) = kept
    assert not torch.equal(p, q)
    log_p, log_q = (F.log_softmax(z[:, 2:-1].flatten(0, 1).double(), -1) for z in (p, q))
    both_ways = 0.5 * (
        F.kl_div(log_p, log_q, log_target=True, reduction="sum")
        + F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    )
    torch.testing.assert_close(loss.double(), first.double() + second.double() + 5 * both_ways / len(log_p))


# --- causality: what may look at other tokens, and when ---------------------------------------------------------------

B, S, D, E = 2, 8, 6, 4
OPTIONS = {"hash": {"vocab_size": 50}, "distilled": {"vocab_size": 50}, "table": {"num_tasks": 3}}


def earlier_gates_move(training, scorer="linear", selector="softmax"):
    """Whether other tokens after the third change the gates of the first three, or of another row."""
    torch.manual_seed(0)
    specs = {k: {"name": v, **OPTIONS.get(v, {})} for k, v in (("scorer", scorer), ("selector", selector))}
    router = Router(D, E, **specs, granularity="task" if scorers.fact(scorer, "reads") == "task" else "token")
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    x, ids = torch.randn(B, S, D), torch.randint(50, (B, S))
    other, others = x.clone(), ids.clone()
    other[1, 3:], others[1, 3:] = 3 * torch.randn(S - 3, D), torch.randint(50, (S - 3,))
    gates = []
    for states, tokens in ((x, ids), (other, others)):
        torch.manual_seed(1)
        memory = Memory()
        memory.seed = 5
        ctx = Context(training=training, token_ids=tokens, memory=memory, task_ids=torch.zeros(B, dtype=torch.long))
        gates.append(router(states, ctx).gates)
    return not (torch.allclose(*(g[1, :3] for g in gates)) and torch.allclose(*(g[0] for g in gates)))


@pytest.mark.proves("base_layers", "expert_choice", "selective_sinkhorn")
@pytest.mark.parametrize(
    "name", [n for n in selectors if all(p.default is not p.empty for p in selectors.options(n).values())]
)
def test_selectors_leak_only_in_training_and_only_if_they_say_so(name):
    assert not earlier_gates_move(False, selector=name)
    assert earlier_gates_move(True, selector=name) == selectors.fact(name, "is_batch_coupled", False)


@pytest.mark.parametrize("name", ["linear", "hash", "random", "distilled"])
def test_scorers_of_this_family_never_leak(name):
    assert not earlier_gates_move(False, scorer=name) and not earlier_gates_move(True, scorer=name)


@pytest.mark.proves("base_layers", "expert_choice", "selective_sinkhorn")
@pytest.mark.parametrize("recipe", ["base_layers", "expert_choice", "selective_sinkhorn"])
@torch.no_grad()
def test_the_fallback_for_decoding_is_causal_and_generates(recipe):
    model = shaken(recipe)
    inputs = tiny_inputs(model, batch=1, length=6)
    out = [
        model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*out)
    logits = model(input_ids=out[0]).logits
    torch.testing.assert_close(model(input_ids=out[0][:, :5]).logits, logits[:, :5], atol=1e-5, rtol=1e-5)


# --- loads on tokens that no price has seen ---------------------------------------------------------------------------


@pytest.mark.proves("base_layers", "bip", "expert_choice")
@pytest.mark.parametrize(
    ("recipe", "before", "after"), [("base_layers", 2.0, 0.25), ("bip", 1.5, 0.35), ("expert_choice", 1.0, 0.35)]
)
def test_trained_prices_balance_evaluation(recipe, before, after):
    """A skewed router of 8 experts: the violation max f E - 1 in evaluation, before and after 40 steps of the price."""
    config = molora.MoloraConfig.from_recipe(recipe)
    router = Router(16, 8, scorer="linear", link=config.link, selector=config.selector, price=config.price)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.scorer.weight.copy_(0.25 * torch.randn(8, 16, generator=generator))
        router.scorer.weight[:, 0] = torch.linspace(1.5, -1.5, 8)

    def batch(tokens):
        x = torch.randn(1, tokens, 16, generator=generator)
        x[..., 0] = 1.0
        return x

    def violation():
        routing = router(batch(4096), Context())
        load = routing.selected.float().sum((0, 1))
        return (load.max() / load.mean() - 1).item()

    plain = Router(
        16, 8, scorer="linear", link=config.link, selector={"name": "top_k", "k": 1 if recipe[0] == "b" else 2}
    )
    plain.scorer = router.scorer
    load = plain(batch(4096), Context()).selected.float().sum((0, 1))
    assert (load.max() / load.mean() - 1).item() > before
    for _ in range(40):
        ctx = Context(training=True)
        router.observe(router(batch(256), ctx), ctx)
        router.price.settle()
    assert violation() < after
    if recipe == "expert_choice":
        per_token = router(batch(4096), Context()).selected.float().sum(-1).mean().item()
        assert 1.8 < per_token < 2.2


def test_sinkhorn_potential_keeps_the_balance_that_training_had():
    router = Router(
        8, 8, link="softmax", selector={"name": "sinkhorn", "k": 1, "iterations": 60}, price={"name": "sinkhorn"}
    )
    with torch.no_grad():
        router.scorer.weight.normal_(std=0.4)
        router.scorer.weight[:, 0] = torch.linspace(2, -2, 8)
    loads = {}
    for training in (False, True, True, True, True, True, False):
        x = torch.randn(1, 2048, 8)
        x[..., 0] = 1.0
        ctx = Context(training=training)
        routing = router(x, ctx)
        load = routing.selected.float().sum((0, 1))
        loads.setdefault(training, []).append((load.max() / load.mean() - 1).item())
        if training:
            router.observe(routing, ctx)
            router.price.settle()
    assert loads[False][0] > 2 and max(loads[True]) < 0.3 and loads[False][1] < 0.35


# --- hash, StableMoE --------------------------------------------------------------------------------------------------


@pytest.mark.proves("hash")
def test_hash_routing_of_an_id_is_the_same_at_every_position_and_layer_and_learns_nothing():
    model = molora.wrap(tiny_llama(), "hash").train()
    (scorer,) = [module for module in model.modules() if isinstance(module, Hash)]  # share: model
    before = copy.deepcopy(scorer.state_dict())
    ids = torch.tensor([[5, 9, 5, 5, 30, 9], [9, 9, 9, 5, 30, 5]])
    with molora.record(model) as log:
        model(input_ids=ids, labels=ids).loss.backward()
    (routing,) = log.values()
    for token in (5, 9, 30):
        rows = routing.gates[ids == token]
        assert torch.equal(rows, F.one_hot(scorer.table[0, token].long(), 8).float().expand_as(rows))
    assert not any("molora_router" in name for name, _ in model.named_parameters())
    assert torch.equal(scorer.table, before["table"])


@pytest.mark.proves("stable_moe")
def test_stable_moe_switches_at_a_tenth_of_training_and_is_frozen_then():
    model = shaken("stable_moe").train()
    inputs = tiny_inputs(model)
    light = {n: p for n, p in model.named_parameters() if n.endswith(("scorer.embedding", "scorer.light"))}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    values, copies, chosen = [], [], []
    for progress in (0.0, 0.05, 0.1, 0.5, 1.0):
        molora.set_progress(model, progress)
        with molora.record(model) as log:
            out = model(**inputs, labels=inputs["input_ids"])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        values.append(float(out.aux_loss))
        copies.append({name: p.detach().clone() for name, p in light.items()})
        chosen.append([(routing.gates != 0).long().argmax(-1) for routing in log.values()])
    assert values[0] > 0.3 and values[1] > 0.3 and values[2:] == [0.0, 0.0, 0.0]
    assert all(not torch.equal(copies[0][name], copies[1][name]) for name in light)
    for late, picks in zip(copies[2:], chosen[2:], strict=True):
        assert all(torch.equal(late[name], copies[1][name]) for name in light)
        assert all(torch.equal(a, b) for a, b in zip(picks, chosen[2], strict=True))
    scorer = next(module for module in model.modules() if isinstance(module, Distilled))
    assert scorer.embedding.shape == (96, 50) and scorer.light.shape == (8, 50)


# --- Read-ME ----------------------------------------------------------------------------------------------------------


def loops_of_block(block, states, allowed):
    """One transformer block, token by token and head by head, in plain loops over float64."""
    rows = []
    heads, width = block.heads, states.shape[-1]
    size = width // heads

    def turned(vector, position):
        half = size // 2
        out = vector.clone()
        for i in range(half):
            angle = position * 10000.0 ** (-i / half)
            a, b = vector[i], vector[i + half]
            out[i], out[i + half] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
        return out

    normed = F.layer_norm(states, (width,), block.norm.weight, block.norm.bias)
    q, k, v = (normed @ part.t() for part in block.qkv.weight.chunk(3))
    for t in range(len(states)):
        mixed = []
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            seen = [s for s in range(len(states)) if allowed[t][s]]
            scores = [dot(turned(q[t, own], t), turned(k[s, own], s)) for s in seen]  # not divided by sqrt(size)
            mixed.append(sum(a * v[s, own] for a, s in zip(softmax(scores), seen, strict=True)))
        x = states[t] + block.out.weight @ torch.cat(mixed)
        inner = F.gelu(block.up(F.layer_norm(x, (width,), block.norm_mlp.weight, block.norm_mlp.bias)))
        rows.append(x + block.down(inner))
    return torch.stack(rows)


@pytest.mark.proves("read_me_pregating")
@torch.no_grad()
def test_read_me_block_is_unscaled_rotary_attention_and_an_mlp():
    block = Block(16, 2).double()
    states = torch.randn(6, 16, dtype=torch.float64)
    allowed = torch.ones(6, 6).tril().bool()
    torch.testing.assert_close(
        block.float()(states[None].float(), allowed[None])[0].double(),
        loops_of_block(block.double(), states, allowed.tolist()),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.proves("read_me_pregating")
@torch.no_grad()
def test_read_me_decides_once_for_the_whole_model_from_its_first_input():
    model = shaken("read_me_pregating")
    (router,) = routers_of(model)
    inputs = tiny_inputs(model, batch=2, length=LENGTH)
    allowed = torch.ones(LENGTH, LENGTH).tril().bool().tolist()
    gates = None
    for name, layer, x, y, _, read in watched(model, inputs):
        if gates is None:  # the first layer's input is the token embedding after the first norm
            norm = model.get_base_model().model.layers[0].input_layernorm
            torch.testing.assert_close(read, norm(model.get_input_embeddings()(inputs["input_ids"])))
            feature, gates = copy.deepcopy(router.feature[0]).double(), []
            for row in read.double():
                states = row[:, : feature.dim]
                for block in feature.blocks:
                    states = loops_of_block(block, states, allowed)
                states = feature.norm(states)
                probs = [softmax([dot(w, h) for w in router.scorer.weight.double()]) for h in states]
                gates.append([[p if p == max(row) else 0.0 for p in row] for row in probs])
            gates = torch.tensor(gates, dtype=torch.float64)
            assert len(set(gates.argmax(-1).flatten().tolist())) > 1
        bank = layer.molora_bank["default"]
        expected = x.double() @ layer.base_layer.weight.double().t()
        for e in range(8):
            A, B = (factor.double() for factor in bank.pair(e))
            expected = expected + 2 * gates[..., e : e + 1] * (x.double() @ A.t() @ B.t())
        torch.testing.assert_close(y.double(), expected, atol=5e-5, rtol=1e-3, msg=name)


@pytest.mark.proves("read_me_pregating")
@torch.no_grad()
def test_read_me_remembers_its_own_history_in_cached_decoding():
    """Left padding, beams and token by token: the same text as without a cache."""
    model = shaken("read_me_pregating")
    inputs = tiny_inputs(model, batch=2, length=7)
    inputs["attention_mask"][0, :3] = 0
    kw = dict(max_new_tokens=7, min_new_tokens=7, do_sample=False)
    for beams in (1, 3):
        out = [model.generate(**inputs, **kw, num_beams=beams, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*out)
    feature = routers_of(model)[0].feature[0]
    x, memory, parts = torch.randn(2, 9, 32), Memory(), []
    whole = feature(x, Context())
    for start, end in ((0, 4), (4, 5), (5, 9)):
        memory.now = {}
        parts.append(feature(x[:, start:end], Context(memory=memory)))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert memory.past[f"{feature.place.name}:states"]["states"].shape == (2, 9, feature.dim)


@pytest.mark.proves("read_me_pregating")
def test_read_me_looks_both_ways_where_the_model_does_and_never_at_padding():
    feature = features.build({"name": "causal_blocks", "heads": 2}, 8, place=Place("here"))
    x, valid = torch.randn(1, 6, 8), torch.tensor([[True] * 4 + [False] * 2])
    other = x.clone()
    other[:, 3] += 1
    junk = x.clone()
    junk[:, 4:] = 99.0
    for causal in (True, False):
        ctx = Context(valid=valid, causal=causal)
        assert torch.allclose(feature(other, ctx)[:, :3], feature(x, ctx)[:, :3]) == causal
        assert torch.equal(feature(junk, ctx)[:, :4], feature(x, ctx)[:, :4])
    assert molora.wrap(tiny_bert_classifier(), "read_me_pregating") is not None


@pytest.mark.proves("read_me_pregating")
@pytest.mark.parametrize("form", ["lora", "shared_a"])
def test_read_me_target_is_how_strongly_each_expert_answers(form):
    model = shaken("read_me_pregating", experts={"form": form})
    (router,) = routers_of(model)
    x, valid = torch.randn(2, 5, 32), torch.rand(2, 5) < 0.7
    valid[0, 0] = True
    strength = torch.stack([x @ A.t() @ B.t() for A, B in (router.bank.pair(e) for e in range(8))], -2).norm(dim=-1)
    torch.testing.assert_close(responses(router, x), strength, atol=1e-5, rtol=1e-4)
    scores = torch.randn(2, 5, 8, requires_grad=True)
    probs = torch.softmax(scores, -1)
    found = response_match(Routing(scores, probs, probs), Context(valid=valid), parts=Parts(router, x))
    values = []
    for b, s in valid.nonzero().tolist():
        log_p = torch.log_softmax(scores[b, s], -1)
        smooth = 0.5 * F.one_hot(strength[b, s].argmax(), 8) + 0.5 / 8
        values.append(-0.75 * (smooth * log_p).sum() - 0.25 * (torch.softmax(strength[b, s], -1) * log_p).sum())
    torch.testing.assert_close(found, torch.stack(values).mean(), atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(found, scores)
    assert torch.isfinite(grad).all() and grad[valid].ne(0).any() and grad[~valid].eq(0).all()
    for parameter in router.bank.parameters():
        parameter.data.zero_()  # fresh experts all answer alike, which teaches nothing
    assert response_match(Routing(scores, probs, probs), Context(), parts=Parts(router, x)) == 0


# --- Union of Experts -------------------------------------------------------------------------------------------------


@pytest.mark.proves("union_of_experts")
@torch.no_grad()
def test_union_of_all_experts_is_the_lora_that_they_partition():
    """With all gates 1 the 8 blocks of 8 ranks are one LoRA of rank 64: sum_e B_e A_e = B A."""
    model = shaken("union_of_experts", selector={"k": 8})
    for router in routers_of(model):
        router.scorer.weight.zero_()  # even gates are 1, since they sum to k
    inputs = tiny_inputs(model)
    for name, layer, x, y, *_ in watched(model, inputs):
        A, B = layer.molora_bank["default"].stack()
        assert A.shape[0] == 64 and B.shape[1] == 64
        whole = x @ layer.base_layer.weight.t() + x @ A.t() @ B.t()
        torch.testing.assert_close(y, whole, atol=1e-4, rtol=1e-4, msg=name)
        parts = [layer.molora_bank["default"].pair(e) for e in range(8)]
        torch.testing.assert_close(sum(b @ a for a, b in parts), B @ A, atol=1e-5, rtol=1e-4)


@pytest.mark.proves("union_of_experts")
@torch.no_grad()
def test_union_of_experts_chooses_per_prompt_from_its_first_tokens():
    model = shaken("union_of_experts")
    inputs = tiny_inputs(model, batch=3, length=LENGTH)
    inputs["attention_mask"][0, :3] = 0  # left padding: the first tokens are the fourth to the seventh
    inputs["attention_mask"][2, 2:] = 0  # two tokens only: the rest is zeros
    for name, layer, x, y, leader, read in watched(model, inputs):
        router = leader.molora_router["default"]
        for row in range(3):
            first = [t for t in range(LENGTH) if inputs["attention_mask"][row, t]][:4]
            laid = torch.cat([read[row, t] for t in first] + [torch.zeros(32)] * (4 - len(first))).double()
            p = softmax([dot(w, laid) for w in router.scorer.weight.double()])
            best = sorted(range(8), key=lambda e: -p[e])[:4]
            expected = x[row].double() @ layer.base_layer.weight.double().t()
            for e in best:
                A, B = (factor.double() for factor in layer.molora_bank["default"].pair(e))
                expected = expected + 4 * p[e] / sum(p[f] for f in best) * (x[row].double() @ A.t() @ B.t())
            torch.testing.assert_close(y[row].double(), expected, atol=5e-5, rtol=1e-3, msg=name)


# --- prices, across systems -------------------------------------------------------------------------------------------


@pytest.mark.proves("bip", "base_layers")
def test_one_price_object_covers_bip_sinkhorn_base_and_loss_free():
    """For one expert per token all rules agree on which experts are dear, and any of them evens the load out."""
    probs = torch.softmax(1.5 * torch.randn(1, 2048, 6) + torch.tensor([1.5, 1.0, 0.5, 0.0, -1.0, -2.0]), -1)
    loads = {}
    for name in ("dual", "quantile", "assignment", "proportional"):
        price = Price(6, prices.build(name))
        for _ in range(400 if name == "proportional" else 25):
            chosen = (probs - price.value).argmax(-1)
            price.observe(F.one_hot(chosen, 6).bool(), torch.ones(1, 2048), probs)
            price.settle()
        load = torch.bincount((probs - price.value).argmax(-1).flatten(), minlength=6).float()
        loads[name] = (load.max() / load.mean() - 1).item()
        assert torch.equal(price.value.argsort(descending=True), torch.arange(6)), name
    start = torch.bincount(probs.argmax(-1).flatten(), minlength=6).float()
    assert (start.max() / start.mean() - 1) > 0.9
    assert all(value < 0.1 for value in loads.values()), loads
