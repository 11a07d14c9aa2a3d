"""pytest-benchmark suite: `make bench`. The goals' shapes and ratios are in goals.py."""

import pytest
import torch
from workloads import Heads, Logits, row_op

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["gemms", "fused", "fused_none", "naive"])
def test_heads(benchmark, dtype, variant):
    work = Heads(1024, 512, 16000, DTYPES[dtype])  # a quarter of a second a call
    benchmark.group = f"kd_loss(Head, Head) {dtype} 1024 x 512 x 16000"
    run = work.gemms() if variant == "gemms" else getattr(work, variant)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["fused", "eager", "compiled"])
def test_logits(benchmark, dtype, variant):
    benchmark.group = f"kd_loss(logits, logits) {dtype} 512 x 32000"
    benchmark.pedantic(getattr(Logits(512, 32000, DTYPES[dtype]), variant), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "alpha_beta"])
def test_row_op(benchmark, dtype, name):
    benchmark.group = f"row op {dtype} 256 x 32000"
    benchmark.pedantic(row_op(name, 256, 32000, DTYPES[dtype]), rounds=10, warmup_rounds=2)
