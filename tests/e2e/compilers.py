"""Machines with broken compilers, simulated by programs of those names first on PATH."""

import os
import shutil
import sysconfig
from contextlib import suppress
from pathlib import Path

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.cpu.build import shared_library

COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++")


def environment(bin_folder: Path, cache: Path, **more: str) -> dict[str, str]:
    """The environment of a process that finds `bin_folder` first, has one thread and an empty cache of compiled code.

    What would name a compiler or another cache is left out.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CPATH")}
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "NANOCHAT_CACHE": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    return {**kept, **own, "OMP_NUM_THREADS": "1", **more}


def keep_kernels(cache: Path) -> None:
    """Put the CPU kernels, as this machine compiled them before, into an empty cache: compiling has its own tests."""
    with suppress(Unsupported):  # a machine without a compiler has none
        library = shared_library()
        (cache / "kernels").mkdir(mode=0o700, parents=True)
        shutil.copy(library, cache / "kernels")


def write_broken_compilers(folder: Path, names: tuple[str, ...] = COMPILERS) -> Path:
    """A folder of compilers that print an error and exit with 1."""
    return _write(folder, names, "echo 'error: this compiler is broken' >&2\nexit 1\n")


def write_compiler_without_python_headers(folder: Path) -> Path:
    """A folder with a g++ that works, except that Python.h cannot be found, as without python3-dev."""
    real = shutil.which("g++")
    assert real is not None
    include = sysconfig.get_path("include")
    body = (
        f'for word; do shift; case "$word" in -I{include}*) ;; *) set -- "$@" "$word";; esac; done\nexec {real} "$@"\n'
    )
    return _write(folder, ("g++", "c++"), body)


def _write(folder: Path, names: tuple[str, ...], body: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        program = folder / name
        program.write_text(f"#!/bin/sh\n{body}", encoding="utf-8")
        program.chmod(0o755)
    return folder
