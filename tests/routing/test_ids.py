"""Routers by token id, by chance, and by a light router that was taught: tables, draws, stages and errors."""

import pytest
import torch
from torch.nn import functional as F

import molora
from molora.errors import ConfigError, RoutingError
from molora.routing.features import Place
from molora.routing.ids import Distilled, Hash, Random, balance_hashes, balanced_bins, centred_balance, distillation
from molora.routing.losses import Parts
from molora.routing.router import Router
from molora.routing.types import Context, Memory, Routing
from tests.tiny import tiny_bert_classifier, tiny_inputs, tiny_llama, tiny_t5

V, D, E = 50, 8, 4


def by_ids(ids, **more):
    return Context(token_ids=ids, memory=Memory(), **more)


def hidden(ids):
    return torch.randn(*ids.shape, D)


# --- hash -------------------------------------------------------------------------------------------------------------


def test_table_is_the_seeded_uniform_draw():
    scorer = Hash(D, E, vocab_size=V)
    assert torch.equal(scorer.table[0].long(), torch.randint(E, (1, V), generator=torch.Generator().manual_seed(42))[0])
    assert torch.equal(scorer.table, Hash(D, E, place=Place(vocab=V)).table)
    assert not torch.equal(scorer.table, Hash(D, E, vocab_size=V, seed=7).table)
    assert list(scorer.parameters()) == [] and list(scorer.state_dict()) == ["table"]


