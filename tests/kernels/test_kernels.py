"""Every kernel equals `dense`, in value and in gradient, on every shape that it accepts; and what it costs in memory.

The reference here is a plain loop over tokens and experts in float64, which `dense` must equal as well.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from molora.errors import ConfigError
from molora.kernels import choose, grouped, native, tenants
from molora.kernels.choose import KERNELS, add_delta, definition, kernel
from molora.kernels.fused import fused
from molora.kernels.layout import Layout
from molora.kernels.upcast import frozen_linear, is_slow, upcasts

TRAINING = ("dense", "fused", "native", "grouped")
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


def case(
    lead=(2, 5), d_in=24, d_out=20, ranks=(4,) * 8, k=2, gate_lead=None, shared=False, dtype=torch.float32, seed=0
):
    """Random y, x, A, B, gates and a layout; k gates of each decision are not zero."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=draw).to(dtype)

    layout = Layout(tuple(ranks), shared, 1.7)
    experts = len(ranks)
    gates = torch.rand(*(lead if gate_lead is None else gate_lead), experts, generator=draw) + 0.1
    chosen = torch.rand(gates.shape, generator=draw).topk(k, dim=-1).indices
    gates = gates * torch.zeros_like(gates).scatter(-1, chosen, 1.0)
    A = randn(ranks[0] if shared else sum(ranks), d_in)
    B = randn(sum(ranks), d_out).t()  # as banks store it
    return randn(*lead, d_out, dtype=dtype), randn(*lead, d_in, dtype=dtype), A, B, gates, layout


def loop(y, x, A, B, gates, layout):
    """The definition as a double loop, in float64."""
    gates = gates.expand(*x.shape[:-1], gates.shape[-1])
    out = y.double().clone()
    for where in itertools.product(*map(range, x.shape[:-1])):
        at = 0
        for expert, rank in enumerate(layout.ranks):
            mine = slice(at, at + rank)
            down = A if layout.shared else A[mine]
            delta = B[:, mine].double() @ (down.double() @ x[where].double())
            out[where] += layout.scale * gates[where][expert].double() * delta
            at += rank
    return out


def refused(name, y, x, A, B, gates, layout):
    if name == "triton" and not x.is_cuda:
        return "it has a test of its own, in the interpreter"
    limit = choose._LIMITS.get(name)
    return limit and limit(y, x, A, B, layout)


def results(run, y, x, A, B, gates, layout, in_place=False, frozen=()):
    """Value and gradients of a random weighting of the output; the base is a frozen linear layer of x."""
    draw = torch.Generator().manual_seed(9)
    leaves = [t.detach().clone().requires_grad_(i not in frozen) for i, t in enumerate((x, A, B, gates))]
    weight = torch.randn(y.shape[-1], x.shape[-1], generator=draw).to(x.dtype)
    base = F.linear(leaves[0], weight)
    value = run(base, *leaves, layout, in_place)
    cotangent = torch.randn(value.shape, generator=draw).to(value.dtype)
    value.backward(cotangent)
    grads = [leaf.grad for leaf in leaves]
    if grads[3] is not None:
        grads[3] = torch.where(gates != 0, grads[3], 0)  # what kernels for sparse gates promise
    return [value.detach(), *grads]


