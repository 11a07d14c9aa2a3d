"""The tests on another device than the CPU: an emulated one, which refuses what a GPU refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.cpu("starts processes of its own, for an emulated device")


def elsewhere(*words):
    """A process whose tests' device is the emulated one."""
    paths = [str(HERE), str(HERE.parent)]
    return subprocess.run(
        [sys.executable, *words],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "FASTKD_TEST_DEVICE": "elsewhere", "PYTHONPATH": os.pathsep.join(paths)},
    )


SETUP = """
import device, fastkd, torch
from fastkd import Head, testing
h, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
"""
# what mixes the devices -> the error
MIXED = {
    "h + torch.randn(3, 4, device='cpu')": "expected all tensors on one device",
    "torch.where(h > 0, h, torch.zeros(4, device='cpu'))": "expected all tensors on one device",
    "torch.randn(3, generator=torch.Generator().manual_seed(0))": "expected a generator of the tensor's device",
    "torch.rand(3, device='cpu', generator=device.seeded(0))": "expected a generator of the tensor's device",
    "fastkd.kd_loss(Head(h, w), torch.randn(3, 5, device='cpu'))": "all tensors must be on one device",
    "fastkd.kd_loss(h @ w.T, h @ w.T, backend='cpu')": "backend 'cpu' cannot serve",
}


def test_what_mixes_the_devices_raises():
    one = "try:\n    {0}\n    print('nothing')\nexcept Exception as error:\n    print(error)\n"
    done = elsewhere("-c", SETUP + "".join(map(one.format, MIXED)))
    said = done.stdout.splitlines()
    assert len(said) == len(MIXED), done.stderr
    for code, line in zip(MIXED, said):
        assert MIXED[code] in line, f"{code}: {line}"


def test_results_lie_on_the_device():
    code = """
loss = fastkd.kd_loss(Head(h, w), h.detach() @ w.T, labels=torch.tensor([1, 2, 3]), label_weight=0.5)
loss.backward()
case = testing.Case("kd_loss", "labels", "torch")
assert case.compare()
print(loss.device, h.grad.device, case.device, testing.serving(device.DEVICE), (h + 1).cpu().device)
"""
    done = elsewhere("-c", SETUP + code)
    assert done.stdout == "elsewhere:0 elsewhere:0 elsewhere:0 ['torch', 'reference'] cpu\n", done.stderr


def test_the_suite_runs_there():
    """Two files of it; what is about the CPU is left out, and named."""
    files = [str(HERE / f"test_{name}.py") for name in ("targets", "sparse_errors")]
    done = elsewhere("-m", "pytest", "-p", "no:cacheprovider", *files)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0 and "passed" in last and "deselected" in last, done.stdout[-2000:]
    assert "device: elsewhere, backends: torch, reference" in done.stdout
    assert "test_memory* (resident memory)" in done.stdout
