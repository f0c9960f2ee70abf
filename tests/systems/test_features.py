"""Systems that differ in what routers read and where their weights come from, against plain loops and torch.nn."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

import molora
from molora.control import routed_layers
from molora.errors import RoutingError
from molora.experts.bank import ExpertBank
from molora.routing.hyper import Hyper
from molora.routing.losses import Parts
from molora.routing.router import Router
from molora.routing.types import Context, Memory
from tests.tiny import tiny_bert_classifier, tiny_inputs, tiny_llama, tiny_t5


def shaken(recipe, base=tiny_llama, spread=0.2, **changes):
    """A base wrapped by a recipe, with random weights in everything that can be trained or is frozen at random."""
    model = molora.wrap(base(), recipe, **changes).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    return model


def leaders(model):
    """(path, layer, router) of the layers that take decisions, in order."""
    return [
        (path, layer, layer.molora_router["default"])
        for path, layer in routed_layers(model).items()
        if "default" in layer.molora_router
    ]


def run(model, **inputs):
    """Run the model; return its logits, the input (B, S, d) of each layer, and the decisions by layer."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _, args, out, path=path: seen.update({path: args[0]}))
        for path, layer in routed_layers(model).items()
    ]
    with torch.no_grad(), molora.record(model) as log:
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return logits, seen, log


def padded_inputs(model):
    inputs = tiny_inputs(model, batch=2, length=6)
    inputs["attention_mask"][0, :2] = 0
    return inputs


def softmax(values):
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def best(values, k):
    return sorted(range(len(values)), key=lambda e: -values[e])[:k]


def top_two_gates(scores):
    """Renormalised top-2 of a softmax, by hand."""
    p = softmax(scores)
    chosen = best(p, 2)
    total = sum(p[e] for e in chosen)
    return [p[e] / total if e in chosen else 0.0 for e in range(len(p))]


def close(actual, expected, atol=2e-5):
    torch.testing.assert_close(
        torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), atol=atol, rtol=1e-4
    )


def real(inputs):
    """(row, token) of the tokens that are no padding."""
    return [(b, t) for b, t in inputs["attention_mask"].nonzero().tolist()]


def beams(model, cached, inputs):
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=7, min_new_tokens=7, num_beams=3, do_sample=False, use_cache=cached)


# --- RMoE -------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("rmoe")
@pytest.mark.parametrize("base", [tiny_llama, tiny_t5])
def test_rmoe_carries_one_gru_cell_of_torch_through_the_depth(base):
    model = shaken("rmoe", base, feature={"size": 5})
    inputs = tiny_inputs(model, batch=2, length=6)
    _, seen, log = run(model, **inputs)
    found = leaders(model)
    cell = nn.GRUCell(5, 5)
    cell.load_state_dict(found[0][2].feature[0].cell.state_dict())
    states, compared = {}, 0
    for path, layer, router in found:
        stack = layer.sites["default"].stack
        feature = router.feature[0]
        assert feature.cell is found[0][2].feature[0].cell
        h = states.get(stack, torch.zeros(*seen[path].shape[:2], 5))
        new = torch.empty_like(h)
        for b in range(h.shape[0]):
            for t in range(h.shape[1]):
                new[b, t] = cell((feature.project.weight @ seen[path][b, t])[None], h[b, t][None])[0]
                close(log[path].gates[b, t], top_two_gates((router.scorer.weight @ new[b, t]).tolist()))
                compared += 1
        states[stack] = new.detach()
    assert compared == 12 * len(found) and len(found) == (2 if base is tiny_llama else 6)


@pytest.mark.proves("rmoe")
def test_rmoe_has_its_gradient_through_the_layers_and_one_cell_in_the_file():
    model = shaken("rmoe").train()
    for layer in routed_layers(model).values():
        layer.molora_bank["default"].Bt.data.zero_()  # experts that do nothing: only h joins the layers
    inputs = tiny_inputs(model)
    first, last = (router for _, _, router in leaders(model))
    kept = {}

    def keep(_, args, routing):
        kept["gates"] = routing.gates

    last.register_forward_hook(keep)
    model(**inputs)
    molora.drop_aux(model)
    (kept["gates"] * torch.randn_like(kept["gates"])).sum().backward()
    assert first.feature[0].project.weight.grad.abs().max() > 0, "no gradient crosses the layers"
    assert first.scorer.weight.grad is None or first.scorer.weight.grad.eq(0).all()
    cells = {key for key in model.state_dict() if ".cell." in key}
    assert len(cells) == 4 and all("layers.0." in key for key in cells)


