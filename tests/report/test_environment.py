"""The environment names what is really there, and None for what is not."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import pytest

from nanochat_cli.report.environment import blemish, environment, git_state


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    package = tmp_path / "package"
    package.mkdir()
    (package / "module.py").write_text("a = 1\n")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-q", "-m", "first")
    return package


def test_it_is_plain_json_with_the_versions_that_are_installed() -> None:
    found = json.loads(json.dumps(environment()))
    assert found["versions"]["python"] == platform.python_version()
    for name in ("torch", "numpy", "safetensors"):
        assert found["versions"][name] == metadata.version(name)
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**27
    assert found["cpu"]
    assert abs(datetime.fromisoformat(found["date"]) - datetime.now(UTC)) < timedelta(minutes=5)


def test_a_clean_checkout_and_a_changed_one(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_state(checkout) == {"commit": commit, "dirty": False}
    (checkout / "untracked.txt").write_text("not part of what ran")
    assert git_state(checkout) == {"commit": commit, "dirty": False}
    (checkout / "module.py").write_text("a = 2\n")
    assert git_state(checkout) == {"commit": commit, "dirty": True}


def test_results_and_pages_that_changed_do_not_make_the_code_dirty(checkout: Path) -> None:
    top = checkout.parent
    (top / "benchmarks" / "results").mkdir(parents=True)
    (top / "docs").mkdir()
    changed = [top / "benchmarks" / "results" / "a.json", top / "docs" / "a.md", top / "README.md"]
    for path in (*changed, top / "benchmarks" / "a.py"):
        path.write_text("first")
    git(top, "add", ".")
    git(top, "commit", "-q", "-m", "second")
    for path in changed:
        path.write_text("second")
    assert git_state(checkout) == {"commit": git(top, "rev-parse", "HEAD"), "dirty": False}
    (top / "benchmarks" / "a.py").write_text("second")
    assert git_state(checkout) == {"commit": git(top, "rev-parse", "HEAD"), "dirty": True}


@pytest.mark.parametrize(
    ("git_state_found", "words"),
    [
        ({"commit": "c", "dirty": False}, None),
        ({"commit": "c", "dirty": True}, "uncommitted changes"),
        ({"commit": "c", "dirty": None}, "uncommitted changes"),
        ({"commit": None, "dirty": False}, "no commit"),
        (None, "no commit"),
    ],
)
def test_a_measurement_is_traceable_only_to_a_commit_without_changes(git_state_found, words) -> None:
    assert blemish({"git": git_state_found}) == words


def test_the_flags_of_the_cpu_are_those_that_torch_sees() -> None:
    import torch

    assert ("avx2" in environment()["cpu_flags"]) == torch.cpu._is_avx2_supported()
    assert ("avx512_vnni" in environment()["cpu_flags"]) == torch.cpu._is_vnni_supported()


def test_a_package_that_is_not_tracked_has_no_git_state(checkout: Path, tmp_path: Path) -> None:
    installed = checkout.parent / ".venv" / "site-packages"
    installed.mkdir(parents=True)
    assert git_state(installed) is None
    assert git_state(tmp_path / "missing") is None


def test_without_git_the_state_is_unknown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state(checkout) is None
    assert environment()["git"] is None


def test_it_does_not_import_torch() -> None:
    code = (
        "import sys; from nanochat_cli.report import environment as e; e.environment(); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