def assert_same(ours, reference, tolerance=1e-5):
    for mine, theirs in zip(ours, reference, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
            if mine.numel():
                scale = theirs.double().abs().max().clamp_min(1e-30)
                assert ((mine.double() - theirs.double()).abs().max() / scale) < tolerance


SHAPES = {
    "one token": dict(lead=(1, 1)),
    "two tokens": dict(lead=(1, 2), k=1),
    "ragged": dict(lead=(3, 7), d_in=23, d_out=29),
    "odd widths, few ranks": dict(lead=(3, 5), d_in=17, d_out=9, ranks=(1,) * 8, k=3),
    "flat": dict(lead=(11,)),
    "four axes": dict(lead=(2, 3, 5)),
    "four axes, one row of gates each": dict(lead=(2, 3, 5), gate_lead=(2, 1, 1)),
    "many tokens": dict(lead=(2, 90), d_in=40, d_out=36),
    "no tokens": dict(lead=(0, 4)),
    "per row": dict(lead=(4, 6), gate_lead=(4, 1)),
    "per row, one token": dict(lead=(5, 1), gate_lead=(5, 1), k=1),
    "constant": dict(lead=(4, 6), gate_lead=(1, 1)),
    "per position": dict(lead=(4, 6), gate_lead=(1, 6)),
    "k = E": dict(k=8),
    "k = 0": dict(k=0),
    "E = 1": dict(ranks=(8,), k=1),
    "E = 2": dict(ranks=(8,) * 2, k=1, lead=(3, 9)),
    "E = 64": dict(ranks=(4,) * 64, lead=(1, 30)),
    "E = 64, r = 8": dict(ranks=(8,) * 64, lead=(2, 9), d_in=32, d_out=48),
    "r = 1": dict(ranks=(1,) * 64, k=16, lead=(2, 20)),
    "r = 12": dict(ranks=(12,) * 3, lead=(2, 20)),
    "unequal ranks": dict(ranks=(1, 5, 2, 8), lead=(2, 6)),
    "shared A": dict(ranks=(4,) * 5, shared=True, lead=(2, 6)),
    "shared A, per row": dict(ranks=(4,) * 5, shared=True, lead=(3, 6), gate_lead=(3, 1)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_is_a_double_loop(shape):
    arguments = case(**SHAPES[shape])
    assert_same([definition(*arguments).double()], [loop(*arguments)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [n for n in KERNELS if n != "dense"])
def test_value_equals_dense(name, shape):
    arguments = case(**SHAPES[shape])
    reason = refused(name, *arguments)
    if name == "tenants" and arguments[4].dim() == 3 and arguments[4].shape[1] != 1:
        reason = reason or "its gates are per row"
    if reason:
        pytest.skip(reason)
    reference = definition(*arguments)
    with torch.no_grad():
        assert_same([KERNELS[name](*arguments)], [reference])
        y = arguments[0].clone()
        out = KERNELS[name](y, *arguments[1:], True)
        assert_same([out], [reference])
        assert out.data_ptr() == y.data_ptr()  # in place means in place


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [n for n in TRAINING if n != "dense"])
def test_gradient_equals_dense(name, shape, in_place):
    arguments = case(**SHAPES[shape])
    reason = refused(name, *arguments)
    if reason:
        pytest.skip(reason)
    assert_same(results(KERNELS[name], *arguments, in_place=in_place), results(definition, *arguments))


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (3,), (0, 3), (0, 1, 2)])
@pytest.mark.parametrize("name", [n for n in TRAINING if n != "dense"])
def test_gradients_that_nobody_wants_change_nothing(name, frozen):
    arguments = case(lead=(2, 9))
    if reason := refused(name, *arguments):
        pytest.skip(reason)
    assert_same(results(KERNELS[name], *arguments, frozen=frozen), results(definition, *arguments, frozen=frozen))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", [n for n in KERNELS if n != "dense"])
def test_an_expert_without_tokens_and_a_token_without_experts(name, seed):
    y, x, A, B, gates, layout = case(lead=(4, 1) if name == "tenants" else (2, 13), seed=seed)
    gates[..., seed] = 0
    gates[0, 0] = 0
    if reason := refused(name, y, x, A, B, gates, layout):
        pytest.skip(reason)
    if name in TRAINING:
        assert_same(results(KERNELS[name], y, x, A, B, gates, layout), results(definition, y, x, A, B, gates, layout))
    else:
        assert_same([KERNELS[name](y, x, A, B, gates, layout)], [definition(y, x, A, B, gates, layout)])


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "dense"])
def test_inputs_that_are_not_contiguous(name):
    y, x, A, B, gates, layout = case(lead=(3, 1) if name == "tenants" else (3, 8), d_in=24)
    x = torch.stack([x, x + 1], -1)[..., 0]
    y = y.transpose(0, 1).contiguous().transpose(0, 1)
    gates = torch.stack([gates, gates], 1)[:, 0]
    wide = torch.cat([A, A], 1)[:, :24]
    if reason := refused(name, y, x, A, B, gates, layout):
        pytest.skip(reason)
    assert not (x.is_contiguous() or wide.is_contiguous())
    reference = definition(y, x, A, B, gates, layout)
    with torch.no_grad():
        assert_same([KERNELS[name](y, x, A, B, gates, layout)], [reference])
        assert_same([KERNELS[name](y.clone(), x, A, B, gates, layout, True)], [reference])
        turned = B.contiguous()  # not as banks store it: ranks adjacent, outputs far apart
        assert_same([KERNELS[name](y, x, A, turned, gates, layout)], [reference])
        if not refused(name, y, x, wide, B, gates, layout):
            assert_same([KERNELS[name](y, x, wide, B, gates, layout)], [reference])
    if name in TRAINING:
        mine = results(KERNELS[name], y, x, A, turned, gates, layout)
        assert_same(mine, results(definition, y, x, A, B, gates, layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TRAINING)
def test_half_precision_bases_keep_float32_products(name, dtype):
    arguments = case(lead=(2, 12), dtype=dtype)
    if reason := refused(name, *arguments):
        pytest.skip(reason)
    unit = torch.finfo(dtype).eps
    for in_place in (False, True):
        value, dx, dA, dB, dgates = results(KERNELS[name], *arguments, in_place=in_place)
        assert (value.dtype, dx.dtype, dA.dtype, dB.dtype, dgates.dtype) == (dtype, dtype, *[torch.float32] * 3)
        reference = results(definition, *arguments)
        assert_same([value, dx], reference[:2], 2 * unit)
        assert_same([dA, dB, dgates], reference[2:], 1e-5)  # float32 inside: no half-precision rounding in them


@pytest.mark.parametrize("name", list(KERNELS))
def test_autocast_does_not_touch_thin_products(name):
    arguments = case(lead=(4, 1))
    if reason := refused(name, *arguments):
        pytest.skip(reason)
    exact = definition(*arguments)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same([KERNELS[name](*arguments)], [exact])
    if name == "dense" or name not in TRAINING:
        return

    def run(base, *rest):
        return KERNELS[name](base.float(), *rest)

    reference = results(definition, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # around backward too, as careless loops do
        assert_same(results(run, *arguments)[2:], reference[2:])


@pytest.mark.parametrize("shared", [False, True])
def test_fused_has_exact_first_and_second_derivatives(shared):
    y, x, A, B, gates, layout = case(lead=(2, 3), d_in=4, d_out=3, ranks=(2,) * 3, shared=shared)
    leaves = [t.double().requires_grad_() for t in (y, x, A, B, gates)]
    assert torch.autograd.gradcheck(lambda *t: fused(*t, layout), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: fused(*t, layout), leaves)
    row = gates[:, :1].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: fused(*t, layout), [*leaves[:4], row])


def test_fused_gives_gates_of_zero_their_gradient():
    arguments = case(lead=(2, 6), k=2)
    x, A, B, gates, layout = arguments[1:]
    gates = gates.requires_grad_()
    fused(arguments[0], x, A, B, gates, layout).sum().backward()
    mine, gates.grad = gates.grad, None
    definition(arguments[0], x, A, B, gates, layout).sum().backward()
    assert (gates.grad[gates == 0] != 0).all()
    torch.testing.assert_close(mine, gates.grad)


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(name, reentrant):
    arguments = case(lead=(2, 9))
    if reason := refused(name, *arguments):
        pytest.skip(reason)

    def checkpointed(base, *rest):
        run = lambda *inner: KERNELS[name](inner[0] * 1.0, *inner[1:])  # noqa: E731
        return checkpoint(run, base, *rest, use_reentrant=reentrant)

    assert_same(results(checkpointed, *arguments, in_place=True), results(definition, *arguments))


@pytest.mark.parametrize("name", TRAINING)
def test_a_layer_used_twice(name):
    arguments = case(lead=(2, 9), d_in=24, d_out=24)
    if reason := refused(name, *arguments):
        pytest.skip(reason)

    def twice(run):
        def both(base, x, A, B, gates, layout, in_place):
            once = run(base, x, A, B, gates, layout, in_place)
            return run(once * 0.5, torch.tanh(once), A, B, gates, layout, in_place)

        return both

    mine = results(twice(KERNELS[name]), *arguments, in_place=True)
    assert_same(mine, results(twice(definition), *arguments))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", TRAINING)
def test_a_model_may_add_into_the_output(name, in_place):
    """Falcon adds the attention into what its last MLP layer gave; the gradients are those of a sum."""
    if name == "native" and native.library() is None:
        pytest.skip("no C compiler here")
    grads = []
    for inside in (False, True):
        y, x, A, B, gates, layout = case()
        A.requires_grad_(), B.requires_grad_()
        out = KERNELS[name](y, x, A, B, gates, layout, in_place)
        other = torch.ones_like(out)
        out = out.add_(other) if inside else out + other
        out.square().sum().backward()
        grads.append((A.grad, B.grad))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("name", ["fused", "native", "grouped"])
def test_writing_into_an_output_that_backward_needs_is_an_error(name):
    y, x, A, B, gates, layout = arguments = case(lead=(2, 9))
    if reason := refused(name, *arguments):
        pytest.skip(reason)
    source = y.clone().requires_grad_()
    out = KERNELS[name](torch.sigmoid(source), x, A, B, gates, layout, True)  # sigmoid keeps its output for backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_torch_compile_has_no_graph_break_and_equal_gradients():
    arguments = case(lead=(2, 9))

    def run(base, x, A, B, gates, layout, in_place):
        return add_delta(base, x, A, B, gates, layout, in_place, sparse=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, *arguments, in_place=True), results(definition, *arguments))