@pytest.mark.proves("rmoe")
def test_rmoe_is_exact_under_checkpointing_and_refuses_the_reentrant_kind():
    grads = []
    for checkpointing in (None, False, True):
        model = shaken("rmoe", lambda: tiny_llama(num_hidden_layers=3)).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        inputs = tiny_inputs(model)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        if checkpointing:
            with pytest.raises(RoutingError, match=r'reentrant checkpoint.*"use_reentrant": False'):
                loss.backward()
            continue
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = grads
    assert plain.keys() == recomputed.keys() and any(".cell." in name for name in plain)
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], atol=1e-7, rtol=1e-5)


@pytest.mark.proves("rmoe")
def test_rmoe_routes_tokens_apart_from_one_another():
    routers = []
    torch.manual_seed(1)
    owner = None
    for place in (("a", None), ("b", "a")):
        router = Router(6, 4, feature={"name": "gru", "size": 3}, place=_place(*place)).eval()
        if owner is None:
            owner = router
        else:
            router.feature[0].borrow(owner.feature[0])
        routers.append(router)
    x, order = torch.randn(2, 5, 6), torch.randperm(5)

    def scores(x):
        ctx = Context(memory=Memory())
        return [router(x + level, ctx).scores for level, router in enumerate(routers)]

    for before, after in zip(scores(x), scores(x[:, order]), strict=True):
        torch.testing.assert_close(after, before[:, order])
    alone = routers[1](x + 1, Context(memory=Memory())).scores
    assert not torch.allclose(alone, scores(x)[1]), "the second router does not read the first"


def _place(name, before):
    from molora.routing.features import Place

    return Place(name, before)


# --- weights: shared, made, frozen ------------------------------------------------------------------------------------


@pytest.mark.proves("omni_router")
def test_omni_router_is_one_matrix_per_width_whose_gradient_is_the_sum_over_layers():
    one = shaken("omni_router").train()
    matrices = {id(router.scorer.weight): router.scorer.weight for _, _, router in leaders(one)}
    assert sorted(w.shape[1] for w in matrices.values()) == [32, 48]
    assert len([n for n, _ in one.named_parameters() if "scorer" in n]) == 2
    many = molora.wrap(tiny_llama(), "omni_router", weights="own").train()
    for (_, layer, router), (_, twin, other) in zip(leaders(one), leaders(many), strict=True):
        other.scorer.weight.data.copy_(router.scorer.weight.data)
        twin.molora_bank["default"].load_state_dict(layer.molora_bank["default"].state_dict())
    inputs = tiny_inputs(one)
    for model in (one, many):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for width in (32, 48):
        parts = [router.scorer.weight.grad for _, _, router in leaders(many) if router.scorer.weight.shape[1] == width]
        whole = next(w.grad for w in matrices.values() if w.shape[1] == width)
        assert len(parts) == (12 if width == 32 else 2) and whole.abs().max() > 0
        torch.testing.assert_close(whole, torch.stack(parts).sum(0), atol=1e-6, rtol=1e-4)


@pytest.mark.proves("omni_router")
def test_omni_router_decides_in_each_layer_by_its_own_input():
    model = shaken("omni_router")
    inputs = padded_inputs(model)
    _, seen, log = run(model, **inputs)
    choices = []
    for path, _, router in leaders(model):
        for b, t in real(inputs):
            p = softmax((router.scorer.weight @ seen[path][b, t]).tolist())
            e = best(p, 1)[0]
            close(log[path].gates[b, t], [p[e] if i == e else 0.0 for i in range(8)])
        choices.append(log[path].gates.argmax(-1))
    assert any(not torch.equal(choices[0], other) for other in choices[1:])


@pytest.mark.proves("hyper_router")
def test_hyper_router_equals_its_network_and_its_folded_form():
    model = shaken("hyper_router", spread=1.0)
    molora.set_progress(model, 0.0)  # k = 2
    inputs = padded_inputs(model)
    _, seen, log = run(model, **inputs)
    for path, _, router in leaders(model):
        s, d = router.scorer, seen[path].shape[-1]
        inner = (s.inner_weight @ s.embedding.detach() + s.inner_bias).clamp_min(0)
        made = (s.outer_weight @ inner + s.outer_bias).view(16, d + 1)
        for b, t in real(inputs):
            scores = [float(made[e, :d] @ seen[path][b, t] + made[e, d]) for e in range(16)]
            close(log[path].gates[b, t], top_two_gates(scores))
    before = log
    for _, _, router in leaders(model):
        router.scorer = router.scorer.fold()
    _, _, after = run(model, **inputs)
    for path, _, _ in leaders(model):
        torch.testing.assert_close(after[path].gates, before[path].gates, atol=1e-6, rtol=1e-5)


