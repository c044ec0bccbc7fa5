"""`nanochat doctor`: what it finds, what it advises about missing parts, and what it never reveals."""

import builtins
import json
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from nanochat_cli.diagnose import doctor
from nanochat_cli.diagnose.doctor import Fact, anonymous, diagnose
from nanochat_cli.errors import ConfigError
from nanochat_cli.training.cpp_compiler import CppCompiler


def facts(section: list[Fact]) -> dict[str, Fact]:
    return {fact.name: fact for fact in section}


def test_versions_are_those_of_the_metadata_and_nothing_is_wrong_here():
    found = facts(doctor.versions())
    assert found["python"].value == platform.python_version()
    for name in ("torch", "tokenizers", "gguf", "datasets"):
        assert found[name].value == metadata.version(name)
    assert not any(fact.advice for fact in found.values())


def test_a_package_that_is_too_old_or_missing_comes_with_the_command_that_helps(monkeypatch):
    def version(name: str) -> str:
        if name == "gguf":
            raise metadata.PackageNotFoundError(name)
        return "0.1"

    monkeypatch.setattr(metadata, "version", version)
    found = facts(doctor.versions())
    assert found["gguf"].value == "not here"
    assert found["gguf"].advice.startswith("pip install 'gguf>=")
    assert (found["torch"].value, found["torch"].advice[:20]) == ("0.1", "pip install 'torch<2")


def test_the_machine_has_cores_memory_and_instruction_sets():
    found = facts(doctor.machine())
    assert int(found["cores"].value.split()[0]) == len(os.sched_getaffinity(0))
    assert found["memory"].value.endswith(" free")
    assert found["instruction sets"].value


def test_kernels_are_built_and_named_by_their_form():
    from nanochat_kernels.cpu import native

    assert facts(doctor.compilers())["CPU kernels"].value == f"built, {native.select(None)} form"


def test_without_a_compiler_it_says_what_to_do(monkeypatch):
    from nanochat_kernels.backends import Unsupported
    from nanochat_kernels.cpu import native

    def none():
        raise Unsupported("no C compiler (cc, gcc, clang): install one, such as gcc")

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native, "library", none)
    found = facts(doctor.compilers())
    assert (found["C"].value, found["C"].advice[:11]) == ("not here", "install one")
    assert found["CPU kernels"].value == "not built: no C compiler (cc, gcc, clang): install one, such as gcc"
    assert found["CPU kernels"].advice == "slower PyTorch code is used instead"


def test_a_compiler_that_cannot_build_for_torch_is_reported_with_its_reason(monkeypatch):
    lacking = CppCompiler(None, "/usr/bin/g++ does not work: Python.h: No such file (package python3-dev)")
    monkeypatch.setattr(doctor, "find_compiler", lambda: lacking)
    advice = facts(doctor.compilers())["C++"].advice
    assert advice == f"{lacking.obstacle}: without it training is not compiled"


def test_a_torch_that_cannot_be_imported_is_a_finding_not_a_fault(monkeypatch):
    real = builtins.__import__

    def broken(name, *arguments, **options):
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    (fact,) = doctor.devices()
    assert fact.value == "cannot be imported: libcudart.so.13: cannot open shared object file"
    assert fact.advice


def test_a_cuda_device_is_named_with_its_memory(monkeypatch):
    import torch

    class Properties:
        name, total_memory, major, minor = "NVIDIA H100", 80_000_000_000, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert facts(doctor.devices())["cuda:0"].value == "NVIDIA H100, 80.0 GB, capability 9.0"


def test_it_says_what_holds_programs_of_a_model(monkeypatch):
    from nanochat_cli.sandbox import process, system_calls

    found = facts(doctor.sandbox())
    assert found["isolation"].value == process.isolation().description
    assert found["system calls"].value.split()[0] == str(len(system_calls.REFUSED))
    monkeypatch.setattr(system_calls, "can_filter", lambda: False)
    monkeypatch.setattr(system_calls, "landlock_version", lambda: -1)
    monkeypatch.setattr(process, "isolation", lambda: process.Isolation("limits", False, "resource limits only"))
    found = facts(doctor.sandbox())
    assert found["isolation"].advice.startswith("run as root")
    assert found["system calls"].value.startswith("not filtered on ")
    assert found["Landlock"].value == "not in this kernel"

    def none():
        raise ConfigError("the sandbox cannot start a process: run on Linux")

    monkeypatch.setattr(process, "isolation", none)
    (fact,) = doctor.sandbox()
    assert (fact.value, fact.advice) == ("none", "the sandbox cannot start a process: run on Linux")


