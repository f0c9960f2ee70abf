"""ExpertBank: every form against loops, slots, frozen experts, dropout, errors."""

import copy
import math

import pytest
import torch

import molora
from molora.control import routed_layers
from molora.errors import ConfigError
from molora.experts.bank import FORMS, ExpertBank
from tests.tiny import tiny_inputs, tiny_llama

RANKS = {"lora": (2, 2, 2), "rank": (1, 1, 1, 1, 1), "shared_a": (2, 2, 2)}
MIXED = (1, 4, 2)


def bank_of(form="lora", ranks=None, **options):
    bank = ExpertBank(5, 7, ranks or RANKS[form], form=form, **({"scaling": 1.5} | options)).double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    return bank


def inputs(bank):
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    return x, torch.rand(2, 3, bank.num_experts, dtype=torch.float64)


def loop(bank, x, gates):
    """scaling * sum_e g_e B_e (A_e x), with A_e and B_e cut out of the parameters here."""
    y = torch.zeros(*x.shape[:-1], 7, dtype=torch.float64)
    start = 0
    for e, rank in enumerate(bank.ranks):
        A = bank.A if bank.form == "shared_a" else bank.A[start : start + rank]
        B = bank.B[:, start : start + rank]
        for b in range(x.shape[0]):
            for s in range(x.shape[1]):
                y[b, s] += bank.scaling * gates[b, s, e] * (B @ (A @ x[b, s]))
        start += rank
    return y


# --- the product ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_their_loops(form):
    bank = bank_of(form)
    x, gates = inputs(bank)
    torch.testing.assert_close(bank(x, gates), loop(bank, x, gates))
    y = torch.randn(2, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(bank.add_to(y, x, gates), y + loop(bank, x, gates))


def test_experts_of_different_ranks():
    bank = bank_of(ranks=MIXED)
    x, gates = inputs(bank)
    torch.testing.assert_close(bank(x, gates), loop(bank, x, gates))
    torch.testing.assert_close(bank.add_to(torch.zeros(2, 3, 7, dtype=torch.float64), x, gates), loop(bank, x, gates))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leading", [(2, 1), (1, 3), (1, 1), ()])
def test_gates_broadcast(form, leading):
    bank = bank_of(form)
    x, _ = inputs(bank)
    gates = torch.rand(*leading, bank.num_experts, dtype=torch.float64)
    torch.testing.assert_close(bank(x, gates), loop(bank, x, gates.expand(2, 3, bank.num_experts)))


@pytest.mark.parametrize(
    ("form", "ranks"), [("lora", (2, 2)), ("lora", (1, 3, 2)), ("lora", (1, 1)), ("rank", (1, 1, 1))]
)
def test_spread_repeats_each_gate_over_its_ranks(form, ranks):
    bank = bank_of(form, ranks)
    gates = torch.randn(2, 3, len(ranks))
    expected = torch.stack([gates[..., e] for e, rank in enumerate(ranks) for _ in range(rank)], -1)
    assert torch.equal(bank.spread(gates), expected)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_to_everything(form):
    bank = bank_of(form)
    x, gates = (t.requires_grad_() for t in inputs(bank))
    bank(x, gates).square().sum().backward()
    for tensor in (x, gates, bank.A, bank.Bt):
        assert tensor.grad.abs().max() > 0


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_bank_gives_exactly_zero(form):
    bank = ExpertBank(5, 7, RANKS[form], form=form)
    assert bank.B.eq(0).all() and bank.A.ne(0).any()
    assert bank(torch.randn(2, 3, 5), torch.rand(2, 3, bank.num_experts)).eq(0).all()


def test_inputs_of_any_dtype_meet_float32_experts():
    bank = ExpertBank(5, 7, (2, 2))
    torch.nn.init.normal_(bank.B)
    x, gates = torch.randn(2, 3, 5).bfloat16(), torch.rand(2, 3, 2)
    out = bank(x, gates)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, bank(x.float(), gates))


def test_starts():
    bank = ExpertBank(400, 3, (50, 50))
    bound = 1 / math.sqrt(400)  # kaiming_uniform with a = sqrt(5), as PEFT's LoRA
    assert bank.A.abs().max() <= bound and bank.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert ExpertBank(400, 3, (50, 50), init=0.02).A.std().item() == pytest.approx(0.02, rel=0.02)