@pytest.mark.proves("hyper_router")
def test_hyper_router_starts_with_scores_as_wide_as_the_authors():
    # hidden: E relu(n)^2 = 1/6 at n ~ N(0, 1/3); outer weights and biases: uniform, of variance 1 / (3 h)
    torch.manual_seed(0)
    d, h = 128, 256
    made = torch.stack([Hyper(d, 16, hidden=h).made()[0].detach() for _ in range(50)])
    assert float((made**2).mean()) == pytest.approx(1 / 18 + 1 / (3 * h), rel=0.05)


@pytest.mark.proves("hyper_router")
def test_hyper_router_trains_nothing_but_the_embedding():
    model = shaken("hyper_router").train()
    molora.set_progress(model, 0.5)
    frozen = {key: value.clone() for key, value in model.state_dict().items() if "er_weight" in key or "er_bias" in key}
    inputs = tiny_inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name for name, p in model.named_parameters() if "router" in name and p.grad is not None}
    assert trained and all(name.endswith("scorer.embedding") for name in trained)
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name in trained)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert len(frozen) == 8 and all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())


@pytest.mark.proves("smoe_dropout", "hyper_router")
@pytest.mark.parametrize("recipe", ["smoe_dropout", "hyper_router"])
def test_the_number_of_experts_grows_from_2_to_16(recipe):
    model = shaken(recipe)
    inputs, counts = tiny_inputs(model), []
    for step in (0, 1, 7, 13, 14):
        molora.set_progress(model, step / 14)
        _, _, log = run(model, **inputs)
        used = {int(n) for routing in log.values() for n in routing.selected.sum(-1).unique()}
        assert used == {2 + step}
        counts.append(used.pop())
        for routing in log.values():  # a softmax over the selected scores
            masked = routing.scores.masked_fill(~routing.selected, -torch.inf)
            torch.testing.assert_close(routing.gates, torch.softmax(masked, -1), atol=1e-6, rtol=1e-5)
    assert counts == [2, 3, 9, 15, 16]


@pytest.mark.proves("smoe_dropout")
def test_smoe_dropout_never_trains_its_router_and_saves_it(tmp_path):
    model = molora.wrap(tiny_llama(), "smoe_dropout").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "scorer" in name}
    assert len(before) == 14 and not any(p.requires_grad for n, p in model.named_parameters() if "scorer" in n)
    molora.set_progress(model, 0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    inputs = tiny_inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    model.set_adapter("default")  # PEFT switches everything on again
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) and not after[name].requires_grad for name, value in before.items())
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = [value for key, value in load_file(tmp_path / "adapter_model.safetensors").items() if "scorer" in key]
    assert len(saved) == 14 and all(any(torch.equal(v, w) for w in before.values()) for v in saved)


# --- scorers ----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("yuan_attention")
def test_yuan_equals_its_equation_token_by_token():
    model = shaken("yuan_attention")
    inputs = padded_inputs(model)
    _, seen, log = run(model, **inputs)
    for path, _, router in leaders(model)[:5]:
        s = router.scorer
        for b, t in real(inputs):
            q, k, v = ((w @ seen[path][b, t]).tolist() for w in (s.query, s.key, s.value))
            z = [sum(a * c for a, c in zip(softmax([q[i] * kj for kj in k]), v, strict=True)) for i in range(8)]
            assert min(v) - 1e-5 <= min(z) and max(z) <= max(v) + 1e-5
            close(log[path].scores[b, t], z)
            close(log[path].gates[b, t], top_two_gates(z))


@pytest.mark.proves("yuan_attention")
def test_yuan_corner_cases():
    x = torch.randn(2, 3, 6)
    router = Router(6, 4, scorer="attention").eval()
    router.scorer.query.data.zero_()
    value = F.linear(x, router.scorer.value)
    torch.testing.assert_close(router(x, Context()).scores, value.mean(-1, keepdim=True).expand(-1, -1, 4))
    one = Router(6, 1, scorer="attention").eval()
    torch.testing.assert_close(one(x, Context()).scores, F.linear(x, one.scorer.value))  # E = 1: z = v
    assert sum(p.numel() for p in router.parameters()) == 3 * 4 * 6


@pytest.mark.proves("promoe")
def test_promoe_gives_tokens_to_the_nearest_prototype():
    model = shaken("promoe")
    inputs = padded_inputs(model)
    _, seen, log = run(model, **inputs)
    negative = 0
    for path, _, router in leaders(model)[:5]:
        for b, t in real(inputs):
            x = seen[path][b, t]
            z = [float(x @ m / x.norm() / m.norm()) for m in router.scorer.weight]
            e = best(z, 1)[0]
            close(log[path].gates[b, t], [z[e] if i == e else 0.0 for i in range(8)])
            close(log[path].always[b, t], [1.0])
            negative += z[e] < 0
        torch.testing.assert_close(router(5 * seen[path], Context()).scores, log[path].scores, atol=1e-6, rtol=1e-5)
    assert negative == 0  # the largest of eight cosines


