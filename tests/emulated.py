"""The CUDA kernels on the CPU: builds csrc/*.cu and emulated.cpp as C++ under cuda_cpu.h, and loads the module.

python tests/emulated.py MODULE        holds the row ops of a built module to their rule, one case after the other
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]


def build(folder, csrc=HERE.parent / "csrc", flags=(), sources=None):
    """Builds fastkd_emulated in `folder`; ``sources``: those that changed since (None: all)."""
    import pybind11

    cxx = os.environ.get("CXX", "g++")
    sources = [*sorted(Path(csrc).glob("*.cu")), HERE / "emulated.cpp"] if sources is None else sources
    include = [f"-I{path}" for path in (csrc, HERE, sysconfig.get_path("include"), pybind11.get_include())]

    def compiled(source):
        target = Path(folder, f"{source.name}.o")
        command = [cxx, *FLAGS, *flags, *include, "-include", "cuda_cpu.h", "-x", "c++", "-c", source, "-o", target]
        subprocess.run(list(map(str, command)), check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, sources))
    objects = sorted(Path(folder).glob("*.o"))
    module = Path(folder, "fastkd_emulated" + sysconfig.get_config_var("EXT_SUFFIX"))
    subprocess.run([cxx, *flags, "-shared", *map(str, objects), "-o", str(module)], check=True)
    return module


def load(path):
    spec = importlib.util.spec_from_file_location("fastkd_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    import emulated_cases

    from fastkd import rows_cuda

    rows_cuda.EMULATED = load(sys.argv[1])
    for cluster in (0, 2):
        rows_cuda.CLUSTER = cluster
        for case in emulated_cases.CASES:
            print(case, flush=True)
            emulated_cases.CASES[case](case)
    print(f"{len(emulated_cases.CASES)} cases hold")


if __name__ == "__main__":
    main()