# --- single experts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "ranks"), [("lora", MIXED), ("rank", (1, 1, 1)), ("shared_a", (2, 2, 2))])
@pytest.mark.parametrize("frozen", [(), (1,), (0, 2)])
def test_pair_is_the_expert(form, ranks, frozen):
    if form == "shared_a" and frozen:
        frozen = ()
    bank = bank_of(form, ranks, frozen=frozen)
    x, _ = inputs(bank)
    for e in range(3):
        A, B = bank.pair(e)
        assert A.shape == (ranks[e], 5) and B.shape == (7, ranks[e]) and not A.requires_grad
        alone = torch.zeros(3, dtype=torch.float64).index_fill(0, torch.tensor(e), 1.0)
        torch.testing.assert_close(bank(x, alone), bank.scaling * x @ A.T @ B.T)


def test_pair_is_a_copy():
    bank = bank_of()
    A, B = bank.pair(0)
    A.zero_(), B.zero_()
    assert bank.A.ne(0).all() and bank.B.ne(0).all()


@pytest.mark.parametrize(("form", "ranks"), [("lora", MIXED), ("rank", (1, 1, 1)), ("shared_a", (2, 2, 2))])
def test_delta_weight_acts_as_the_bank_does(form, ranks):
    bank = bank_of(form, ranks)
    x, _ = inputs(bank)
    gates = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(x @ bank.delta_weight(gates).T, bank(x, gates))