@pytest.mark.proves("promoe")
def test_promoe_pins_labelled_tokens_to_their_expert():
    model = shaken("promoe").train()
    inputs = tiny_inputs(model)
    labels = torch.full_like(inputs["input_ids"], -1)
    labels[0] = 5
    with molora.record(model) as log:
        model(**inputs, expert_ids=labels)
    molora.drop_aux(model)
    for routing in log.values():
        assert routing.gates[0].eq(F.one_hot(torch.tensor(5), 8)).all()
        assert not routing.gates[1].eq(F.one_hot(torch.tensor(5), 8)).all()


@pytest.mark.proves("promoe")
def test_the_contrast_of_promoe_against_plain_loops():
    model = shaken("promoe")
    inputs = padded_inputs(model)
    _, seen, log = run(model, **inputs)
    path, _, router = leaders(model)[0]
    from molora.routing.contrastive import prototype_contrast

    ctx = Context(valid=inputs["attention_mask"].bool())
    loss = prototype_contrast(log[path], ctx, parts=Parts(router, seen[path]))
    chosen = {}
    for b, t in real(inputs):
        chosen.setdefault(int(log[path].gates[b, t].argmax()), []).append(seen[path][b, t])
    centres = {e: torch.stack(tokens).mean(0) for e, tokens in chosen.items()}
    terms = []
    for e in centres:
        m = router.scorer.weight[e]
        alike = {f: float(m @ c / m.norm() / c.norm()) / 0.07 for f, c in centres.items()}
        terms.append(-math.log(math.exp(alike[e]) / sum(math.exp(v) for v in alike.values())))
    assert len(terms) > 1
    close(loss, sum(terms) / len(terms), atol=1e-4)


# --- similarity and attention -----------------------------------------------------------------------------------------


@pytest.mark.proves("similarity_aware")
@pytest.mark.parametrize("base", [tiny_llama, tiny_bert_classifier])
def test_similarity_aware_equals_its_equation(base):
    model = shaken("similarity_aware", base)
    inputs = padded_inputs(model)
    _, seen, log = run(model, **inputs)
    valid, causal = inputs["attention_mask"], base is tiny_llama
    compared = 0
    for path, _, router in leaders(model)[:4]:
        x = seen[path]
        for b, t in real(inputs):
            past = [s for s in range(6) if valid[b, s] and (s <= t or not causal)]
            a = softmax([float(x[b, t] @ x[b, s] / x[b, t].norm() / x[b, s].norm()) / 0.1 for s in past])
            # scores mixed, not states: for a linear router the same
            z = sum(w * (router.scorer.weight @ x[b, s]) for w, s in zip(a, past, strict=True))
            close(log[path].scores[b, t], z.detach())
            close(log[path].gates[b, t], top_two_gates(z.tolist()))
            compared += len(past) > 1
    assert compared > 20


@pytest.mark.proves("similarity_aware")
def test_similarity_aware_is_the_plain_router_when_nothing_is_alike():
    x, ctx = torch.randn(2, 5, 6), Context()
    plain = Router(6, 4).eval()
    for options in ({"temperature": 1e-4}, {"measure": "dot", "temperature": 1e-4}):
        scaled = 3 * F.normalize(x, dim=-1)  # dot: the token itself is the most alike
        router = Router(6, 4, feature={"name": "similarity", **options}).eval()
        router.scorer.load_state_dict(plain.scorer.state_dict())
        torch.testing.assert_close(router(scaled, ctx).scores, plain(scaled, ctx).scores, atol=1e-5, rtol=1e-4)
    same = x[:, :1].expand(-1, 5, -1)  # all alike: every mean is the token itself
    router = Router(6, 4, feature="similarity").eval()
    router.scorer.load_state_dict(plain.scorer.state_dict())
    torch.testing.assert_close(router(same, ctx).scores, plain(same, ctx).scores)


@pytest.mark.proves("similarity_aware", "attention_aware")
@pytest.mark.parametrize("recipe", ["similarity_aware", "attention_aware"])
@pytest.mark.parametrize("base", [tiny_llama, tiny_t5])
def test_past_tokens_follow_the_cache_through_beam_search(recipe, base):
    model = shaken(recipe, base, spread=0.3)
    inputs = padded_inputs(model)
    inputs.pop("labels", None)
    with_cache, without = beams(model, True, inputs), beams(model, False, inputs)
    assert torch.equal(with_cache, without)
    assert len({tuple(row) for row in with_cache.tolist()}) == 2


