"""Experts of the form `gated`: against plain loops, and what they refuse."""

import pytest
import torch

from molora.errors import ConfigError
from molora.experts.gated import Gated


@pytest.mark.parametrize("norm", [False, True])
def test_it_equals_plain_loops(norm):
    form = Gated(6, 5, [2] * 3, form="gated", scaling=0.7, gate_rank=4, norm=norm)
    for parameter in form.parameters():
        torch.nn.init.normal_(parameter)
    x, gates = torch.randn(2, 3, 6), torch.rand(2, 3, 3)
    found = form(x, gates)
    for b in range(2):
        for t in range(3):
            y = 0
            for e in range(3):
                A, B = form.A[2 * e : 2 * e + 2], form.Bt[2 * e : 2 * e + 2].t()
                U, V = form.U[4 * e : 4 * e + 4], form.V[4 * e : 4 * e + 4]
                scale = 2 / (1 + torch.exp(-(V.t() @ (U @ x[b, t]))))
                h = A @ (x[b, t] * scale)
                h = h / h.square().mean().sqrt() if norm else h
                y = y + 0.7 * gates[b, t, e] * (B @ h)
            torch.testing.assert_close(found[b, t], y, atol=1e-4, rtol=1e-4)
    order = torch.tensor([2, 0, 1])
    form.permute(order)
    torch.testing.assert_close(form(x, gates[..., order]), found, atol=1e-5, rtol=1e-5)


def test_a_fresh_one_changes_nothing_and_is_no_lora():
    form = Gated(6, 5, [2] * 3, form="gated")
    assert form(torch.randn(2, 3, 6), torch.rand(2, 3, 3)).eq(0).all()
    with pytest.raises(ConfigError, match=r"are no LoRA.*they rescale their input"):
        form.mixed(torch.ones(3))
    assert "no slots for LoRAs" in form.why_not_write(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_rank": 0}, "gate_rank of form 'gated' must be a whole number >= 1, got 0"),
        ({"frozen": (1,)}, "cannot freeze single experts"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Gated(6, 5, [2, 2], form="gated", **options)
