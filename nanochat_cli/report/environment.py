"""The circumstances of a measurement: git, versions, machine, date.

A leaf that imports no torch: versions come from package metadata, and the GPU is named only if torch is already
imported. A fact that cannot be determined is None, never a guess.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from nanochat_cli import __version__
from nanochat_cli.errors import DataError
from nanochat_cli.nesting import parse_json

ENVIRONMENT_FILE = "environment.json"
BLEMISHES = "no commit", "uncommitted changes"
_NO_CODE = "benchmarks/results", "docs", "README.md"
_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Instruction sets that our CPU kernels, or torch's, choose between."""
PACKAGES = (
    "torch", "triton", "numpy", "tokenizers", "safetensors", "datasets", "gguf", "pydantic", "xllamacpp",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Plain values for `environment.json`, result files and reports; `blemish` reads them."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(Path(__file__).resolve().parent),
        "versions": {"python": platform.python_version(), **package_versions()},
        "os": platform.platform(),
        "device": gpu_name() or cpu_model(),
        "cpu": cpu_model(),
        "cpu_flags": cpu_flags(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "gpu": gpu_name(),
        "compiler": compiler(),
    }


def blemish(recorded: Mapping[str, Any]) -> str | None:
    """Why a measurement in this environment cannot be traced to a commit, in words; None if it can."""
    git = recorded.get("git") or {}
    if not git.get("commit"):
        return BLEMISHES[0]
    return BLEMISHES[1] if git.get("dirty") is not False else None


def read_environment(run_dir: Path) -> dict[str, Any] | None:
    """A run's `environment.json`; None if it is missing or damaged, since nothing depends on it.

    Raises DataError if it cannot be read now: exported without it, a file would not be the same.
    """
    path = run_dir / ENVIRONMENT_FILE
    try:
        recorded = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; try again, or remove it") from error
    return recorded if isinstance(recorded, dict) else None


def git_state(folder: Path) -> dict[str, Any] | None:
    """`{"commit", "dirty"}` of the checkout that tracks `folder`; None for an installed package or without git.

    Results and the pages that quote them are not code: a new result does not make the next one dirty.
    """
    # The folder must be tracked: a package installed below another project's checkout is not part of it.
    if not _run("git", "-C", str(folder), "ls-files", "."):
        return None
    commit = _run("git", "-C", str(folder), "rev-parse", "HEAD")
    if not commit:
        return None
    changes = "status", "--porcelain", "--untracked-files=no", "--", ":(top)"
    status = _run("git", "-C", str(folder), *changes, *(f":(top,exclude){path}" for path in _NO_CODE))
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def package_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"nanochat": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


@cache
def cpu_model() -> str | None:
    """Model name as the kernel reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine() or None


@cache
def cpu_flags() -> list[str]:
    """Instruction sets that matter to measurements, as the kernel reports them; empty unless on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(match[1].split()) if match else set()
    return [flag for flag in _FLAGS if flag in present]


def usable_cores() -> int:
    """Cores this process may use, by affinity and the CPU quota of its control group; not all of the machine's."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def memory_bytes() -> int:
    """Memory this process may use: that of the machine, or the limit of its control group if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def gpu_name() -> str | None:
    """Name of the current CUDA device; None unless torch is already imported and has one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()


@cache
def compiler() -> str | None:
    """First line of `$CXX --version` (g++ by default): what torch.compile uses on CPU."""
    output = _run(os.environ.get("CXX", "g++"), "--version")
    return output.splitlines()[0] if output else None


def _run(*command: str) -> str | None:
    """Standard output of a command that succeeded, else None."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
