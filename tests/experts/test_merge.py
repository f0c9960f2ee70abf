"""Merging: products exactly, factors with their cross term (I2), compression against a dense SVD."""

import pytest
import torch

from molora.errors import ConfigError
from molora.experts.bank import ExpertBank
from molora.experts.merge import compress, cross_term, factor_merge, product_merge

D_IN, D_OUT = 9, 7


def pairs_of(*ranks):
    return [(torch.randn(r, D_IN, dtype=torch.float64), torch.randn(D_OUT, r, dtype=torch.float64)) for r in ranks]


def updates(pairs, weights):
    return sum(w * B @ A for (A, B), w in zip(pairs, weights, strict=True))


@pytest.mark.parametrize("ranks", [(2,), (2, 2, 2), (1, 3, 2)])
def test_product_merge_is_the_sum_of_the_updates(ranks):
    pairs, weights = pairs_of(*ranks), torch.randn(len(ranks), dtype=torch.float64)
    A, B = product_merge(pairs, weights)
    assert A.shape == (sum(ranks), D_IN) and B.shape == (D_OUT, sum(ranks))
    torch.testing.assert_close(B @ A, updates(pairs, weights))


def test_factor_merge_averages_factors_and_misses_the_cross_term():
    pairs, weights = pairs_of(2, 2, 2), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    A, B = factor_merge(pairs, weights)
    torch.testing.assert_close(A, 0.5 * pairs[0][0] + 0.3 * pairs[1][0] + 0.2 * pairs[2][0])
    torch.testing.assert_close(B, 0.5 * pairs[0][1] + 0.3 * pairs[1][1] + 0.2 * pairs[2][1])
    left_A, left_B = cross_term(pairs, weights)
    torch.testing.assert_close(updates(pairs, weights) - B @ A, left_B @ left_A)
    assert (left_B @ left_A).norm() > 0.3 * updates(pairs, weights).norm(), "the cross term is no small thing"
    assert torch.linalg.matrix_rank(B @ A) == 2 and torch.linalg.matrix_rank(updates(pairs, weights)) == 6


def test_the_cross_term_vanishes_for_a_shared_a_and_for_one_expert():
    pairs = pairs_of(2, 2, 2)
    shared = [(pairs[0][0], B) for _, B in pairs]
    for given, weights in ((shared, [0.5, 0.3, 0.2]), (pairs, [0.0, 1.0, 0.0])):
        A, B = cross_term(given, weights)
        assert (B @ A).abs().max() < 1e-12


def test_product_merge_is_what_a_bank_does_under_constant_gates():
    bank = ExpertBank(D_IN, D_OUT, (2, 1, 3), scaling=1.5).double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    gates, x = torch.tensor([0.2, -0.7, 1.1], dtype=torch.float64), torch.randn(4, D_IN, dtype=torch.float64)
    A, B = product_merge([bank.pair(e) for e in range(3)], gates)
    torch.testing.assert_close(bank(x, gates), 1.5 * x @ A.T @ B.T)
    A, B = bank.mixed(gates)
    torch.testing.assert_close(bank(x, gates), 1.5 * x @ A.T @ B.T)


# --- compression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4, 6, 20])
def test_compress_is_the_best_approximation_of_its_rank(rank):
    A, B = product_merge(pairs_of(2, 2, 2), [0.7, 1.0, -0.4])
    small_A, small_B, error = compress(A, B, rank)
    kept = min(rank, 6)
    assert small_A.shape == (kept, D_IN) and small_B.shape == (D_OUT, kept)
    U, values, Vh = torch.linalg.svd(B @ A)
    best = U[:, :kept] * values[:kept] @ Vh[:kept]
    torch.testing.assert_close(small_B @ small_A, best)
    off = (B @ A - small_B @ small_A).norm() / (B @ A).norm()
    torch.testing.assert_close(off.item(), error, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(error, float(values[kept:].norm() / values.norm()), atol=1e-9, rtol=1e-6)


def test_compress_finds_the_rank_that_is_there():
    A, B = pairs_of(2)[0]
    twice_A, twice_B = product_merge([(A, B), (A, B), (A, B)], [0.2, 0.3, 0.5])  # rank 6 on paper, 2 in truth
    small_A, small_B, error = compress(twice_A, twice_B)
    assert small_A.shape[0] == 2 and error < 1e-12
    torch.testing.assert_close(small_B @ small_A, B @ A)


@pytest.mark.parametrize("tolerance", [0.05, 0.3, 0.7])
def test_compress_takes_the_smallest_rank_within_the_tolerance(tolerance):
    A, B = product_merge(pairs_of(3, 3), [1.0, 0.5])
    small_A, _, error = compress(A, B, tolerance=tolerance)
    values = torch.linalg.svdvals(B @ A)
    errors = [float(values[k:].norm() / values.norm()) for k in range(7)]
    assert small_A.shape[0] == next(k for k in range(1, 7) if errors[k] <= tolerance)
    assert error <= tolerance


def test_compress_keeps_dtypes_and_survives_zeros():
    A, B = (t.to(torch.bfloat16) for t in pairs_of(4)[0])
    small_A, small_B, _ = compress(A, B, 2)
    assert small_A.dtype == small_B.dtype == torch.bfloat16
    small_A, small_B, error = compress(torch.randn(3, D_IN), torch.zeros(D_OUT, 3))
    assert error == 0 and small_A.shape == (1, D_IN) and (small_B @ small_A).eq(0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: product_merge([], []), "one weight per expert, got 0 experts"),
        (lambda: product_merge(pairs_of(2, 2), [1.0]), "got 2 experts and 1 weights"),
        (lambda: product_merge([*pairs_of(2), (torch.ones(2, 5), torch.ones(7, 2))], [1.0, 1.0]), "one layer"),
        (lambda: factor_merge(pairs_of(2, 3), [0.5, 0.5]), r"different ranks \[2, 3\] have no mean; merge products"),
        (lambda: compress(torch.ones(2, 5), torch.ones(7, 3)), r"A \(R, d_in\) and B \(d_out, R\)"),
        (lambda: compress(*pairs_of(2)[0], rank=0), "rank >= 1, got 0"),
        (lambda: compress(*pairs_of(2)[0], tolerance=1.0), "0 <= tolerance < 1, got 1.0"),
    ],
)
def test_what_cannot_be_merged_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