def saved_bytes(run):
    """Bytes kept for backward by what `run` does, each storage counted once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(kept.values()), out


@pytest.mark.parametrize("name", ["fused", "native", "grouped"])
def test_nothing_but_inputs_is_kept_for_backward(name):
    y, x, A, B, gates, layout = arguments = case(lead=(4, 64), d_in=64, d_out=128, ranks=(4,) * 16)
    if reason := refused(name, *arguments):
        pytest.skip(reason)
    leaves = [t.requires_grad_() for t in (x, A, B, gates)]
    inputs = sum(t.untyped_storage().nbytes() for t in leaves)
    kept, _ = saved_bytes(lambda: KERNELS[name](y, *leaves, layout))
    assert kept <= inputs
    dense_kept, _ = saved_bytes(lambda: definition(y, *leaves, layout))
    assert dense_kept > kept


def test_wide_inputs_keep_their_few_hidden_ranks():
    y, x, A, B, gates, layout = case(lead=(4, 8), d_in=256, d_out=16, ranks=(4,) * 2, k=1)
    leaves = [t.requires_grad_() for t in (x, A, B, gates)]
    kept, _ = saved_bytes(lambda: fused(y, *leaves, layout))
    assert kept == sum(t.untyped_storage().nbytes() for t in leaves) + 4 * 8 * 8 * 4


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_an_unknown_kernel_is_an_error_with_choices():
    with pytest.raises(ConfigError, match="'fusd' is unknown; did you mean 'fused'"), kernel("fusd"):
        pass


def test_a_forced_kernel_is_used_or_refused_with_the_reason(monkeypatch):
    arguments = case(ranks=(1, 2, 3))
    used = []
    monkeypatch.setitem(KERNELS, "dense", lambda *a: used.append("dense") or definition(*a))
    with kernel("dense"):
        add_delta(*arguments)
    assert used == ["dense"]
    with (
        pytest.raises(ConfigError, match=r"kernel 'grouped' was asked for, but it needs .* equal ranks"),
        kernel("grouped"),
    ):
        add_delta(*arguments)
    x = arguments[1].requires_grad_()
    with pytest.raises(ConfigError, match="it computes no gradient"), kernel("union"):
        add_delta(arguments[0], x, *arguments[2:])


def test_gates_whose_zeros_matter_never_meet_a_sparse_kernel():
    for ranks, k in (((8,) * 64, 1), ((4,) * 8, 1)):
        arguments = case(ranks=ranks, k=k, lead=(2, 70))
        arguments[1].requires_grad_()
        assert choose.choose(*arguments, sparse=False) == "fused"
        assert choose.choose(*arguments, sparse=True) != "fused"


def test_without_a_compiler_torch_does_the_work(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    names = set()
    for lead, ranks, gate_lead in (
        ((1, 1), (8,) * 64, None),
        ((1, 6), (8,) * 64, None),
        ((1, 400), (8,) * 64, None),
        ((1, 400), (8,) * 8, None),
        ((8, 1), (8,) * 16, (8, 1)),
    ):
        arguments = case(lead=lead, ranks=ranks, gate_lead=gate_lead, d_in=128, d_out=128)
        with torch.no_grad():
            names.add(choose.choose(*arguments, sparse=True))
            assert_same([add_delta(*arguments, sparse=True)], [definition(*arguments)])
    assert names == {"union", "grouped", "fused", "tenants"}


@pytest.mark.parametrize("name", ["tenants", "native", "fused"])
def test_a_written_slot_and_changed_gates_count_at_once(name):
    y, x, A, B, gates, layout = case(lead=(5, 1), gate_lead=(5, 1), k=1)
    if reason := refused(name, y, x, A, B, gates, layout):
        pytest.skip(reason)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: A[:4].mul_(3),
            lambda: B[:, :4].neg_(),
            lambda: gates.copy_(gates.flip(0)),
        ):
            change()
            assert_same([KERNELS[name](y, x, A, B, gates, layout)], [definition(y, x, A, B, gates, layout)])


def test_gathered_experts_go_when_the_bank_goes():
    before = len(tenants._kept)
    y, x, A, B, gates, layout = case(lead=(5, 1), gate_lead=(5, 1), k=1)
    tenants.tenants(y, x, A, B, gates, layout)
    assert len(tenants._kept) == before + 1
    del A
    assert len(tenants._kept) == before


# --- the C operator ---------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_nothing(threads, monkeypatch):
    arguments = case(lead=(3, 41), d_in=50, d_out=70)
    one = results(native.native, *arguments)
    monkeypatch.setattr(native, "threads_for", lambda tokens: threads)
    assert_same(results(native.native, *arguments), one)
    assert_same(results(native.native, *arguments), results(definition, *arguments))


@needs_compiler
def test_nan_and_inf_are_not_hidden():
    y, x, A, B, gates, layout = case(lead=(1, 6))
    x[0, 1, 3], x[0, 4, 0] = float("nan"), float("inf")
    out = native.native(y, x, A, B, gates, layout)
    assert out[0, 1].isnan().all() and not out[0, 4].isfinite().any()
    assert out[0, [0, 2, 3, 5]].isfinite().all()


def test_a_broken_compiler_falls_back_in_silence(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library.__wrapped__() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert native.library.__wrapped__() is None
    monkeypatch.setenv("MOLORA_NATIVE", "0")
    assert native.library.__wrapped__() is None


@needs_compiler
def test_it_is_built_once_into_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library.__wrapped__() is not None
    (built,) = (tmp_path / "molora").iterdir()
    stamp = built.stat().st_mtime_ns
    assert native.library.__wrapped__() is not None
    assert [p.stat().st_mtime_ns for p in (tmp_path / "molora").iterdir()] == [stamp]


# --- half-precision bases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_an_upcast_base_rounds_once(dtype, bias):
    torch.manual_seed(0)
    base = torch.nn.Linear(24, 16, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(3, 9, 24, dtype=dtype, requires_grad=True)
    kept, y = saved_bytes(lambda: frozen_linear(x, base.weight, base.bias))
    assert kept == base.weight.untyped_storage().nbytes()  # no float32 copy is kept
    exact = F.linear(x.double(), base.weight.double(), None if base.bias is None else base.bias.double())
    torch.testing.assert_close(y, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(
        dx, (dy.double() @ base.weight.double()).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6
    )


def test_the_upcast_is_for_frozen_half_precision_layers_of_slow_processors():
    base = torch.nn.Linear(4, 4, dtype=torch.bfloat16).requires_grad_(False)
    many, few = torch.randn(2, 8, 4, dtype=torch.bfloat16), torch.randn(1, 4, dtype=torch.bfloat16)
    assert upcasts(base, many) == is_slow(torch.bfloat16)
    assert not upcasts(base, few) and upcasts(base, few, True) and not upcasts(base, many, False)
    assert not upcasts(base.float(), many.float(), True)
    assert not upcasts(torch.nn.Linear(4, 4, dtype=torch.bfloat16), many, True)
    hooked = torch.nn.Linear(4, 4, dtype=torch.bfloat16).requires_grad_(False)
    hooked.register_forward_hook(lambda *a: None)
    assert not upcasts(hooked, many, True)


def test_grouped_says_why_it_refuses():
    y, x, A, B, _, layout = case(ranks=(2,) * 8)
    assert "rank 2 is not a multiple of 4" in grouped.why_not(y, x, A, B, layout)