@pytest.mark.parametrize("hashes", [1, 2, 4])
def test_an_id_has_the_same_experts_everywhere_with_weight_one(hashes):
    selector = {"name": "top_k", "k": hashes, "normalise": "sumk"}
    router = Router(D, E, scorer={"name": "hash", "vocab_size": V, "hashes": hashes}, selector=selector)
    ids = torch.randint(V, (3, 40))
    gates = router(hidden(ids), by_ids(ids)).gates
    seen = {}
    for token, row in zip(ids.flatten().tolist(), gates.flatten(0, 1).tolist(), strict=True):
        assert sorted(row) == [0.0] * (E - hashes) + [1.0] * hashes
        assert seen.setdefault(token, row) == row
        groups = torch.tensor(row).view(hashes, E // hashes)
        assert groups.sum(-1).tolist() == [1.0] * hashes  # one expert in every group
    assert torch.equal(router(10 * hidden(ids), by_ids(ids)).gates, gates)


def test_balanced_bins_are_never_heavier_than_the_mean_and_the_heaviest_id():
    counts = torch.distributions.Pareto(1.0, 1.2).sample((500,))  # words are as uneven as that
    table = balanced_bins(counts, 8)
    load = torch.zeros(8, dtype=torch.float64).index_add_(0, table, counts.double())
    assert load.max() <= load.mean() + counts.max()
    even = torch.zeros(8, dtype=torch.float64).index_add_(0, torch.randint(8, (500,)), counts.double())
    assert load.max() < even.max()
    assert balanced_bins([5, 4, 3, 2, 1, 1], 2).tolist() == [0, 1, 1, 0, 0, 1]


def test_balance_hashes_fills_the_tables_of_a_model():
    model = molora.wrap(tiny_llama(), "hash", scorer={"hashes": 2}, selector={"k": 2})
    counts = torch.arange(1.0, 97.0)
    balance_hashes(model, counts)
    tables = [m.table for m in model.modules() if isinstance(m, Hash)]
    assert tables
    for table in tables:
        load = torch.zeros(8, dtype=torch.float64).index_add_(0, table.flatten().long(), counts.double().repeat(2))
        assert load.max() <= counts.sum() / 4 + counts.max() and (load > 0).all()
        assert not torch.equal(table[0], table[1] - 4)
    with pytest.raises(ConfigError, match="one count per token id: 96, got 3"):
        balance_hashes(model, [1, 2, 3])
    with pytest.raises(ConfigError, match="no router with scorer: hash"):
        balance_hashes(molora.wrap(tiny_llama(), "molora"), counts)


@pytest.mark.parametrize("recipe", ["hash", "stable_moe"])
def test_embeddings_instead_of_ids_are_refused(recipe):
    model = molora.wrap(tiny_llama(), recipe).eval()
    embeds = model.get_input_embeddings()(tiny_inputs(model)["input_ids"])
    with pytest.raises(RoutingError, match="give the model input_ids instead of inputs_embeds"):
        model(inputs_embeds=embeds)


def test_ids_and_options_are_checked():
    router = Router(D, E, scorer={"name": "hash", "vocab_size": 10}, selector={"name": "top_k", "k": 1})
    ids = torch.tensor([[3, 11]])
    with pytest.raises(RoutingError, match="token id 11 is out of range: scorer 'hash' knows 10"):
        router(hidden(ids), by_ids(ids))
    with pytest.raises(ConfigError, match="needs vocab_size"):
        Router(D, E, scorer="hash")
    with pytest.raises(ConfigError, match="divide the 4 experts, got 3"):
        Hash(D, E, hashes=3, vocab_size=V)
    with pytest.raises(ConfigError, match="known: mean, token"):
        Random(D, E, evaluate="hash")
    with pytest.raises(ConfigError, match="0 <= switch <= 1"):
        Distilled(D, E, switch=2.0, vocab_size=V)


def test_every_stack_of_every_model_gets_its_ids():
    """Decoder ids made from labels, encoder ids for cross-attention, beams, and a pooled head."""
    model = molora.wrap(tiny_t5(), "hash", share="site").eval()
    tables = {m.table.tolist().__repr__() for m in model.modules() if isinstance(m, Hash)}
    assert len(tables) == 1
    table = next(m.table for m in model.modules() if isinstance(m, Hash))[0].long()
    inputs = tiny_inputs(model)
    with molora.record(model) as log:
        model(**inputs)
    decoder = model.get_base_model()._shift_right(inputs["labels"])
    for name, routing in log.items():
        ids = decoder if name.startswith("decoder") else inputs["input_ids"]
        if ".EncDecAttention.k" in name or ".EncDecAttention.v" in name:
            ids = inputs["input_ids"]
        assert torch.equal(routing.gates.argmax(-1), table[ids]), name
    del inputs["labels"]
    with molora.record(model) as log:
        model.generate(**inputs, num_beams=3, max_new_tokens=2, min_new_tokens=2)
    cross = next(routing for name, routing in log.items() if name.endswith("EncDecAttention.k"))
    assert torch.equal(cross.gates.argmax(-1), table[inputs["input_ids"].repeat_interleave(3, 0)])

    model = molora.wrap(tiny_bert_classifier(), "hash").eval()
    inputs = tiny_inputs(model)
    with molora.record(model) as log:
        model(**inputs)
    pooler = next(routing for name, routing in log.items() if "pooler" in name)
    assert torch.equal(pooler.gates.argmax(-1)[:, 0], table[inputs["input_ids"][:, 0]])


# --- random -----------------------------------------------------------------------------------------------------------


def test_one_uniform_expert_per_forward_for_the_whole_batch():
    router = Router(D, E, scorer="random", selector="softmax")
    x, counts = torch.randn(2, 3, D), torch.zeros(E)
    for seed in range(400):
        memory = Memory()
        memory.seed = seed
        gates = router(x, Context(training=True, memory=memory)).gates
        assert torch.equal(gates, gates[:1, :1].expand(2, 3, E)) and gates[0, 0].sort().values.tolist() == [0, 0, 0, 1]
        again = router(x, Context(training=True, memory=memory)).gates  # a checkpoint's recompute
        assert torch.equal(again, gates)
        counts += gates[0, 0]
    assert ((counts - 100).abs() < 35).all()  # 4 standard deviations


def test_evaluation_is_the_mean_of_all_experts_or_an_expert_per_id():
    x, ids = torch.randn(2, 30, D), torch.randint(V, (2, 30))
    mean = Router(D, E, scorer="random", selector="softmax")
    assert torch.equal(mean(x, Context()).gates, torch.full((2, 30, E), 1 / E))
    router = Router(D, E, scorer={"name": "random", "evaluate": "token"}, selector="softmax")
    gates = router(x, by_ids(ids)).gates
    seen = {}
    for token, e in zip(ids.flatten().tolist(), gates.argmax(-1).flatten().tolist(), strict=True):
        assert seen.setdefault(token, e) == e
    assert gates.amax(-1).eq(1).all() and len(set(seen.values())) == E


# --- distilled --------------------------------------------------------------------------------------------------------


def taught(**options):
    router = Router(
        D,
        E,
        scorer={"name": "distilled", "vocab_size": V, "width": 5, **options},
        link="sigmoid",
        selector={"name": "top_k", "k": 1, "normalise": "none"},
    )
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def choices(router, ids):
    scorer = router.scorer
    return (scorer.embedding[ids] @ scorer.light.t()).argmax(-1)


def test_who_decides_in_which_stage_and_the_weight_is_always_that_of_the_learned_router():
    router, ids = taught(), torch.randint(V, (2, 30))
    x = hidden(ids)
    learned = x @ router.scorer.weight.t()
    for training, progress, expected in (
        (True, 0.05, learned.argmax(-1)),
        (False, 0.05, choices(router, ids)),
        (True, 0.1, choices(router, ids)),
        (False, 1.0, choices(router, ids)),
    ):
        gates = router(x, by_ids(ids, training=training, progress=progress)).gates
        assert torch.equal((gates != 0).long().argmax(-1), expected) and ((gates != 0).sum(-1) == 1).all()
        torch.testing.assert_close(gates.amax(-1), torch.sigmoid(learned.gather(-1, expected[..., None])[..., 0]))


def test_routing_of_fixed_ids_is_constant_after_the_switch():
    """AdamW with momentum and weight decay would move a light router that still got gradients, even of zero."""
    router, ids = taught(), torch.randint(V, (2, 30))
    optimizer, x = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.1), hidden(ids)
    history = []
    for step in range(12):
        routing = router(x, by_ids(ids, training=True, progress=step / 60))
        loss = distillation(routing, Context(), parts=Parts(router, x)) + routing.gates.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weights = [router.scorer.embedding.clone(), router.scorer.light.clone(), router.scorer.weight.clone()]
        history.append(((routing.gates != 0).long().argmax(-1), *weights))
    (first, *frozen), (last, *end) = history[6], history[-1]
    assert torch.equal(first, last) and all(torch.equal(a, b) for a, b in zip(frozen[:2], end[:2], strict=True))
    assert not torch.equal(frozen[2], end[2]), "the learned router goes on to learn its weights"
    assert not torch.equal(history[0][1], frozen[0])


