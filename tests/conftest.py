"""What all tests share: the backends and instruction sets that this machine has, seeds, and the number of threads."""

import os
import zlib

import pytest
import torch

from fastkd.backends import BACKENDS, extension

SERVING = [b.name for b in BACKENDS.values() if b.unavailable() is None]
FUSED = [name for name in SERVING if BACKENDS[name].rows is not None]
EXTENSION = extension()[0]
ISAS = [] if EXTENSION is None else EXTENSION.isas()
# every backend of the driver; the C++ one once for each instruction set
ENGINES = [e for name in FUSED for e in ([f"{name}-{isa}" for isa in ISAS] if name == "cpu" else [name])]


def pytest_configure():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))  # 2: rows are shared out among threads


@pytest.fixture
def seed(request):
    """The same for a test in every run, another one for every test."""
    return zlib.crc32(request.node.nodeid.encode())


@pytest.fixture(autouse=True)
def _seeded(seed):
    torch.manual_seed(seed)


@pytest.fixture(params=SERVING)
def any_backend(request):
    """Every backend that can serve here, the reference among them."""
    return request.param


@pytest.fixture(params=FUSED)
def backend(request):
    """Every backend with row ops that can serve here."""
    return request.param


@pytest.fixture(params=ENGINES)
def engine(request):
    """Like `backend`, with each instruction set of the C++ one in turn; gives the backend's name."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
        return
    before = EXTENSION.isa()
    EXTENSION.set_isa(isa)
    yield name
    EXTENSION.set_isa(before)
