"""pytest-benchmark suite: `make bench`. Over the work and the variants of `fastkd bench`, at sizes of well under a
second a call; the goals' shapes are in goals.py."""

from functools import partial

import pytest
from row_op import row_op

from fastkd.bench.memory import step
from fastkd.bench.work import WORKS, Case, usual, variants
from fastkd.terminal import DTYPES


def case(work, dtype):
    return Case(work, 512, 16000, 512, 512, dtype, top_k=64).of_its_work()


def cases():
    for work in WORKS:
        for dtype in ("bf16", "fp32"):
            for name in (*usual(case(work, dtype)), WORKS[work].floor):
                yield pytest.param(work, dtype, name, id=f"{work}-{dtype}-{name}")


@pytest.mark.parametrize(("work", "dtype", "name"), cases())
def test_work(benchmark, work, dtype, name):
    at = case(work, dtype)
    inputs = WORKS[work].inputs(at)
    floor = name == WORKS[work].floor
    run = WORKS[work].make_floor(inputs) if floor else partial(step, variants(at)[name](), inputs)
    benchmark.group = str(at)
    benchmark.pedantic(run, rounds=5, warmup_rounds=2)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "alpha_beta"])
def test_row_op(benchmark, dtype, name):
    benchmark.group = f"row op {dtype} 256 x 32000"
    benchmark.pedantic(row_op(name, 256, 32000, DTYPES[dtype]), rounds=10, warmup_rounds=2)