def test_distillation_is_the_cross_entropy_against_the_learned_choice():
    router, ids, valid = taught(), torch.randint(V, (2, 7)), torch.rand(2, 7) < 0.7
    x = hidden(ids)
    routing = router(x, by_ids(ids, training=True))
    light, target = router.scorer.embedding[ids] @ router.scorer.light.t(), (x @ router.scorer.weight.t()).argmax(-1)
    values = [F.cross_entropy(light[b, s], target[b, s]) for b in range(2) for s in range(7) if valid[b, s]]
    found = distillation(routing, Context(valid=valid), parts=Parts(router, x))
    torch.testing.assert_close(found, torch.stack(values).mean())
    grads = torch.autograd.grad(found, list(router.parameters()), allow_unused=True)
    names = [name for name, _ in router.named_parameters()]
    moved = {n for n, g in zip(names, grads, strict=True) if g is not None and g.ne(0).any()}
    assert moved == {"scorer.embedding", "scorer.light"}
    later = router(x, by_ids(ids, training=True, progress=0.5))
    assert distillation(later, Context(), parts=Parts(router, x)) == 0


def test_the_light_router_learns_what_it_is_taught():
    router = taught()
    words = torch.randn(V, D)
    optimizer = torch.optim.Adam([router.scorer.embedding, router.scorer.light], lr=0.05)
    for _ in range(60):
        ids = torch.randint(V, (1, 64))
        routing = router(words[ids], by_ids(ids, training=True))
        loss = distillation(routing, Context(), parts=Parts(router, words[ids]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = torch.arange(V)[None]
    agree = (choices(router, ids) == (words[ids] @ router.scorer.weight.t()).argmax(-1)).float().mean()
    assert agree >= 0.95


def test_distillation_without_a_light_router_is_refused():
    with pytest.raises(ConfigError, match="distill"):
        molora.wrap(tiny_llama(), {}, losses=[{"name": "distillation", "weight": 0.3}])


def test_centred_balance_is_zero_when_even_and_pushes_overloaded_experts_down():
    even = torch.eye(E).repeat(3, 1)[None]
    assert centred_balance(Routing(even, 0.7 * even, even), Context()) == 0
    scores = torch.randn(1, 40, E) + torch.tensor([1.5, 0.0, 0.0, -1.0])
    scores.requires_grad_()
    probs = torch.sigmoid(scores)
    mask = F.one_hot(scores.argmax(-1), E)
    value = centred_balance(Routing(scores, probs, probs * mask), Context())
    load = mask[0].sum(0).float()
    expected = sum(
        (load[e] - load.mean()) / load.mean() * sum(probs[0, t, e] for t in range(40) if mask[0, t, e]) / 40
        for e in range(E)
    )
    torch.testing.assert_close(value, expected)
    (grad,) = torch.autograd.grad(value, scores)
    for e in range(E):
        own = grad[0, :, e][mask[0, :, e].bool()]
        if len(own) and load[e] != load.mean():
            assert (own > 0).all() == (load[e] > load.mean()), "descent lowers the scores of overloaded experts"


def gradients(recipe, use_reentrant, **changes):
    torch.manual_seed(0)
    model = molora.wrap(tiny_llama(), recipe, **changes).train()
    for name, parameter in model.named_parameters():
        if "molora_bank" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    inputs = tiny_inputs(model)
    torch.manual_seed(1)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_decision_without_a_gradient_may_be_shared_across_checkpoints(use_reentrant):
    """One hash decision for the whole model crosses checkpoints freely; a learned one would lose its gradient."""
    plain = gradients("hash", None)
    found = gradients("hash", use_reentrant)
    assert plain.keys() == found.keys() and plain
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-4, msg=name)
    if use_reentrant:
        with pytest.raises(RoutingError, match="inside another reentrant checkpoint"):
            gradients("molora", True, share="model")
