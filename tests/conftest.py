"""What all tests share: the backends and instruction sets that serve on the tests' device, seeds, and the number of
threads. FASTKD_TEST_DEVICE names the device (device.py), FASTKD_TEST_BACKENDS the backends, separated by commas, where
not all that serve there are meant. --shard 2/8 runs every eighth test, from the second one on."""

import os
import signal
import zlib

import pytest
import torch
from device import DEVICE, EMULATED, KIND

from fastkd import testing
from fastkd.backends import BACKENDS, extension

# files that run where the tests' device is the CPU alone: what they are about is the same on every device, or not there
ON_CPU = {
    "test_attention_memory": "resident memory",
    "test_bench": "clocks, tables and the command line",
    "test_cache": "files and the command line",
    "test_cli": "the command line",
    "test_cuda": "the CUDA kernels without a GPU",
    "test_demo": "the demo runs on the CPU",
    "test_diffus": "functions of plain tensors; test_few_step holds them against their truth on the device",
    "test_docs": "documents",
    "test_fsdp": "processes that share the CPU",
    "test_gpu_driver": "what the driver does for a GPU, shown without one",
    "test_kernels": "compilers",
    "test_kl_div": "elsewhere kl_div is torch's own; fastkd validate holds it against float64",
    "test_memory": "resident memory",
    "test_packaging": "wheels",
    "test_plan": "the command line, and resident memory",
    "test_teacher_cache": "files",
    "test_triton": "the Triton kernels without a GPU",
    "test_validate": "the command line, which walks over the devices itself",
}
NOT_EMULATED = ("test_compile", "test_derivatives", "test_attention_")  # for the marker `real`'s reasons
MARKERS = (
    "cpu(reason): runs where the tests' device is the CPU alone",
    "real: needs what an emulated device does not have, such as torch.compile, torch.func, autocast, threads",
)


def chosen():
    """The backends that serve, or those of FASTKD_TEST_BACKENDS: one of them that cannot serve is an error."""
    serving = testing.serving(DEVICE)
    text = "" if EMULATED else os.environ.get("FASTKD_TEST_BACKENDS", "")
    asked = [name for name in text.split(",") if name]
    if absent := [name for name in asked if name not in serving]:
        raise pytest.UsageError(
            f"FASTKD_TEST_BACKENDS names {', '.join(absent)}; on {DEVICE} there are {', '.join(serving)}"
        )
    return [name for name in serving if name in asked] if asked else serving


SERVING = chosen()
FUSED = [name for name in SERVING if BACKENDS[name].rows is not None]
EXTENSION = extension()[0]
ISAS = [] if EXTENSION is None else EXTENSION.isas()
# every backend of the driver; the C++ one once for each instruction set
ENGINES = [e for name in FUSED for e in ([f"{name}-{isa}" for isa in ISAS] if name == "cpu" else [name])]
TILED = [name for name in SERVING if BACKENDS[name].tiles is not None]  # those that have attention
TILED_ENGINES = [e for e in ENGINES if e.partition("-")[0] in TILED]


configuration = None  # pytest's, for its hooks that do without


def pytest_addoption(parser):
    parser.addoption("--shard", metavar="I/N", default="1/1", help="every N-th test alone, from the I-th on")
    parser.addoption("--at-once", action="store_true", help="print a failure when it happens, too")


def pytest_runtest_logreport(report):
    if report.failed and configuration.getoption("--at-once"):
        terminal = configuration.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line(f"\n{report.nodeid}, {report.when}\n{report.longreprtext}")


def pytest_configure(config):
    global configuration
    configuration = config
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))  # 2: rows are shared out among threads
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell, and in all that is started
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config):
    left_out = "" if KIND == "cpu" else "; left out: " + ", ".join(f"{name}* ({why})" for name, why in ON_CPU.items())
    return f"device: {DEVICE}, backends: {', '.join(SERVING)}{left_out}"


def pytest_ignore_collect(collection_path, config):
    left_out = (*(ON_CPU if KIND != "cpu" else ()), *(NOT_EMULATED if EMULATED else ()))
    return True if left_out and collection_path.stem.startswith(left_out) else None


def pytest_collection_modifyitems(config, items):
    """Leaves out what is not for the device, and says how much."""
    left_out = [item for item in items if _left_out(item)]
    items[:] = [item for item in items if not _left_out(item)]
    shard, count = map(int, config.getoption("--shard").split("/"))
    left_out += [item for i, item in enumerate(items) if i % count != shard - 1]
    items[:] = items[shard - 1 :: count]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def _left_out(item):
    marked = {mark.name for mark in item.iter_markers()}
    absent = {"cpu": KIND != "cpu", "gpu": KIND != "cuda", "real": EMULATED}
    return any(absent.get(name) for name in marked)


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


@pytest.fixture(params=TILED)
def tiled(request):
    """Every backend with attention in tiles that can serve here."""
    return request.param


@pytest.fixture(params=[*TILED, *(name for name in SERVING if name == "reference" and not EMULATED)])
def attends(request):
    """The same, and the reference, whose tangent is torch.func's."""
    return request.param


@pytest.fixture(params=ENGINES)
def engine(request):
    """Like `backend`, with each instruction set of the C++ one in turn; gives the backend's name."""
    yield from _with_isa(request.param)


@pytest.fixture(params=TILED_ENGINES)
def tiled_engine(request):
    """Like `tiled`, with each instruction set of the C++ one in turn."""
    yield from _with_isa(request.param)


def _with_isa(engine):
    name, _, isa = engine.partition("-")
    if not isa:
        yield name
        return
    before = EXTENSION.isa()
    EXTENSION.set_isa(isa)
    yield name
    EXTENSION.set_isa(before)