@pytest.mark.proves("similarity_aware")
@torch.no_grad()
def test_a_cache_that_changed_elsewhere_is_refused():
    import copy

    model = shaken("similarity_aware")
    ids = tiny_inputs(model)["input_ids"]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    copied.reorder_cache(torch.tensor([1, 0]))  # a copy goes its own way
    with pytest.raises(RoutingError, match="copied or foreign cache"):
        model(input_ids=ids[:, :1], past_key_values=copied)
    whole = model(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1]
    step = model(input_ids=ids[:, :1], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)
    cache.crop(-2)
    with pytest.raises(RoutingError, match="run the prompt again"):
        model(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.proves("attention_aware")
@pytest.mark.parametrize("base", [tiny_llama, tiny_t5, tiny_bert_classifier])
def test_attention_aware_mixes_by_the_attention_of_its_block(base):
    model = shaken("attention_aware", base)
    inputs = padded_inputs(model)
    _, seen, log = run(model, **inputs)
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    decoder, encoder = (
        (out.decoder_attentions, out.encoder_attentions) if base is tiny_t5 else (out.attentions, out.attentions)
    )
    mixed = 0
    for path, layer, router in leaders(model):
        stack = layer.sites["default"].stack
        inside = "self_attn" in path or "SelfAttention" in path or "attention.self" in path  # q, k, v, o
        number = next((int(s) for s in path.split(".") if s.isdigit()), None)
        x, a = seen[path], None
        if number is not None and not inside and stack != "cross":
            a = (encoder if stack == "encoder" else decoder)[number].mean(1)
        mixed += a is not None
        for b in range(x.shape[0]):
            for t in range(x.shape[1] if x.dim() == 3 else 1):
                if x.dim() == 3 and base is not tiny_t5 and not inputs["attention_mask"][b, t]:
                    continue
                own = x[b, t] if x.dim() == 3 else x[b]
                own = own if a is None else sum(float(a[b, t, s]) * x[b, s] for s in range(x.shape[1]))
                gates = log[path].gates[b, t]
                close(gates, top_two_gates((router.scorer.weight @ own).tolist()), atol=1e-4)
    assert mixed >= 4


@pytest.mark.proves("attention_aware")
def test_attention_aware_with_attention_to_itself_is_the_plain_router():
    from molora.routing.features import Place
    from molora.routing.mixing import attention_key

    router = Router(6, 4, feature="attention", place=Place("here", None, block="block")).eval()
    plain = Router(6, 4).eval()
    plain.scorer.load_state_dict(router.scorer.state_dict())
    x = torch.randn(2, 5, 6)

    def scores(attention):
        memory = Memory()
        if attention is not None:
            memory.now[attention_key("block")] = attention
        return router(x, Context(memory=memory)).scores

    eye, even = torch.eye(5).expand(2, 5, 5), torch.ones(5, 5).tril()
    even = (even / even.sum(-1, keepdim=True)).expand(2, 5, 5)
    torch.testing.assert_close(scores(eye), plain(x, Context()).scores)
    torch.testing.assert_close(scores(None), plain(x, Context()).scores)
    means = x.cumsum(1) / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(scores(even), plain(means, Context()).scores)


@pytest.mark.proves("attention_aware", "similarity_aware", "rmoe")
@pytest.mark.parametrize("recipe", ["attention_aware", "similarity_aware", "rmoe"])
@torch.no_grad()
def test_an_encoder_that_runs_before_its_model_routes_as_inside_of_it(recipe):
    model = shaken(recipe, tiny_t5, spread=0.3)
    inputs = padded_inputs(model)
    inside = model(**inputs).encoder_last_hidden_state
    for _ in range(2):  # generate() runs it so, once per batch
        outside = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        torch.testing.assert_close(outside, inside, atol=1e-6, rtol=1e-5)


@pytest.mark.proves("attention_aware")
def test_attention_aware_switches_to_eager_and_refuses_models_that_keep_their_weights():
    model = molora.wrap(tiny_llama(), "attention_aware")
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        torch.testing.assert_close(
            model(**tiny_inputs(model)).logits, tiny_llama()(**tiny_inputs(model)).logits, atol=1e-5, rtol=1e-5
        )
    model.config._attn_implementation = "sdpa"
    with pytest.raises(RoutingError, match=r"attention weights of LlamaAttention.*eager"):
        model(**tiny_inputs(model))
    model.add_adapter("plain", molora.MoloraConfig(experts={"num": 2, "rank": 2}))
    model.delete_adapter("default")
    model.set_adapter("plain")
    model(**tiny_inputs(model))  # nobody asks for the weights any more


# --- told from outside ------------------------------------------------------------------------------------------------


@pytest.mark.proves("speech_moe", "speech_moe2")
@pytest.mark.parametrize("recipe", ["speech_moe", "speech_moe2"])
def test_the_router_reads_the_embedding_beside_the_state(recipe):
    model = shaken(recipe)
    size = {"speech_moe": 64, "speech_moe2": 128}[recipe]
    inputs = padded_inputs(model)
    for shape in ((2, size), (2, 6, size)):
        extra = torch.randn(shape)
        _, seen, log = run(model, **inputs, router_extra=extra)
        for path, _, router in leaders(model)[:3]:
            for b, t in real(inputs):
                e = extra[b] if extra.dim() == 2 else extra[b, t]
                p = softmax((router.scorer.weight @ torch.cat([seen[path][b, t], e])).tolist())
                top = best(p, 1)[0]
                close(log[path].gates[b, t], [p[top] if i == top else 0.0 for i in range(8)])


@pytest.mark.proves("speech_moe", "speech_moe2")
@torch.no_grad()
def test_zero_columns_make_the_simpler_router():
    extra = torch.randn(2, 128)
    plain = shaken("speech_moe", feature=None)
    one, two = molora.wrap(tiny_llama(), "speech_moe").eval(), molora.wrap(tiny_llama(), "speech_moe2").eval()
    inputs = tiny_inputs(plain)

    def copy_into(model, source, columns):
        for (_, layer, router), (_, other, other_router) in zip(leaders(model), leaders(source), strict=True):
            layer.molora_bank["default"].load_state_dict(other.molora_bank["default"].state_dict())
            weight = other_router.scorer.weight
            router.scorer.weight.zero_()
            router.scorer.weight[:, : weight.shape[1]] = weight
            assert router.scorer.weight.shape[1] - weight.shape[1] == columns

    copy_into(one, plain, 64)
    expected = plain(**inputs).logits
    torch.testing.assert_close(one(**inputs, router_extra=extra[:, :64]).logits, expected, atol=1e-6, rtol=1e-6)
    for _, _, router in leaders(one):
        router.scorer.weight[:, -64:].normal_()
    copy_into(two, one, 64)  # domain and accent unread: SpeechMoE
    expected = one(**inputs, router_extra=extra[:, :64]).logits
    torch.testing.assert_close(two(**inputs, router_extra=extra).logits, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.proves("speech_moe", "speech_moe2")
def test_the_embedding_gets_a_gradient_and_is_asked_for():
    model = shaken("speech_moe").train()
    inputs = tiny_inputs(model)
    with pytest.raises(RoutingError, match=r"needs 64 numbers per row.*router_extra=\(B, m\)"):
        model(**inputs)
    with pytest.raises(RoutingError, match="has size 64, but router_extra holds 3"):
        model(**inputs, router_extra=torch.randn(2, 3))
    extra = torch.randn(2, 64, requires_grad=True)
    model(**inputs, labels=inputs["input_ids"], router_extra=extra).loss.backward()
    assert extra.grad.abs().max() > 0


# --- decisions of a whole prompt --------------------------------------------------------------------------------------


@pytest.mark.proves("scope")
def test_scope_decides_by_prompt_tokens_that_attend_to_shared_features():
    model = shaken("scope", pool={"features": 3, "width": 4})
    inputs = padded_inputs(model)
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    _, seen, log = run(model, **inputs, labels=labels)
    for path, _, router in leaders(model):
        pool, x = router.pool, seen[path]
        for b in range(2):
            inside = [t for t in range(4) if inputs["attention_mask"][b, t]]
            pooled = 0
            for t in inside:
                a = softmax([float((pool.query.weight @ x[b, t]) @ key) / 2 for key in pool.key])
                pooled = pooled + sum(w * v for w, v in zip(a, pool.value, strict=True)) / len(inside)
            p = softmax((router.scorer.weight @ pooled).tolist())
            e = best(p, 1)[0]
            close(log[path].gates[b, 0], [p[e] if i == e else 0.0 for i in range(8)])
            close(log[path].always[b, 0], [1.0])


@pytest.mark.proves("scope", "mixture_of_states")
@pytest.mark.parametrize("recipe", ["scope", "mixture_of_states"])
def test_the_decision_of_a_prompt_is_blind_to_the_answer_and_kept(recipe):
    model = shaken(recipe)
    inputs = tiny_inputs(model)
    labels, other = inputs["input_ids"].clone(), inputs["input_ids"].clone()
    labels[:, :4] = -100
    other[:, 4:] = (other[:, 4:] + 7) % 90 + 4
    _, _, before = run(model, input_ids=inputs["input_ids"], labels=labels)
    _, _, after = run(model, input_ids=other, labels=labels)
    first = next(iter(before))
    torch.testing.assert_close(after[first].gates, before[first].gates)
    counts = []
    handle = leaders(model)[0][2].register_forward_hook(lambda *_: counts.append(1))
    model.generate(inputs["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    handle.remove()
    assert len(counts) == 1, "the decision was taken again while decoding"
    _, _, again = run(model, input_ids=inputs["input_ids"][:, :4])
    torch.testing.assert_close(again[first].gates, before[first].gates)


@pytest.mark.proves("scope")
def test_the_entropies_of_scope_are_least_when_rows_decide_and_differ():
    from molora.config import MoloraConfig
    from molora.routing.types import Routing
    from molora.routing.weighted import WeightedLoss

    weighted = [WeightedLoss(spec) for spec in MoloraConfig.from_recipe("scope").losses]

    def value(probs):
        return float(sum(loss(Routing(probs, probs, probs), Context(), 1) for loss in weighted))

    spread, even = torch.eye(8)[:, None], torch.full((8, 1, 8), 1 / 8)
    collapsed = torch.eye(8)[:1].expand(8, -1)[:, None]
    assert value(spread) == pytest.approx(-0.01, abs=1e-6)  # 0.01 (0 - 1)
    assert value(even) == pytest.approx(0.0, abs=1e-6) and value(collapsed) == pytest.approx(0.0, abs=1e-6)
    random = [value(torch.softmax(3 * torch.randn(8, 1, 8), -1)) for _ in range(50)]
    assert min(random) > value(spread) and max(random) < 1e-6  # -0.01 times a mutual information


@pytest.mark.proves("mixture_of_states")
def test_mixture_of_states_decides_for_all_layers_at_once_each_on_its_own():
    model = shaken("mixture_of_states", spread=0.4)
    inputs = padded_inputs(model)
    ((path, _, router),) = leaders(model)
    n = len(routed_layers(model))
    assert n == 14 and router.scorer.weight.shape == (n * 8, 64)
    used = {}
    decide = model.base_model.trace.decide

    def spy(site, router, x):
        gates = decide(site, router, x)
        used[site.name] = gates
        return gates

    model.base_model.trace.decide = spy
    _, seen, _ = run(model, **inputs)
    del model.base_model.trace.decide
    valid = inputs["attention_mask"].bool()
    block = nn.TransformerEncoderLayer(64, 4, 256, 0.0, F.gelu, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False).eval()
    encoder.layers.load_state_dict(router.pool.blocks.state_dict())
    with torch.no_grad():
        rows = [
            encoder(router.pool.project(seen[path][b, valid[b]])[None])[0].mean(0) for b in range(2)
        ]  # without padding
        scores = torch.stack([router.scorer.weight @ row for row in rows]).view(2, n, 8)
    sets = set()
    for number, site in enumerate(routed_layers(model)):
        assert used[site].shape == (2, 1, 8)
        for b in range(2):
            close(used[site][b, 0], top_two_gates(scores[b, number].tolist()))
            sets.add(tuple(sorted(best(scores[b, number].tolist(), 2))))
    assert len(sets) > 5


@pytest.mark.proves("mixture_of_states")
@torch.no_grad()
def test_mixture_of_states_with_equal_rows_is_one_decision_for_the_model():
    many = shaken("mixture_of_states")
    one = shaken("mixture_of_states", per_site=False)
    for layer, twin in zip(routed_layers(many).values(), routed_layers(one).values(), strict=True):
        layer.molora_bank["default"].load_state_dict(twin.molora_bank["default"].state_dict())
    ((_, _, router),), ((_, _, single),) = leaders(many), leaders(one)
    router.pool.load_state_dict(single.pool.state_dict())
    router.scorer.weight.copy_(single.scorer.weight.repeat(14, 1))
    inputs = padded_inputs(many)
    torch.testing.assert_close(many(**inputs).logits, one(**inputs).logits, atol=1e-6, rtol=1e-6)
    router.scorer.weight[8:16].neg_()
    assert not torch.allclose(many(**inputs).logits, one(**inputs).logits, atol=1e-4)


# --- constant gates, and gates per task -------------------------------------------------------------------------------


@pytest.mark.proves("feature_gates")
def test_feature_gates_are_b_diag_a_and_merge_into_the_base():
    model = shaken("feature_gates")
    inputs = tiny_inputs(model)
    logits, _, _ = run(model, **inputs)
    for _, layer, router in leaders(model):
        bank = layer.molora_bank["default"]
        gate = [1 / (1 + math.exp(-float(w))) for w in router.scorer.weight]
        assert len(gate) == 8
        delta = 2.0 * sum(g * torch.outer(bank.B[:, r], bank.A[r]) for r, g in enumerate(gate))
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, atol=1e-6, rtol=1e-5)
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
    fresh = molora.wrap(tiny_llama(), "feature_gates")
    for _, _, router in leaders(fresh):
        assert router(torch.randn(1, 1, router.scorer.num_experts), Context()).gates.eq(0.5).all()


@pytest.mark.proves("home")
def test_home_equals_its_equation():
    model = shaken("home")
    inputs = padded_inputs(model)
    tasks = torch.tensor([1, 2])
    _, seen, log = run(model, **inputs, task_ids=tasks)
    outputs = {}
    paths = list(routed_layers(model))[:3]
    for path in paths:
        layer = routed_layers(model)[path]
        bank, router = layer.molora_bank["default"], layer.molora_router["default"]
        A, B = bank.A.view(8, 8, -1), bank.Bt.view(8, 8, -1)
        U, V = bank.U.view(8, 4, -1), bank.V.view(8, 4, -1)
        x = seen[path]
        outputs[path] = bank(x, log[path].gates)
        for b, t in real(inputs):
            task = int(tasks[b])
            z = (router.scorer.weight[task] @ x[b, t]).tolist()
            mix = [[0, 1, 2], [0, 1, 2], [0, 1, 3], [0, 1, 3]][task]
            shares = dict(zip(mix, softmax([z[e] for e in mix]), strict=True))
            shares[4 + task] = 1 / (1 + math.exp(-z[4 + task]))
            close(log[path].gates[b, t], [shares.get(e, 0.0) for e in range(8)])
            y = 0
            for e, g in shares.items():
                hidden = A[e] @ (x[b, t] * 2 * torch.sigmoid((U[e] @ x[b, t]) @ V[e]))
                hidden = hidden / (hidden.square().mean() + torch.finfo(torch.float32).eps).sqrt()
                y = y + 16 / 8 * g * hidden @ B[e]
            close(outputs[path][b, t], y.detach(), atol=1e-4)


@pytest.mark.proves("home")
def test_home_without_gates_norm_and_tasks_is_a_plain_mixture():
    from molora.experts.gated import Gated

    x, gates = torch.randn(2, 3, 6), torch.rand(2, 3, 4)
    form = Gated(6, 5, [2] * 4, form="gated", scaling=0.7, gate_rank=3)
    bank = ExpertBank(6, 5, [2] * 4, scaling=0.7)
    form.Bt.data.normal_()
    bank.A.data.copy_(form.A.data)
    bank.Bt.data.copy_(form.Bt.data)
    torch.testing.assert_close(form(x, gates), bank(x, gates))  # V = 0: every gate is 1
    allowed = [[0, 1, 2, 3]]
    masked = Router(6, 4, selector={"name": "task_mask", "allowed": allowed}).eval()
    plain = Router(6, 4).eval()
    plain.scorer.load_state_dict(masked.scorer.state_dict())
    for task in (0, -1):
        routing = masked(x, Context(task_ids=torch.tensor([task, task])))
        torch.testing.assert_close(routing.gates, plain(x, Context()).gates)


# --- one expert -------------------------------------------------------------------------------------------------------


@pytest.mark.proves(
    "attention_aware",
    "hyper_router",
    "mixture_of_states",
    "omni_router",
    "rmoe",
    "scope",
    "similarity_aware",
    "smoe_dropout",
    "yuan_attention",
)
@pytest.mark.parametrize(
    "recipe",
    [
        "attention_aware",
        "hyper_router",
        "mixture_of_states",
        "omni_router",
        "rmoe",
        "scope",
        "similarity_aware",
        "smoe_dropout",
        "yuan_attention",
    ],
)
@torch.no_grad()
def test_one_expert_is_the_lora_of_peft(recipe):
    model = shaken(recipe, experts={"num": 1, "shared": 0}, target_modules=["q_proj", "up_proj"])
    bank = next(iter(routed_layers(model).values())).molora_bank["default"]
    rank = bank.ranks[0]
    config = LoraConfig(r=rank, lora_alpha=bank.scaling * rank, target_modules=["q_proj", "up_proj"])
    reference = get_peft_model(tiny_llama(), config).eval()
    for path, layer in routed_layers(model).items():
        twin, (A, B) = reference.base_model.model.get_submodule(path), layer.molora_bank["default"].pair(0)
        twin.lora_A["default"].weight.copy_(A)
        twin.lora_B["default"].weight.copy_(B)
    inputs = padded_inputs(model)
    valid = inputs["attention_mask"].bool()
    expected = reference(**inputs).logits[valid]
    assert (expected - tiny_llama()(**inputs).logits[valid]).abs().max() > 1e-3
    torch.testing.assert_close(model(**inputs).logits[valid], expected, atol=1e-5, rtol=1e-5)
