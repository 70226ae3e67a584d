"""Long sequences in little memory, measured in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_STEP = """
import torch
from rankloom.attention import Factored, certify
from rankloom.attention.polynomial import Isotropic
from rankloom.attention.precondition import Preconditioner

torch.set_num_threads(1)
length, dim, causal = 131072, {dim}, {causal}
q, k, v = ((torch.rand(length, dim) - 0.5).requires_grad_() for _ in range(3))
fitted = Preconditioner.fit(q, k, dim**-0.5)
head = Factored(fitted, Isotropic(dim, {degree}), scale=dim**-0.5, causal=causal)
out, denominators = head(q[None], k, v)
grad = torch.randn_like(out)
dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
found = certify(head, q[None], k, v, out=out, denominators=denominators, grad=grad, gradients=(dq[None], dk, dv))
assert found.rows == 256 and found.reason is None and found.upper < 1e-2, found
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(("dim", "degree", "causal"), [(16, 3, True), (64, 2, False), (64, 2, True)])
def test_131072_tokens_with_a_certificate_in_under_4_gb(dim: int, degree: int, causal: bool) -> None:
    """Forward, backward and certificate of one head; exact weights alone would take 69 GB."""
    step = _STEP.format(dim=dim, degree=degree, causal=causal)
    found = subprocess.run([sys.executable, "-c", step], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    peak = int(found.stdout) * 1024
    assert 0.1e9 < peak < 4e9, f"{peak / 1e9:.2f} GB"
