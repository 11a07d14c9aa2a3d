"""Imports every module of the installed fastkd: python import_everything.py FOLDER, where it must be installed.

Modules are found as files, because pkgutil does not see fastkd.kernels, which has no __init__.py.
"""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import fastkd

package = Path(fastkd.__file__).resolve().parent
assert package.is_relative_to(Path(sys.argv[1]).resolve()), f"expected fastkd under {sys.argv[1]}, found {package}"

imported, skipped = [], []
for path in sorted(package.rglob("*.py")):
    parts = path.relative_to(package.parent).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    try:
        importlib.import_module(name)
        imported.append(name)
    except ModuleNotFoundError as error:
        if error.name != "triton" or find_spec("triton"):
            raise
        skipped.append(name)

kernels = [name for name in imported + skipped if name.startswith("fastkd.kernels.")]
assert kernels, "no module in fastkd.kernels"
assert (package / "py.typed").is_file(), "py.typed is missing"
for name in skipped:
    print(f"not imported, triton is not installed: {name}")
print("imported:", *imported)

import fastkd._C  # noqa: E402

print("row ops in C++ for:", fastkd._C.isa())
