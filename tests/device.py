"""The device of the tests, FASTKD_TEST_DEVICE (None: cpu): new tensors lie on it unless they say otherwise."""

import os

import elsewhere
import pytest
import torch

DEVICE = os.environ.get("FASTKD_TEST_DEVICE") or "cpu"
KIND = torch.device(DEVICE).type if DEVICE != elsewhere.NAME else DEVICE
EMULATED = DEVICE == elsewhere.NAME

if EMULATED:
    elsewhere.enter()
elif DEVICE != "cpu":
    torch.set_default_device(DEVICE)

HERE = str(torch.zeros(0).device)  # as errors name it


def seeded(seed: int = 0) -> torch.Generator:
    """Draws on the device."""
    return elsewhere.generator(seed) if EMULATED else torch.Generator(DEVICE).manual_seed(seed)


LOOKS = pytest.mark.cpu("values are looked at on the CPU alone")


def names(table, *looks):
    """Those of a table, for parametrize; those that begin with one of `looks` are about values, not about the call."""
    return [pytest.param(name, marks=[LOOKS] if name.startswith(looks) else []) for name in table]
