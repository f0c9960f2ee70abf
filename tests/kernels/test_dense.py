"""The definition of the routed product against loops over tokens, experts and ranks."""

import pytest
import torch

from molora.kernels.dense import dense, dense_shared


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def loop(x, A, B, rank_gates):
    """y_o = sum_r B_or g_r sum_i A_ri x_i, one number at a time."""
    y = torch.zeros(B.shape[0], dtype=torch.float64)
    for o in range(B.shape[0]):
        for r in range(A.shape[0]):
            y[o] += B[o, r] * rank_gates[r] * sum(A[r, i] * x[i] for i in range(A.shape[1]))
    return y


GATE_SHAPES = [(2, 3), (2, 1), (1, 3), (1, 1), ()]  # per token, per row, per position, constant, constant without axes


@pytest.mark.parametrize("leading", GATE_SHAPES)
def test_dense(leading):
    x, A, B, gates = numbers(2, 3, 4), numbers(5, 4), numbers(6, 5), numbers(*leading, 5)
    y, spread = dense(x, A, B, gates), gates.expand(2, 3, 5)
    for b in range(2):
        for s in range(3):
            torch.testing.assert_close(y[b, s], loop(x[b, s], A, B, spread[b, s]))


@pytest.mark.parametrize("leading", GATE_SHAPES)
def test_dense_shared(leading):
    experts, rank = 3, 2
    x, A, B, gates = numbers(2, 3, 4), numbers(rank, 4), numbers(6, experts * rank), numbers(*leading, experts)
    y, spread = dense_shared(x, A, B, gates), gates.expand(2, 3, experts)
    for b in range(2):
        for s in range(3):
            expected = torch.zeros(6, dtype=torch.float64)
            for e in range(experts):
                expected += loop(x[b, s], A, B[:, e * rank : (e + 1) * rank], spread[b, s, e].expand(rank))
            torch.testing.assert_close(y[b, s], expected)


@pytest.mark.parametrize("shape", [(4,), (7, 4), (2, 3, 4), (2, 3, 5, 4)])
def test_any_leading_axes(shape):
    x, A, B = numbers(*shape), numbers(5, 4), numbers(6, 5)
    gates = numbers(*shape[:-1], 5)
    y = dense(x, A, B, gates)
    assert y.shape == (*shape[:-1], 6)
    expected = torch.stack([loop(t, A, B, g) for t, g in zip(x.reshape(-1, 4), gates.reshape(-1, 5), strict=True)])
    torch.testing.assert_close(y.reshape(-1, 6), expected)


def test_shared_is_dense_with_a_repeated():
    experts, rank = 3, 2
    x, A, B, gates = numbers(2, 3, 4), numbers(rank, 4), numbers(6, experts * rank), numbers(2, 3, experts)
    torch.testing.assert_close(
        dense_shared(x, A, B, gates), dense(x, A.repeat(experts, 1), B, gates.repeat_interleave(rank, -1))
    )


@pytest.mark.parametrize("function", [dense, dense_shared])
def test_gradients(function):
    x, A, B = numbers(2, 3, 4), numbers(2, 4), numbers(5, 2 if function is dense else 6)
    gates = numbers(2, 3, 2 if function is dense else 3)
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (x, A, B, gates)])


@pytest.mark.parametrize("function", [dense, dense_shared])
def test_zero_gates_and_zero_b_give_exactly_zero(function):
    x, A, B = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(5, 2 if function is dense else 6)
    gates = torch.randn(2, 3, 2 if function is dense else 3)
    assert function(x, A, B, torch.zeros_like(gates)).eq(0).all()
    assert function(x, A, torch.zeros_like(B), gates).eq(0).all()
