"""Every loss of few-step generators on the tests' device: values and gradients against its literal transcription."""

import pytest
import torch
from device import DEVICE
from diffusion_continuous import CASES as CONTINUOUS
from diffusion_discrete import CASES as DISCRETE
from diffusion_matching import CASES as MATCHING

CASES = {**CONTINUOUS, **DISCRETE, **MATCHING}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(case, dtype):
    there = {n: x.detach().to(DEVICE).requires_grad_() for n, x in case.leaves(dtype).items()}
    exact = {n: x.detach().to("cpu").double().requires_grad_() for n, x in there.items()}
    up = torch.linspace(-1, 1.5, 4, dtype=torch.float64, device="cpu")
    want, got = case.truth(exact), case(there, reduction="none")
    assert torch.device(got.device).type == torch.device(there[case.learns[0]].device).type
    torch.testing.assert_close(got.detach().to("cpu").double(), want.detach(), rtol=2e-5, atol=1e-6)
    expected = torch.autograd.grad((want * up).sum(), [exact[n] for n in case.learns])
    found = torch.autograd.grad((got.double() * up.to(got.device)).sum(), [there[n] for n in case.learns])
    for g, w in zip(found, expected, strict=True):
        rtol = 1e-2 if g.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(g.to("cpu").double(), w, rtol=rtol, atol=rtol * w.abs().max().item())
    _, masked = case(there, on_nan="mask")
    assert masked == 0
