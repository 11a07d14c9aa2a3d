"""What only a GPU can show: the checks of bench/gpu_checks.py, one by one (`make gpu` runs them without pytest)."""

import sys
from pathlib import Path

import pytest
from device import DEVICE

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import gpu_checks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", gpu_checks.CHECKS)
def test_check(name):
    at = gpu_checks.At(gpu_checks.device(DEVICE))
    found = gpu_checks.hold(name, at)
    assert found["verdict"] != "failed", found["note"]
