"""A command line that runs in this process, in an empty working folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat_cli.cli.app import main


@dataclass(frozen=True)
class Outcome:
    """The result of a command line."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error, without its prefix; fails if standard error holds anything else."""
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip("\n")


Nanochat = Callable[..., Outcome]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an empty cache beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def nanochat(folder: Path, capfd: pytest.CaptureFixture[str]) -> Nanochat:
    """`nanochat("train", "--preset", "x")`, in `folder`."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
