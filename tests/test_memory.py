"""Memory: the peak is the documented one, and offsets are 64-bit."""

from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import Head, chunks
from fastkd.machine import PeakMemory
from fastkd.problem import Side
from fastkd.rows_torch import Rows

MEASURABLE = Path("/proc/self/clear_refs").exists()  # Linux alone has a high-water mark that can be reset


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2048, 8192])  # a quarter and all of what the naive loss would take 2 GB for
def test_peak_is_two_chunks_of_logits_and_the_gradients(n, dtype):
    d, v, size = 32, 16384, dtype.itemsize
    heads = [torch.randn(*shape).to(dtype) for shape in ((n, d), (v, d), (n, d), (v, d))]
    heads[0].requires_grad_()
    heads[1].requires_grad_()
    with PeakMemory() as memory:
        fastkd.kd_loss(Head(*heads[:2]), Head(*heads[2:]), backend="cpu").backward()
    logits = 2 * min(max(2**24 // v, 256), 1024) * v * size  # as kd_loss documents it
    gradients = (n * d + v * d) * size + v * d * 4
    allowed = (
        logits + gradients + chunks.PART_BYTES + 2 * 2 * v * 4 + 16 * 2**20
    )  # a part of dW, a row a thread, libraries
    if MEASURABLE:
        assert 0 < memory.bytes < allowed, f"{memory.bytes / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f}"
    else:
        assert memory.bytes is None


def test_offsets_beyond_two_to_the_31():
    n, v = 65_700, 32_771  # n * v is just over 2^31; pages that nobody touches take no memory
    from fastkd import rows_cpu

    s = torch.empty(n, v, dtype=torch.bfloat16)
    s[-1] = torch.randn(v)
    factor, ones = torch.zeros(n), torch.ones(n)
    factor[-1] = 1
    row = Rows(v, Side(), Side(), factor, ones, ones, (fastkd.divergences.ReverseKL(),), ones[None])
    t = torch.randn(1, v).expand(n, v)
    assert s.numel() > 2**31
    loss = rows_cpu.divergence(s, t, None, row)
    expected = fastkd.kd_loss(s[-1:].clone(), t[-1:].clone(), "reverse_kl", backend="torch")
    torch.testing.assert_close(loss[-1], expected)
    assert not loss[:-1].any()
