"""Memory: the peak is the documented one, and offsets are 64-bit."""

from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import Head, chunks, rows_cpu
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
    part = chunks.part_rows(d, size, "cpu") * d * size  # of dW
    allowed = logits + gradients + part + 2 * 2 * v * 4 + 16 * 2**20  # a row a thread, libraries
    if MEASURABLE:
        assert 0 < memory.bytes < allowed, f"{memory.bytes / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f}"
    else:
        assert memory.bytes is None


def test_offsets_beyond_two_to_the_31():
    n, v = 65_700, 32_771  # n * v is just over 2^31; pages that nobody touches take no memory
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


# --- memory that is kept ---

CPU = torch.device("cpu")
MIB = 2**20
pooled = pytest.mark.skipif(rows_cpu.extension()[0] is None, reason="the memory is the C++ extension's")


def large(mib=16, dtype=torch.float32):
    return rows_cpu.empty((mib * MIB // dtype.itemsize,), dtype, CPU)


@pytest.fixture
def pool():
    rows_cpu.release()
    module = rows_cpu.extension()[0]
    before = module.keep_at_most(256 * MIB)
    yield module
    module.keep_at_most(before)
    rows_cpu.release()


@pooled
def test_freed_memory_is_handed_out_again_and_held_memory_never(pool):
    a, b = large(), large()
    assert a.data_ptr() != b.data_ptr() and pool.kept_bytes() == 0
    address, view = a.data_ptr(), a[5:9].view(2, 2)
    del a
    assert pool.kept_bytes() == 0, "a view holds it"
    del view
    assert pool.kept_bytes() == 16 * MIB
    c = large(dtype=torch.bfloat16)
    assert c.data_ptr() == address and pool.kept_bytes() == 0
    del c
    assert large(14).data_ptr() == address, "an eighth smaller"
    assert large(24).data_ptr() != b.data_ptr()
    assert pool.kept_bytes() == 24 * MIB, "what did not fit made room"


@pooled
def test_changing_sizes_do_not_pile_up(pool):
    pool.keep_at_most(2**30)
    for mib in range(16, 200, 12):
        large(mib)
    assert pool.kept_bytes() <= 200 * MIB, "no more than the largest"


@pooled
def test_no_more_than_the_limit_is_kept_and_all_can_be_released(pool):
    held = [large(48) for _ in range(7)]  # 336 MiB; nobody touches them
    last = held[-1].data_ptr()
    while held:
        held.pop(0)
    assert pool.kept_bytes() == 5 * 48 * MIB, "the oldest went, down to 256 MiB"
    assert large(48).data_ptr() == last, "the youngest is warmest"
    rows_cpu.release()
    assert pool.kept_bytes() == 0
    large(258)
    assert pool.kept_bytes() == 0, "larger than the limit"


@pooled
def test_gradients_in_kept_memory_are_ordinary_tensors(pool):
    s, t = torch.randn(3, MIB, requires_grad=True), torch.randn(3, MIB)
    fastkd.kd_loss(s, t, backend="cpu").backward()
    first, kept = s.grad, s.grad.clone()
    s.grad = None
    fastkd.kd_loss(2 * s, t, backend="cpu").backward()  # `first` is still held: its memory is not written
    assert torch.equal(first, kept) and not torch.equal(s.grad, kept)
    assert torch.equal(torch.load(saved(s.grad)), s.grad)
    s.grad.add_(first).zero_()


def saved(x):
    import io

    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return file


# --- dweight, summed in 24 bits ---


@pooled
@pytest.mark.parametrize("isa", [] if rows_cpu.extension()[0] is None else rows_cpu.extension()[0].isas())
@pytest.mark.parametrize("parts", [1, 64, 1000])
def test_a_sum_in_24_bits_is_as_good_as_its_rounding_to_bfloat16(isa, parts):
    generator = torch.Generator().manual_seed(parts)
    a = torch.randn(parts, 37, 33, generator=generator).to(torch.bfloat16)  # sizes that no vector divides
    a[:, 0, 0], a[-1, 0, 1], a[-1, 0, 2] = torch.finfo(torch.bfloat16).max, torch.nan, -torch.inf
    before = rows_cpu.extension()[0].isa()
    rows_cpu.extension()[0].set_isa(isa)
    out = torch.full((37, 33), torch.nan, dtype=torch.bfloat16)
    total = chunks.Sum(out, rows_cpu)
    for i, part in enumerate(a):
        total.add(0, part, first=i == 0)
    total.close()
    rows_cpu.extension()[0].set_isa(before)
    exact = a.double().sum(0)
    assert out[0, 1].isnan() and out[0, 2] == -torch.inf
    assert out[0, 0] == (torch.inf if parts > 1 else torch.finfo(torch.bfloat16).max)
    # each sum is rounded to 16 bits of mantissa, the last to 8; the sums on the way are at most the largest of them
    rounding = a.double().cumsum(0).abs().sum(0) * 2.0**-17 + exact.abs() * 2.0**-8
    assert ((out.double() - exact).abs() <= rounding)[1:].all()
    error = (out.double() - exact)[1:].norm() / exact[1:].norm()
    assert error < 2.0**-8, f"{error:.1e} of {parts} parts: no worse than one rounding"
