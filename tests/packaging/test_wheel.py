"""The wheel works without a checkout: packages, presets and console script are inside it."""

import json
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from nanochat_cli import __version__
from tests.e2e.compilers import keep_kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built with hatchling in this environment (no network)."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, unpacked."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True, capture_output=True)
    return target


def run_installed(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run with the installed packages first on the path, from a folder outside the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_both_packages_and_every_preset(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    presets = {path.relative_to(ROOT).as_posix() for path in (ROOT / "presets").rglob("*.toml")}
    assert presets
    assert {f"nanochat_cli/{preset}" for preset in presets} <= names
    assert {"nanochat_cli/cli/app.py", "nanochat_kernels/__init__.py"} <= names
    assert not any(name.startswith(("tests/", "kernels/", "benchmarks/")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_distribution_has_a_name_of_its_own_and_the_command_keeps_its(installed):
    (found,) = metadata.distributions(path=[str(installed)])
    assert (found.name, found.version) == ("nanochat-ternary", __version__)
    assert [(entry.name, entry.value) for entry in found.entry_points] == [("nanochat", "nanochat_cli.__main__:main")]


def test_the_wheel_holds_the_problem_sets(wheel):
    assert {f"nanochat_cli/evaluation/problem_sets/{name}.jsonl" for name in ("python", "rust")} <= set(
        zipfile.ZipFile(wheel).namelist()
    )


def test_the_wheel_holds_the_web_page(wheel):
    page = zipfile.ZipFile(wheel).read("nanochat_cli/serve/page.html")
    assert page == (ROOT / "nanochat_cli" / "serve" / "page.html").read_bytes()


def test_the_wheel_holds_the_c_sources_of_the_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    folder = ROOT / "kernels" / "nanochat_kernels" / "cpu" / "source"
    sources = {path.relative_to(ROOT / "kernels").as_posix() for path in folder.glob("*.[ch]")}
    assert {Path(name).suffix for name in sources} == {".c", ".h"}
    assert sources <= names


def test_the_c_sources_of_the_wheel_are_those_that_compile(installed, tmp_path):
    """The library that this checkout compiled is found under its name, which is a hash of the sources."""
    keep_kernels(tmp_path / "cache")
    (kept,) = (tmp_path / "cache" / "kernels").iterdir()
    probe = "from nanochat_kernels.cpu.build import shared_library; print(shared_library())"
    environment = {**os.environ, "PYTHONPATH": str(installed), "NANOCHAT_CACHE": str(tmp_path / "cache")}
    child = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert Path(child.stdout.strip()) == kept


def test_presets_work_outside_the_checkout(installed, tmp_path):
    child = run_installed(installed, tmp_path, str(installed / "bin" / "nanochat"), "presets", "--quiet")
    assert (child.returncode, child.stderr) == (0, "")
    assert "quickstart" in child.stdout
    show = "from nanochat_cli.config import presets; print(presets.load('quickstart').path)"
    where = run_installed(installed, tmp_path, sys.executable, "-c", show).stdout.strip()
    assert where == str(installed / "nanochat_cli" / "presets" / "models" / "quickstart.toml")


def test_the_kernels_import_without_the_application(installed, tmp_path):
    probe = "import sys, nanochat_kernels; assert 'nanochat_cli' not in sys.modules; print(nanochat_kernels.__file__)"
    child = run_installed(installed, tmp_path, sys.executable, "-c", probe)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == str(installed / "nanochat_kernels" / "__init__.py")


@pytest.mark.slow
def test_the_whole_chain_works_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    command = [str(installed / "bin" / "nanochat"), "validate", "--quick", "--json", str(tmp_path / "found.json")]
    child = run_installed(installed, work, *command)
    assert child.returncode == 0, child.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["environment"]["git"] is None  # it was the wheel that ran
    assert {stage["verdict"] for stage in found["stages"]} <= {"passed", "not here"}
    assert not list(work.iterdir())
