"""The C++ compiler of this machine, and whether it can build what torch.compile writes for a CPU. No torch.

A compiler that is there may still lack Python's headers (Debian has them in a package of their own) or OpenMP, or not
run at all. So one small program that needs the same is built, once per process.
"""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SECONDS = 60
PROGRAM = "#include <Python.h>\n#include <omp.h>\nint probe() { return omp_get_max_threads() + Py_IsInitialized(); }\n"


@dataclass(frozen=True)
class CppCompiler:
    """path: of a compiler that works, or None; obstacle: why none does, in words."""

    path: str | None
    obstacle: str = ""


@cache
def find_compiler() -> CppCompiler:
    """The first of $CXX, g++, clang++ and c++ that works."""
    obstacles = []
    for name in dict.fromkeys([os.environ.get("CXX", ""), "g++", "clang++", "c++"]):
        if path := shutil.which(name):
            obstacle = _obstacle(path)
            if obstacle is None:
                return CppCompiler(path)
            obstacles.append(f"{path} does not work: {obstacle}")
    return CppCompiler(None, next(iter(obstacles), "no C++ compiler on this machine; install g++ or clang++"))


def _obstacle(compiler: str) -> str | None:
    """The first line of `compiler` that names an error, or None."""
    include = f"-I{sysconfig.get_path('include')}"
    flags = ["-x", "c++", "-", "-std=c++17", "-shared", "-fPIC", "-fopenmp", include]
    try:
        with tempfile.TemporaryDirectory(prefix="nanochat-compiler-") as folder:
            child = subprocess.run(
                [compiler, *flags, "-o", str(Path(folder) / "probe.so")],
                input=PROGRAM,
                env={**os.environ, "LC_ALL": "C"},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS,
                check=False,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if child.returncode == 0:
        return None
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    why = next((line for line in lines if "error" in line), next(iter(lines), f"exit code {child.returncode}"))
    return f"{why} (package python3-dev)" if "Python.h" in why else why
