"""What is built from the tree works away from it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_BEHIND = (".git", ".venv", "dist", "lib.*", "bdist.*", "*.egg-info", "*.so", "__pycache__", ".*_cache")
SOURCES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastkd").glob("**/*.py")}
SOURCES |= {f"fastkd/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}


def run(*command, cwd, **environment):
    """Runs python on `command`; a variable of None is unset."""
    env = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)


def run_with(site, *command, cwd):
    """Runs python with the packages of `site` before this environment's; -S: without a fastkd installed editably."""
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return run("-S", *command, cwd=cwd, PYTHONPATH=path)


def copy_tree(to, *left_behind):
    """A copy of the source tree, with what was compiled already unless "build" is left behind."""
    shutil.copytree(ROOT, to, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_BEHIND, *left_behind))
    return to


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("packaging") / "tree")


@pytest.fixture(scope="module")
def wheel(tree):
    result = run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", ".", cwd=tree)
    assert result.returncode == 0, result.stdout + result.stderr
    return next((tree / "dist").glob("*.whl"))


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    extension = {name for name in names if name.startswith("fastkd/_C.")}
    assert "fastkd/kernels/pointwise.py" in names
    assert names - extension == SOURCES | {"fastkd/py.typed"}
    assert len(extension) == 1


def test_the_source_distribution_holds_every_source(tree):
    result = run("-m", "build", "--sdist", "--no-isolation", "--outdir", "sdist", ".", cwd=tree)
    assert result.returncode == 0, result.stdout + result.stderr
    with tarfile.open(next((tree / "sdist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert names >= SOURCES | csrc | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "fastkd/py.typed"}


def test_everything_imports_from_the_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    result = run("-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    result = run_with(site, ROOT / "tests" / "import_everything.py", site, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "row ops in C++ for: " in result.stdout


@pytest.mark.parametrize("required", [None, "1"])
def test_a_failing_compiler(required, tmp_path):
    """The install goes on without the extension and says so, unless FASTKD_REQUIRE_EXT asks for an error."""
    tree, site = copy_tree(tmp_path / "tree", "build"), tmp_path / "site"
    install = ["-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--target", site, "."]
    result = run(*install, cwd=tree, CXX="/bin/false", FASTKD_REQUIRE_EXT=required)
    output = result.stdout + result.stderr
    if required:
        assert result.returncode != 0
        assert "fastkd._C was not built and FASTKD_REQUIRE_EXT is set" in output
        return
    assert result.returncode == 0, output
    assert output.count("fastkd: the C++ extension was not built") == 1
    assert not list((site / "fastkd").glob("_C*"))

    script = "import json, fastkd.doctor; print(json.dumps(fastkd.doctor.examine()))"
    result = run_with(site, "-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    serves = {backend["name"]: backend["serves"] for backend in json.loads(result.stdout)["backends"]}
    assert serves["torch"]
    assert not serves["cpu"]


FIND = """
import importlib.util
spec = importlib.util.spec_from_file_location("setup_of_fastkd", "setup.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.find_nvcc())
"""


@pytest.mark.parametrize(("releases", "found"), [(("12.4", "13.0"), 1), (("13.1", "12.8"), 0), (("9.2", "12.8"), 1)])
def test_the_first_nvcc_that_is_new_enough(tmp_path, releases, found):
    for folder, release in zip(("home/bin", "path"), releases):
        nvcc = tmp_path / folder / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
        nvcc.chmod(0o755)
    path = f"{tmp_path / 'path'}{os.pathsep}{os.environ['PATH']}"
    for wanted, expected in (("1", str(tmp_path / ("home/bin", "path")[found] / "nvcc")), ("0", "None")):
        result = run("-c", FIND, cwd=ROOT, CUDA_HOME=str(tmp_path / "home"), PATH=path, FASTKD_CUDA=wanted)
        assert result.stdout.strip() == expected, result.stderr


def test_transformers_is_the_same_from_the_root_of_the_tree(tmp_path):
    """transformers probes for a package named kernels; the folder of that name must not pass for it."""
    script = (
        "from transformers import LlamaForCausalLM; from transformers.utils import is_kernels_available; "
        "print(is_kernels_available())"
    )
    inside, outside = (run("-c", script, cwd=cwd, HF_HUB_OFFLINE="1") for cwd in (ROOT, tmp_path))
    assert outside.returncode == 0, outside.stderr
    assert inside.returncode == 0, inside.stderr
    assert inside.stdout == outside.stdout


def test_the_root_of_the_tree_does_not_hide_the_package_kernels(tmp_path):
    """Where the package of that name is installed, it is found from the root too."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    result = run("-c", "import kernels; print(kernels.__file__)", cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == tmp_path / "kernels" / "__init__.py"


@pytest.mark.parametrize(
    ("module", "folder"),
    [("mutate", "."), ("mutate_cuda", "csrc"), ("mutate_diffusion", "."), ("mutate_triton", ".")],
)
def test_every_mutant_is_of_code_that_is_there(module, folder):
    lost = (
        f"import {module} as m; print([n for n, (path, old, _) in m.MUTANTS.items() if old not in open(path).read()])"
    )
    done = run("-c", lost, cwd=ROOT / folder, PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
