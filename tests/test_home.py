"""A user without a home folder: no HOME and no entry in the user list, as in a container with an unknown user id."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_cli.data.prepare import cache_folder
from nanochat_cli.errors import ConfigError
from nanochat_cli.home import provide_home
from tests.e2e.compilers import keep_kernels
from tests.e2e.tiny import TINY, write_corpus

NOBODY = """
import pwd, sys

def nobody(_):
    raise KeyError("getpwuid(): uid not found")

pwd.getpwuid = nobody
from nanochat_cli.cli.app import main
sys.exit(main())
"""


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """This process has no home; temporary files go to `tmp_path`."""

    def nobody(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setenv("HOME", "")  # restored after the test, whatever it sets
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("NANOCHAT_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_training_works_in_an_empty_environment_without_a_home(tmp_path):
    write_corpus(tmp_path / "src")
    home = tmp_path / f"nanochat-{os.getuid()}"
    home.mkdir(mode=0o700)
    keep_kernels(home / ".cache" / "nanochat")
    line = ["train", *TINY, "--set", "train.total_steps=2", "--set", "data.source=src"]
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, "-c", NOBODY, *line], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert [one for one in child.stderr.splitlines() if one.startswith("warning")] == [
        f"warning: this user has no home folder: caches are kept in {home} (set HOME or NANOCHAT_CACHE)"
    ]
    assert (home / ".cache" / "nanochat" / "datasets").is_dir()
    assert not (tmp_path / "~").exists()


def test_a_user_without_a_home_gets_a_private_one(homeless):
    provide_home()
    home = Path(os.environ["HOME"])
    assert home == homeless / f"nanochat-{os.getuid()}"
    assert home.stat().st_mode & 0o777 == 0o700


def test_a_user_with_a_home_keeps_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    provide_home()
    assert (os.environ["HOME"], capsys.readouterr().err) == (str(tmp_path), "")


@pytest.mark.parametrize("trap", ["open to all", "a link"])
def test_a_folder_that_others_can_write_is_not_taken(trap, homeless):
    taken = homeless / f"nanochat-{os.getuid()}"
    if trap == "a link":
        (homeless / "elsewhere").mkdir(mode=0o700)
        taken.symlink_to(homeless / "elsewhere")
    else:
        taken.mkdir()
        taken.chmod(0o777)
    provide_home()
    home = Path(os.environ["HOME"])
    assert home != taken
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("homeless")
def test_a_program_without_a_home_is_told_which_variable_to_set():
    with pytest.raises(ConfigError, match="set NANOCHAT_CACHE"):
        cache_folder()
