"""How `main` ends when a command raises: exit codes, one line, and where a traceback goes."""

import errno
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks.update_figures import ROOT
from nanochat_cli.engine import Engine
from nanochat_cli.errors import ConfigError, DataError, Interrupted, NanochatError, ValidationFailure


@pytest.fixture
def failing(monkeypatch):
    """Make `nanochat tokenize` end in a given exception."""

    def fail_with(error: BaseException) -> None:
        def tokenize(*arguments: object, **keywords: object) -> None:
            raise error

        monkeypatch.setattr(Engine, "tokenize", tokenize)

    return fail_with


@pytest.mark.parametrize(
    ("kind", "code"),
    [(NanochatError, 1), (ConfigError, 2), (DataError, 3), (ValidationFailure, 4), (Interrupted, 130)],
)
def test_expected_errors_have_their_exit_codes(nanochat, failing, kind, code):
    failing(kind("what,\nwhere"))
    outcome = nanochat("tokenize")
    assert outcome.code == code
    assert outcome.error == "what, where"


def test_ctrl_c_is_130(nanochat, failing):
    failing(KeyboardInterrupt())
    outcome = nanochat("tokenize")
    assert outcome.code == 130
    assert outcome.error == "interrupted"


def test_an_error_does_not_appear_in_the_middle_of_generated_text(nanochat, monkeypatch):
    def tokenize(engine: Engine, *arguments: object, **options: object) -> None:
        engine.reporter.write("def add(a, b):\n    ret")
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "tokenize", tokenize)
    outcome = nanochat("tokenize")
    assert (outcome.out, outcome.error) == ("def add(a, b):\n    ret\n", "interrupted")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_trouble_with_a_file_is_bad_data_and_names_the_file(nanochat, failing, number):
    failing(OSError(number, "the reason", "some/file"))
    outcome = nanochat("tokenize")
    assert outcome.code == 3
    assert outcome.error == "some/file: the reason"


def test_an_internal_fault_keeps_its_traceback_in_a_file(nanochat, failing, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(ZeroDivisionError("of something"))
    outcome = nanochat("tokenize")
    assert outcome.code == 1
    found = re.fullmatch(
        r"internal error: ZeroDivisionError: of something \(traceback in (\S+); --verbose shows it\)", outcome.error
    )
    assert found is not None
    assert "Traceback" in Path(found[1]).read_text()


def test_verbose_shows_an_internal_fault(nanochat, failing):
    failing(ZeroDivisionError("of something"))
    outcome = nanochat("tokenize", "--verbose")
    assert outcome.code == 1
    assert "Traceback" in outcome.err


def test_a_reader_that_has_left_is_not_an_error(nanochat, failing):
    failing(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert nanochat("tokenize").err == ""


def test_ctrl_c_while_the_program_loads_shows_no_traceback(tmp_path: Path) -> None:
    """The signal arrives in the middle of the command's first import."""
    (tmp_path / "typer.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"]["nanochat"] == "nanochat_cli.__main__:main"
    command = [sys.executable, "-m", "nanochat_cli", "--help"]
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (child.returncode, child.stderr) == (130, "error: interrupted\n")


def test_a_termination_ends_a_command_as_ctrl_c_does_and_a_child_at_once(tmp_path: Path) -> None:
    """Code inside the command forks a child, which SIGTERM must end, and then gets the signal itself."""
    (tmp_path / "typer.py").write_text(
        "import os, signal, time\n"
        "reader, writer = os.pipe()\n"
        "child = os.fork()\n"
        "if not child:\n    os.write(writer, b'.')\n    time.sleep(5)\n"
        "os.read(reader, 1)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(5)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "nanochat_cli", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (ended.returncode, ended.stderr) == (130, "error: interrupted\n")
    assert int(ended.stdout) == -signal.SIGTERM
