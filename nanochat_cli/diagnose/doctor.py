"""`nanochat doctor`: what is installed, what works and what is missing, without names of persons or private folders.

Versions come from package metadata. torch is imported only for the compiled kernels and CUDA devices; if that fails,
the report says so and continues. Nothing is downloaded. Compiled kernels are built if they are not yet.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat_cli import __version__
from nanochat_cli.diagnose.validate.environment import DISTRIBUTION, installed, requirements
from nanochat_cli.errors import ConfigError, ValidationFailure
from nanochat_cli.home import has_home
from nanochat_cli.report import environment
from nanochat_cli.report.quantities import format_quantity
from nanochat_cli.training.cpp_compiler import find_compiler

SIMD_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_int8")
ARM_FLAGS = ("asimd", "asimddp", "i8mm", "sve")
COMMAND_TIMEOUT = 10.0


@dataclass(frozen=True)
class Fact:
    """One line of the report. advice: what to do about it; empty if all is well."""

    name: str
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Extra:
    """An optional part. version: None if it is not installed; unlocks: what it is for."""

    name: str
    version: str | None
    unlocks: str
    install: str


@dataclass(frozen=True)
class Diagnosis:
    """sections: facts by heading, in order."""

    sections: dict[str, list[Fact]]
    optional: list[Extra]

    def as_dict(self) -> dict[str, object]:
        sections = {name: [asdict(fact) for fact in facts] for name, facts in self.sections.items()}
        return {"sections": sections, "optional": [asdict(part) for part in self.optional], "text": self.text()}

    def text(self) -> str:
        """Plain lines to paste into a bug report."""
        lines: list[str] = []
        for heading, facts in self.sections.items():
            lines.append(f"{heading}:")
            lines += [f"  {f.name}: {f.value}" + (f" ({f.advice})" if f.advice else "") for f in facts]
        lines.append("optional:")
        lines += [f"  {part.name}: {part.version or 'not here'}" for part in self.optional]
        return "\n".join(lines) + "\n"


def diagnose() -> Diagnosis:
    """Look at this machine and this installation."""
    sections = {
        "versions": versions(),
        "machine": machine(),
        "devices": devices(),
        "compilers": compilers(),
        "sandbox": sandbox(),
        "space": space(),
    }
    return Diagnosis(
        {
            name: [Fact(f.name, anonymous(f.value), anonymous(f.advice)) for f in facts]
            for name, facts in sections.items()
        },
        [Extra(p.name, None if p.version is None else anonymous(p.version), p.unlocks, p.install) for p in optional()],
    )


def anonymous(text: str) -> str:
    """The text with the home folder as ~, and without NAME in /home/NAME and /Users/NAME."""
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home() raises for a user without a home
    if home not in ("~", "/"):
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return re.sub(r"/(home|Users)/[^/\s:'\"]+", r"/\1/…", text)


# --- the sections -----------------------------------------------------------------------------------------------------


def versions() -> list[Fact]:
    """Python, nanochat, and every package that it requires, with advice if one is missing or too old."""
    git = environment.git_state(Path(__file__).resolve().parent)
    changed = ", with changes" if git and git["dirty"] else ""
    commit = f" (commit {git['commit'][:12]}{changed})" if git else ""
    facts = [Fact("python", platform.python_version()), Fact("nanochat", f"{__version__}{commit}")]
    try:
        required = requirements()
    except ValidationFailure as failure:
        return [*facts, Fact("packages", "unknown", str(failure))]
    for requirement in required:
        version = installed(requirement.name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        facts.append(Fact(requirement.name, version or "not here", "" if fits else f"pip install '{requirement}'"))
    return facts


def machine() -> list[Fact]:
    """Operating system, processor, instruction sets that kernels can use, memory."""
    flags = cpu_flags()
    known = [flag for flag in (*SIMD_FLAGS, *ARM_FLAGS) if flag in flags]
    total, free = environment.memory_bytes(), available_memory()
    memory = format_quantity(total, "B") + ("" if free is None else f", {format_quantity(min(free, total), 'B')} free")
    return [
        Fact("system", platform.platform()),
        Fact("processor", environment.cpu_model() or "unknown"),
        Fact("cores", f"{environment.usable_cores()} of {os.cpu_count()}"),
        Fact("instruction sets", ", ".join(known) or "none that kernels use"),
        Fact("memory", memory),
    ]


def devices() -> list[Fact]:
    """CUDA devices as torch sees them, and whether torch was built for CUDA at all."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Fact("torch", f"cannot be imported: {first_line(str(error))}", "pip install --force-reinstall torch")]
    built = torch.version.cuda
    if not torch.cuda.is_available():
        present = Path("/dev/nvidia0").exists()
        advice = "there is an NVIDIA device: install a driver and a matching torch" if present else ""
        return [Fact("cuda", f"no device; torch is built for {f'CUDA {built}' if built else 'the CPU'}", advice)]
    facts = [Fact("cuda", f"torch is built for CUDA {built}")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = format_quantity(device.total_memory, "B")
        facts.append(Fact(f"cuda:{index}", f"{device.name}, {memory}, capability {device.major}.{device.minor}"))
    return facts


def compilers() -> list[Fact]:
    """The C compiler, the CPU kernels that it builds, the C++ compiler of torch.compile, and Triton."""
    name = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    c = None if name is None else first_line(output(*name.split(), "--version"))
    cxx, works = environment.compiler(), find_compiler()
    slower = "without it training is not compiled"
    return [
        Fact("C", c or "not here", "" if c else "install one, such as gcc: without it the CPU kernels are missing"),
        _kernels(),
        Fact("C++", cxx or "not here", f"{works.obstacle}: {slower}" if works.path is None else ""),
        Fact("triton", installed("triton") or "not here"),
    ]


def _kernels() -> Fact:
    try:
        from nanochat_kernels.backends import Unsupported
        from nanochat_kernels.cpu import native
    except (ImportError, OSError) as error:
        return Fact("CPU kernels", f"cannot be imported: {first_line(str(error))}")
    try:
        return Fact("CPU kernels", f"built, {native.select(None)} form")
    except Unsupported as reason:
        return Fact("CPU kernels", f"not built: {reason}", "slower PyTorch code is used instead")


def sandbox() -> list[Fact]:
    """What holds programs that a model wrote, on this machine."""
    from nanochat_cli.sandbox import system_calls
    from nanochat_cli.sandbox.process import isolation, memory_group

    try:
        found = isolation()
    except ConfigError as error:
        return [Fact("isolation", "none", str(error))]
    weak = "run as root, or allow user namespaces, for a file tree of its own" if found.mode == "limits" else ""
    filtered = f"{len(system_calls.REFUSED)} refused, and new namespaces by clone"
    version = system_calls.landlock_version()
    used = "holds files" if found.mode == "limits" else "not needed"
    return [
        Fact("isolation", found.description, weak),
        Fact("system calls", filtered if system_calls.can_filter() else f"not filtered on {platform.machine()}"),
        Fact("Landlock", f"version {version}, {used}" if version > 0 else "not in this kernel"),
        Fact("memory", "limited by a cgroup" if memory_group() else "looked at 50 times a second, no cgroup here"),
    ]


def space() -> list[Fact]:
    """Free bytes where runs are written and where data sets and kernels are cached."""
    cache = os.environ.get("NANOCHAT_CACHE") or "~/.cache/nanochat"
    places = {"working folder": Path.cwd(), "cache": Path(cache).expanduser() if has_home() else Path.cwd()}
    return [Fact(name, f"{format_quantity(free_bytes(path), 'B')} free") for name, path in places.items()]


def optional() -> list[Extra]:
    """Optional parts, installed or not."""
    packages = (
        (
            "xllamacpp",
            "llama.cpp compared with every export and in `nanochat validate`; `nanochat bench decode`",
            "llama-cpp",
        ),
        ("transformers", "`nanochat export --hf` and `nanochat import` compared with it", "hf"),
        ("flash-linear-attention", "a faster kernel for DeltaNet layers in training, on CUDA", "gpu"),
        ("fastapi", "`nanochat serve`: OpenAI's API, and editors", "serve"),
        ("lm-eval", "the tasks of lm-evaluation-harness, with `nanochat` as a model", "lm-eval"),
    )
    parts = [
        Extra(name, installed(name), use, f"pip install '{DISTRIBUTION}[{extra}]'") for name, use, extra in packages
    ]
    programs = (
        ("rustc", "rustc", "Rust programs in `nanochat eval --suite rust` and `nanochat grpo`", "https://rustup.rs"),
        (
            "bubblewrap",
            "bwrap",
            "generated programs run in it, before our own namespaces",
            "package bubblewrap of the system",
        ),
    )
    return parts + [Extra(name, first_line(output(run, "--version")), use, get) for name, run, use, get in programs]


# --- where the facts come from ----------------------------------------------------------------------------------------


def cpu_flags() -> set[str]:
    """CPU features according to the kernel, if it reports any."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return set(match[1].split()) if match else set()


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, if the kernel says."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def free_bytes(path: Path) -> int:
    """Bytes free for this user on the file system of `path`, or of its nearest existing folder."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def output(*command: str) -> str:
    """Standard output of a program; empty if it is missing or fails."""
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return child.stdout if child.returncode == 0 else ""


def first_line(text: str) -> str | None:
    lines: Sequence[str] = text.strip().splitlines()
    return lines[0] if lines else None
