"""Systems that live by their losses, controllers and pools: ReMoE, BlockFFN, MAGNET, the Dirichlet prior, expert-router
coupling, UniPool, LaDiMo's policy and LoRA-Mixer; against plain loops, PEFT, and what their papers promise."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

import molora
from molora.control import routed_layers, trace_of
from molora.experts.pool import PooledBank
from molora.routing.losses import Parts
from molora.routing.router import Router
from molora.routing.types import Context, Routing
from molora.routing.weighted import WeightedLoss
from tests.tiny import tiny_inputs, tiny_llama


def shaken(recipe, **changes):
    model = molora.wrap(tiny_llama(), recipe, **changes)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def dot(row, x):
    return sum(float(a) * float(b) for a, b in zip(row, x, strict=True))


def softmax(scores):
    powers = [math.exp(s - max(scores)) for s in scores]
    return [p / sum(powers) for p in powers]


def best(p, k):
    chosen = sorted(range(len(p)), key=lambda e: -p[e])[:k]
    return [p[e] / sum(p[f] for f in chosen) if e in chosen else 0.0 for e in range(len(p))]


# --- what each recipe does to one token: x (d,) and the router -> gates, in loops -------------------------------------


def scores_of(router, x):
    bias = router.scorer.bias
    return [dot(row, x) + (float(bias[e]) if bias is not None else 0.0) for e, row in enumerate(router.scorer.weight)]


def relu(scores):
    return [max(0.0, z) for z in scores]


def remoe(router, x):
    assert router.scorer.bias is not None
    return relu(scores_of(router, x))


def blockffn(router, x):
    a = relu(scores_of(router, x))
    size = math.sqrt(sum(v * v for v in a) / len(a) + 1e-6)
    return [float(w) * v / size for w, v in zip(router.link.weight, a, strict=True)]


def unipool(router, x):
    z = scores_of(router, x)
    p = [math.exp(float(router.link.log_kappa)) * v / math.sqrt(sum(s * s for s in z)) for v in relu(z)]
    chosen = sorted(range(len(p)), key=lambda e: -p[e])[:2]
    return [p[e] if e in chosen else 0.0 for e in range(len(p))]


def best_two(router, x):
    return best(softmax(scores_of(router, x)), 2)


def all_four(router, x):
    return best(softmax(scores_of(router, x)), 4)


def best_three(router, x):
    return best(softmax(scores_of(router, x)), 3)


GATES = {
    "remoe": remoe,
    "blockffn": blockffn,
    "unipool": unipool,
    "magnet": best_two,
    "dirichlet_prior": best_two,
    "expert_router_coupling": best_two,
    "ladimo_policy": all_four,
    "lora_mixer": best_three,
    "lora_mixer_router": best_three,
}


@pytest.mark.proves(*GATES)
@pytest.mark.parametrize("recipe", sorted(GATES))
@torch.no_grad()
def test_layers_equal_the_equation(recipe):
    model = shaken(recipe, target_modules=["q_proj", "down_proj"])
    seen = {}

    def keep(name):
        return lambda module, args, output: seen.update({name: (args[0], output)})

    layers = routed_layers(model)
    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    model(**tiny_inputs(model, length=4))
    for hook in hooks:
        hook.remove()
    acts = 0.0
    for name, (x, y) in seen.items():
        layer = layers[name]
        bank, router, base = layer.molora_bank["default"], layer.molora_router["default"], layer.base_layer
        for row in range(2):
            for token in range(4):
                at = x[row, token].double()
                gates = GATES[recipe](router, at.tolist())
                delta = torch.zeros(layer.d_out, dtype=torch.float64)
                for e, gate in enumerate(gates):
                    A, B = (part.double() for part in bank.pair(e))
                    delta += 16 / 8 * gate * (B @ (A @ at))
                acts = max(acts, float(delta.abs().max()))
                torch.testing.assert_close(
                    y[row, token].double(), base.weight.double() @ at + delta, atol=2e-4, rtol=1e-4
                )
    assert acts > 0.1, "the experts do nothing, so this proves nothing"
    if recipe == "unipool":
        assert isinstance(layers["model.layers.1.self_attn.q_proj"].molora_bank["default"], PooledBank)


# --- ReMoE's controller -----------------------------------------------------------------------------------------------


def sparsity_under_control(bias, steps):
    """Train a ReLU router on zero-mean inputs, with a task that wants half of the gates; returns what it ends at."""
    torch.manual_seed(0)
    router = Router(16, 8, scorer={"name": "linear", "bias": bias}, link="relu", selector="positive")
    wanted = torch.randn(8, 16) / 4
    weight = {"controller": "sign", "start": 1e-3, "target": 0.75, "factor": 1.2}
    loss = WeightedLoss({"name": "weighted_l1", "k": 2, "weight": weight})
    optimizer, found = torch.optim.SGD(router.parameters(), lr=0.3), []
    for _ in range(steps):
        half = torch.randn(1, 64, 16)
        x = torch.cat([half, -half], 1)  # symmetric around zero
        routing = router(x, Context(training=True))
        task = ((routing.gates - torch.relu(x @ wanted.t())) ** 2).mean()
        optimizer.zero_grad()
        (task + loss(routing, Context(training=True), 1, Parts(router, x))).backward()
        optimizer.step()
        loss.controller.settle()
        found.append(float((routing.gates == 0).float().mean()))
    return sum(found[-100:]) / 100, float(loss.controller.state[0])


@pytest.mark.proves("remoe")
def test_the_controller_reaches_its_sparsity_with_a_bias_and_its_clamp_holds_without():
    sparsity, weight = sparsity_under_control(bias=True, steps=400)
    assert sparsity == pytest.approx(0.75, abs=0.02)
    assert 1e-12 < weight < 1e2
    sparsity, weight = sparsity_under_control(bias=False, steps=150)
    assert sparsity == pytest.approx(
        0.5
    )  # a symmetric input is positive for half of the experts, whatever the rows are
    assert weight == 1e2


@pytest.mark.proves("remoe")
def test_remoe_at_two_weights_presses_alike_but_harder():
    """At equal use the loss is the plain L1 norm, so its gradient is lambda on each active gate."""
    gates = torch.full((1, 8, 8), 0.5, requires_grad=True)
    loss = WeightedLoss({"name": "weighted_l1", "k": 8, "weight": 0.3})
    loss(Routing(gates, gates, gates), Context(), 1).backward()
    torch.testing.assert_close(gates.grad, torch.full_like(gates, 0.3 / 8))


# --- BlockFFN ---------------------------------------------------------------------------------------------------------


@pytest.mark.proves("blockffn")
def test_blockffns_losses_make_neighbours_share_experts():
    """Trained by them alone, tokens of a chunk end up with fewer experts in all than before."""
    torch.manual_seed(0)
    router = Router(16, 8, scorer="linear", link="relu_rms", selector="positive")
    losses = [
        WeightedLoss({"name": "locality", "weight": 1e-3}),
        WeightedLoss({"name": "chunk", "weight": 0.5, "size": 8}),
    ]
    x = torch.randn(4, 32, 16) + 2 * torch.randn(4, 1, 16)  # tokens of a row have something in common

    def union():
        with torch.no_grad():
            used = (router(x, Context()).gates > 0).unflatten(1, (-1, 8)).any(2)
        return float(used.float().mean())

    before, optimizer = union(), torch.optim.Adam(router.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        routing = router(x, Context(training=True))
        sum(loss(routing, Context(training=True), 1) for loss in losses).backward()
        optimizer.step()
    assert 0 < union() < 0.7 * before


@pytest.mark.proves("blockffn")
def test_a_token_without_a_positive_score_uses_the_frozen_layer_alone():
    router = Router(4, 3, link="relu_rms", selector="positive")
    router.scorer.weight.data.fill_(-1.0)
    x = torch.ones(1, 2, 4, requires_grad=True)
    gates = router(x, Context()).gates
    gates.sum().backward()
    assert gates.eq(0).all() and torch.isfinite(x.grad).all()


# --- MAGNET -----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("magnet")
def test_magnet_covers_all_experts_first_and_then_makes_tokens_decide():
    torch.manual_seed(0)
    router = Router(16, 4, selector={"name": "top_k", "k": 2})
    with torch.no_grad():
        router.scorer.weight[0] += 0.5  # one expert is ahead: the mean input is not zero
    config = molora.MoloraConfig.from_recipe("magnet")
    cover, decide = (WeightedLoss({**spec, "weight": spec["weight"]}) for spec in config.losses)
    decide.controller.rule.ramp = 20
    optimizer, history = torch.optim.Adam(router.parameters(), lr=0.02), []
    x = torch.randn(1, 256, 16) + 0.5
    for _ in range(300):
        optimizer.zero_grad()
        ctx = Context(training=True)
        routing = router(x, ctx)
        (100 * (cover(routing, ctx, 1) + decide(routing, ctx, 1))).backward()
        optimizer.step()
        decide.controller.settle()
        p = routing.probs.detach()[0]
        batch, token = (float(-(q * q.clamp_min(1e-9).log()).sum(-1).mean()) / math.log(4) for q in (p.mean(0), p))
        history.append((batch, token, float(decide.controller.state[0])))
    weights = [weight for _, _, weight in history]
    first = next(i for i, weight in enumerate(weights) if weight > 0)
    assert history[0][0] < 0.95 and history[first][0] > 0.95  # covered before the second phase began
    assert weights == sorted(weights) and weights[-1] == pytest.approx(0.01)  # and it never turned back
    assert history[-1][0] > 0.9 and history[-1][1] < 0.5 * history[first][1]  # covered still, and decided


# --- UniPool ----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("unipool")
def test_unipools_loss_in_a_model_reads_the_forward_before():
    """The auxiliary loss of the second forward, from what both forwards decided, by hand."""
    model = shaken("unipool", target_modules=["q_proj", "down_proj"]).train()
    values, decisions = [], []
    for seed in (1, 2):
        inputs = tiny_inputs(model, seed=seed)
        with molora.record(model) as log:
            out = model(**inputs, labels=inputs["input_ids"])
        values.append(float(out.aux_loss))
        decisions.append(dict(log))
    before = torch.stack([(r.gates != 0).float().mean((0, 1)) for r in decisions[0].values()])
    f = (before / before.sum(-1, keepdim=True)).mean(0)  # the mean over layers, of the forward before
    P = torch.stack([(r.probs / r.probs.sum(-1, keepdim=True)).mean((0, 1)) for r in decisions[1].values()])
    assert values[1] == pytest.approx(1e-2 * 32 * float((f * P).sum(-1).mean()), rel=1e-4)
    own = torch.stack([(r.gates != 0).float().mean((0, 1)) for r in decisions[1].values()])
    own = own / own.sum(-1, keepdim=True)
    assert abs(values[1] - 1e-2 * 32 * float((own * P).sum(-1).mean())) > 1e-5


# --- LoRA-Mixer -------------------------------------------------------------------------------------------------------


def loras(tmp_path, ranks):
    """Folders of PEFT LoRAs with weights of their own, and the logits that PEFT gives with each."""
    folders, logits = [], []
    for number, rank in enumerate(ranks):
        config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["q_proj", "v_proj"][: number + 1])
        reference = get_peft_model(tiny_llama(), config).eval()
        generator = torch.Generator().manual_seed(number)
        for name, parameter in reference.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        reference.save_pretrained(tmp_path / f"lora{number}")
        folders.append(tmp_path / f"lora{number}")
        with torch.no_grad():
            logits.append(reference(**tiny_inputs(reference)).logits)
    return folders, logits


@pytest.mark.proves("lora_mixer_router", "lora_mixer")
def test_a_one_hot_router_is_that_lora_alone_in_peft(tmp_path):
    folders, logits = loras(tmp_path, ranks=(2, 4))
    model = molora.import_peft(tiny_llama(), folders, recipe="lora_mixer_router").eval()
    inputs = tiny_inputs(model)
    for number, expected in enumerate(logits):
        with torch.no_grad(), molora.pin(model, torch.eye(2)[number]):
            torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.proves("lora_mixer_router")
def test_training_the_router_leaves_the_given_experts_bit_identical(tmp_path):
    folders, _ = loras(tmp_path, ranks=(2, 4))
    model = molora.import_peft(tiny_llama(), folders, recipe="lora_mixer_router").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.1)
    inputs = tiny_inputs(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".molora_router." in name for name in moved)


@pytest.mark.proves("lora_mixer", "lora_mixer_router")
@pytest.mark.parametrize(("num", "same"), [(3, True), (4, False)])
def test_training_is_soft_and_inference_keeps_the_best_three(num, same):
    model = shaken("lora_mixer", experts={"num": num})
    inputs = tiny_inputs(model)
    with torch.no_grad():
        inference = model(**inputs).logits
    with molora.record(model) as log:
        training = model.train()(**inputs).logits.detach()
    assert all(torch.equal(routing.gates, routing.probs) for routing in log.values())
    molora.drop_aux(model)
    assert torch.allclose(training, inference, atol=1e-3) == same


# --- Dirichlet prior and coupling, in a model -------------------------------------------------------------------------


@pytest.mark.proves("dirichlet_prior", "expert_router_coupling", "magnet", "remoe", "blockffn")
@pytest.mark.parametrize("recipe", ["dirichlet_prior", "expert_router_coupling", "magnet", "remoe", "blockffn"])
def test_the_auxiliary_loss_is_the_sum_of_its_losses_over_the_layers(recipe):
    model = shaken(recipe, target_modules=["q_proj", "down_proj"]).train()
    inputs = tiny_inputs(model)
    inputs["attention_mask"][0, 5:] = 0
    seen = []
    trace = trace_of(model)
    read_inputs = {}
    layers = routed_layers(model)
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, n=name: read_inputs.update({n: args[0].detach()}))
        for name, layer in layers.items()
    ]
    trace.readers.append(lambda site, routing, ctx: seen.append((site.name, routing.detach(), ctx)))
    torch.manual_seed(7)
    out = model(**inputs, labels=inputs["input_ids"])
    for hook in hooks:
        hook.remove()
    losses = [WeightedLoss(spec) for spec in molora.MoloraConfig.from_recipe(recipe).losses]
    total = 0.0
    torch.manual_seed(7)
    for name, routing, ctx in seen:
        parts = Parts(layers[name].molora_router["default"], read_inputs[name])
        total += sum(float(loss(routing, ctx, len(seen), parts)) for loss in losses)
    assert float(out.aux_loss) == pytest.approx(total, rel=1e-4) and len(seen) == 4
