"""The Triton twin equals `dense`, in Triton's interpreter; nothing here has run on a GPU."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from molora.kernels.choose import definition
from molora.kernels.layout import Layout
from molora.kernels.triton import triton

torch.manual_seed(0)
worst = {}
for lead, experts, rank, d_in, d_out in [((2, 9), 8, 4, 40, 24), ((1, 1), 3, 8, 33, 70), ((20,), 16, 4, 70, 65)]:
    for dtype in (torch.float32, torch.bfloat16):
        layout = Layout((rank,) * experts, scale=1.5)
        x, y = torch.randn(*lead, d_in).to(dtype), torch.randn(*lead, d_out).to(dtype)
        A, B = torch.randn(experts * rank, d_in), torch.randn(d_out, experts * rank)
        gates = torch.rand(*lead, experts) * (torch.rand(*lead, experts) > 0.5)
        wanted = definition(y, x, A, B, gates, layout)
        for in_place in (False, True):
            into = y.clone()
            found = triton(into, x, A, B, gates, layout, in_place)
            assert found.dtype == wanted.dtype and (found.data_ptr() == into.data_ptr()) == in_place
            error = ((found - wanted).double().abs().max() / wanted.double().abs().max()).item()
            worst[dtype] = max(worst.get(dtype, 0), error)
assert worst[torch.float32] < 1e-5, worst
assert worst[torch.bfloat16] < 2 * torch.finfo(torch.bfloat16).eps, worst
print("equal")
"""


def test_it_equals_dense_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout.strip().endswith("equal"), run.stderr[-2000:]