def test_optional_parts_say_what_they_are_for_and_how_to_get_them():
    parts = {part.name: part for part in doctor.optional()}
    packages = {"xllamacpp", "transformers", "flash-linear-attention", "fastapi", "lm-eval"}
    assert packages | {"rustc", "bubblewrap"} == parts.keys()
    assert all(part.unlocks and part.install for part in parts.values())
    try:
        assert parts["xllamacpp"].version == metadata.version("xllamacpp")
    except metadata.PackageNotFoundError:
        assert parts["xllamacpp"].version is None


MODULES = {
    "xllamacpp": "xllamacpp",
    "transformers": "transformers",
    "flash-linear-attention": "fla",
    "fastapi": "fastapi",
    "lm-eval": "lm_eval",
}
"""Of the first package of every extra."""


def test_every_extra_for_users_unlocks_code_that_is_here_and_is_advised():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = {name: required for name, required in project["optional-dependencies"].items() if name not in DEVELOPERS}
    packages = {re.split("[<>=]", required)[0]: name for name, (required, *_) in extras.items()}
    assert packages.keys() == MODULES.keys()
    source = "".join(path.read_text() for path in Path(doctor.__file__).parents[1].rglob("*.py"))
    advised = {part.name: part.install for part in doctor.optional()}
    for package, extra in packages.items():
        assert re.search(rf"(import|from|find_spec\(\")\s*{MODULES[package]}\b", source), package
        assert f"nanochat-ternary[{extra}]" in advised[package]


DEVELOPERS = ("docs", "test", "dev")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HOME/.cache/x", "~/.cache/x"),
        ("HOME", "~"),
        ("HOME-2/x", "HOME-2/x"),
        ("/home/anna/bin/gcc failed: /Users/bob/x", "/home/…/bin/gcc failed: /Users/…/x"),
        ("gcc 12.2.0", "gcc 12.2.0"),
    ],
)
def test_homes_and_names_are_left_out(text, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert anonymous(text.replace("HOME", str(tmp_path))) == expected.replace("HOME", str(tmp_path))


def test_nothing_in_the_report_names_the_home_folder(monkeypatch, tmp_path):
    home = tmp_path / "home" / "zacharias"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(doctor, "_kernels", lambda: Fact("CPU kernels", f"not built: {home}/cc failed", f"see {home}"))
    everything = json.dumps(diagnose().as_dict(), ensure_ascii=False)
    assert "zacharias" not in everything
    assert "not built: ~/cc failed" in everything


def test_free_space_of_a_folder_that_does_not_exist_is_that_of_its_parent(tmp_path):
    assert doctor.free_bytes(tmp_path / "a" / "b") > 0


def test_the_command_ends_with_0_in_seconds_and_writes_json(tmp_path):
    command = [sys.executable, "-m", "nanochat_cli", "doctor", "--plain", "--json", str(tmp_path / "found.json")]
    started = time.perf_counter()
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    # Five seconds on an idle machine; other processes may be using the cores.
    assert time.perf_counter() - started < 30
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert child.stdout == found["text"]
    assert [line for line in child.stdout.splitlines() if not line.startswith(" ")] == [
        "versions:",
        "machine:",
        "devices:",
        "compilers:",
        "sandbox:",
        "space:",
        "optional:",
    ]
    assert str(Path.home()) not in child.stdout


def test_the_tables_show_every_section(capfd, monkeypatch):
    from nanochat_cli.cli.app import main

    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    out = capfd.readouterr().out
    for heading in ("versions", "machine", "devices", "compilers", "sandbox", "space", "optional parts"):
        assert heading in out