@pytest.mark.parametrize("slot", [0, 1, 2])
@pytest.mark.parametrize("frozen", [(), (1,), (0, 2), "all"])
def test_write_fills_one_slot_with_its_own_scale(slot, frozen):
    bank = bank_of(ranks=(3, 4, 2), frozen=frozen)
    before = [bank.pair(e) for e in range(3)]
    A, B = torch.randn(2, 5, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    bank.write(slot, A, B, scale=0.25)
    x, _ = inputs(bank)
    for e in range(3):
        alone = torch.zeros(3, dtype=torch.float64).index_fill(0, torch.tensor(e), 1.0)
        expected = 0.25 * x @ A.T @ B.T if e == slot else bank.scaling * x @ before[e][0].T @ before[e][1].T
        torch.testing.assert_close(bank(x, alone), expected)


def test_write_clears_what_a_smaller_expert_does_not_fill():
    bank = bank_of(ranks=(4, 4))
    bank.write(0, torch.ones(1, 5), torch.ones(7, 1), scale=1.0)
    A, B = bank.pair(0)
    assert A[1:].eq(0).all() and B[:, 1:].eq(0).all() and A[0].eq(1).all()


@pytest.mark.parametrize(
    ("slot", "A", "B", "message"),
    [
        (3, (2, 5), (7, 2), "slot 3 does not exist; the bank has 3 experts"),
        (-1, (2, 5), (7, 2), "slot -1 does not exist"),
        (0, (3, 5), (7, 3), r"need A \(r, 5\), B \(7, r\) with r <= 2"),
        (0, (2, 6), (7, 2), "does not fit slot 0"),
        (0, (2, 5), (8, 2), "does not fit slot 0"),
        (0, (1, 5), (7, 2), "does not fit slot 0"),
        (0, (5,), (7, 1), "does not fit slot 0"),
    ],
)
def test_write_refuses_what_does_not_fit(slot, A, B, message):
    bank = bank_of()
    before = copy.deepcopy(bank.state_dict())
    with pytest.raises(ConfigError, match=message):
        bank.write(slot, torch.ones(A), torch.ones(B))
    assert all(torch.equal(before[k], v) for k, v in bank.state_dict().items())


def test_a_shared_a_has_no_slots():
    with pytest.raises(ConfigError, match="has no slots to write"):
        bank_of("shared_a").write(0, torch.ones(2, 5), torch.ones(7, 2))


@pytest.mark.parametrize("form", FORMS)
def test_permute_moves_experts_with_their_gates(form):
    bank = bank_of(form)
    x, gates = inputs(bank)
    before, pairs = bank(x, gates), [bank.pair(e) for e in range(bank.num_experts)]
    order = torch.randperm(bank.num_experts)
    bank.permute(order)
    torch.testing.assert_close(bank(x, gates[..., order]), before)
    for new, old in enumerate(order.tolist()):
        assert all(torch.equal(a, b) for a, b in zip(bank.pair(new), pairs[old], strict=True))


@pytest.mark.parametrize("options", [{"ranks": MIXED}, {"frozen": (1,)}])
def test_permute_says_when_it_cannot(options):
    with pytest.raises(ConfigError, match="cannot be permuted in place"):
        bank_of(**options).permute(torch.tensor([1, 0, 2]))


# --- frozen experts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (1, 3, 2, 4)])
@pytest.mark.parametrize("frozen", [(0,), (3,), (1, 2), (0, 2), (0, 1, 2)])
def test_frozen_experts_act_in_their_own_place(ranks, frozen):
    plain, bank = bank_of(ranks=ranks), bank_of(ranks=ranks, frozen=frozen)
    for e in range(4):
        bank.write(e, *plain.pair(e), scale=bank.scaling)
    x, gates = inputs(bank)
    torch.testing.assert_close(bank(x, gates), loop(plain, x, gates))
    torch.testing.assert_close(bank.delta_weight(gates[0, 0]), plain.delta_weight(gates[0, 0]))


@pytest.mark.parametrize("frozen", [(1,), (0, 2), "all"])
def test_frozen_experts_stay_bit_identical_under_weight_decay(frozen):
    bank = bank_of(frozen=frozen)
    still = range(3) if frozen == "all" else frozen
    before = [bank.pair(e) for e in range(3)]
    trainable = [p for p in bank.parameters() if p.requires_grad]
    assert bool(trainable) == (frozen != "all")
    # all parameters go to the optimizer, as careless loops do
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        x, gates = inputs(bank)
        loss = bank(x, gates.requires_grad_()).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for e in range(3):
        same = [torch.equal(a, b) for a, b in zip(bank.pair(e), before[e], strict=True)]
        assert same == [e in still] * 2


@pytest.mark.parametrize("frozen", [[0, 2], "all"])
def test_frozen_experts_stay_frozen_inside_peft(frozen):
    """PEFT switches requires_grad on for whole adapters, in set_adapter and elsewhere."""
    model = molora.wrap(tiny_llama(), "molora", experts={"num": 3, "rank": 2, "frozen": frozen}, losses=[])
    layers = routed_layers(model)
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        bank = layer.molora_bank["default"]
        for e in range(3):
            A, B = bank.pair(e)
            bank.write(e, A, torch.randn(B.shape, generator=generator))
    before = {(n, e): layer.molora_bank["default"].pair(e) for n, layer in layers.items() for e in range(3)}
    model.set_adapter("default")
    model.base_model.enable_adapter_layers()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    inputs = tiny_inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    still = {0, 1, 2} if frozen == "all" else set(frozen)
    for (name, e), (A, B) in before.items():
        now = layers[name].molora_bank["default"].pair(e)
        assert (torch.equal(now[0], A) and torch.equal(now[1], B)) == (e in still)
    routers = [p.grad for n, p in model.named_parameters() if "molora_router" in n]
    assert routers and all(g is not None and g.abs().max() > 0 for g in routers)


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_dropout_acts_in_training_only(form):
    bank = bank_of(form, dropout=0.5)
    x, gates = inputs(bank)
    bank.eval()
    torch.testing.assert_close(bank(x, gates), loop(bank, x, gates))
    bank.train()
    assert not torch.allclose(bank(x, gates), bank(x, gates))
    torch.manual_seed(5)
    got = bank(x, gates)
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(got, loop(bank, dropped, gates))
    torch.manual_seed(5)
    zero = torch.zeros(2, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(bank.add_to(zero, x, gates), loop(bank, dropped, gates))


def test_dropout_keeps_the_mean():
    bank = bank_of(dropout=0.3).train()
    x, gates = inputs(bank)
    mean = sum(bank(x, gates) for _ in range(4000)) / 4000
    expected = loop(bank, x, gates)
    assert (mean - expected).abs().max() < 0.1 * expected.abs().max()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        ((2,), {"form": "loha"}, "experts.form 'loha' is unknown; known: lora, rank, shared_a"),
        ((), {}, "at least one expert of rank >= 1"),
        ((2, 0), {}, "at least one expert of rank >= 1"),
        ((2, 2), {"form": "rank"}, "set rank: 1 and num: <total rank>"),
        ((2, 3), {"form": "shared_a"}, "needs one rank for all experts"),
        ((2, 2), {"form": "shared_a", "frozen": (0,)}, "cannot freeze single experts"),
        ((2, 2), {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ((2, 2), {"frozen": (2,)}, r"frozen names \[2\], but there are experts 0 to 1"),
        ((2, 2), {"frozen": (0, 1)}, "write frozen: all"),
        ((2, 2), {"scaling": 0.0}, "scaling must not be 0"),
        ((2, 2), {"init": "zeros"}, "init 'zeros' is unknown"),
        ((2, 2), {"init": 0.0}, "init 0.0 is unknown"),
    ],
)
def test_contradictions_are_named(ranks, options, message):
    with pytest.raises(ConfigError, match=message):
        ExpertBank(5, 7, ranks, **options)
