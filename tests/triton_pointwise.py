"""Run by test_divergences in a process of its own: the Triton table, interpreted, against the definition."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import triton
import triton.language as tl

from fastkd import divergences
from fastkd.kernels import pointwise


@triton.jit
def evaluate(LP, LQ, PHI, H, a, b, N, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    lp = tl.load(LP + i, mask=i < N, other=0.0)
    lq = tl.load(LQ + i, mask=i < N, other=0.0)
    phi, h = pointwise.point(lp, lq, tl.exp(lp), tl.exp(lq), a, b, KIND)
    tl.store(PHI + i, phi, mask=i < N)
    tl.store(H + i, h, mask=i < N)


def main():
    assert set(pointwise.KINDS) == set(divergences.REGISTRY), "the tables differ"
    generator = torch.Generator().manual_seed(0)
    lp, lq = (torch.randn(200, generator=generator).mul(3).log_softmax(0) for _ in range(2))
    lp[:3], lq[2:5] = -torch.inf, -torch.inf  # teacher only, both, student only
    for name, kind in pointwise.KINDS.items():
        for divergence in instances(name):
            a, b = (*divergence.params, 0.0, 0.0)[:2]
            phi, h = torch.full_like(lp, torch.nan), torch.full_like(lp, torch.nan)
            evaluate[(1,)](lp, lq, phi, h, a, b, lp.numel(), KIND=kind, BLOCK=256)
            for got, method in ((phi, divergence.phi), (h, divergence.h)):
                expected = method(lp.double(), lq.double()).float()
                torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6, msg=f"{divergence} {method.__name__}")
    print(f"{len(pointwise.KINDS)} divergences agree")


def instances(name):
    if name == "alpha_beta":
        return [divergences.AlphaBeta(0.5, 0.7), divergences.AlphaBeta(1.5, -0.5)]
    return [divergences.get(name)]


if __name__ == "__main__":
    main()
