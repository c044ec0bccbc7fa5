"""A folder is held by one process, through a lock of the kernel: as other, killed and forked processes see it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_cli.folders import HeldError, held_file, held_folder, holder_of

ROOT = Path(__file__).resolve().parents[1]
HOLDER = """
import os, sys
from pathlib import Path
from nanochat_cli.folders import held_folder
with held_folder(Path(sys.argv[1]), "trains"):
    if "fork" in sys.argv:
        if os.fork() == 0:
            print("held", flush=True)  # it has closed its copy
            sys.stdin.readline()
            os._exit(0)
    if "fork" not in sys.argv:
        print("held", flush=True)
    sys.stdin.readline()
    Path(sys.argv[1], "result").touch()
"""


def hold(folder: Path, *options: str) -> "subprocess.Popen[str]":
    """A process that holds `folder` until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_holds_it_and_what_to_do(tmp_path):
    with hold(tmp_path / "run") as process:
        assert re.fullmatch(rf"process {process.pid} \(since \S+ \S+\) trains", holder_of(tmp_path / "run") or "")
        with pytest.raises(HeldError) as caught, held_folder(tmp_path / "run", "trains"):
            pass
        assert caught.value.exit_code == 2
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / 'run'}: process {process.pid} (since ")
        assert message.endswith(f"trains it; wait until it ends or stop it (kill {process.pid}), and try again")
        process.kill()
    with held_folder(tmp_path / "run", "trains"):
        assert holder_of(tmp_path / "run") is not None
    assert holder_of(tmp_path / "run") is None


def test_a_forked_child_does_not_keep_it_when_the_parent_is_killed(tmp_path):
    process = hold(tmp_path / "run", "fork")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with held_folder(tmp_path / "run", "trains"):
        pass
    assert process.stdin is not None
    process.stdin.close()  # the child, which had it too, ends


def test_a_waiting_process_gets_it_when_the_holder_ends_and_the_folder_outlives_both(tmp_path):
    said = []
    with hold(tmp_path / "run") as process:

        def end(line: str) -> None:
            said.append(line)
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

        with held_folder(tmp_path / "run", "prepares", waiting=end):
            assert (tmp_path / "run" / "result").exists(), "the holder had not ended"
    assert len(said) == 1
    assert "trains it; waiting for it" in said[0]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["result"]


def test_a_new_folder_that_stays_empty_is_removed_and_an_older_one_stays(tmp_path):
    (tmp_path / "old").mkdir()
    for folder in ("old", "new/deep"):
        with pytest.raises(ZeroDivisionError), held_folder(tmp_path / folder, "trains"):
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert not list((tmp_path / "old").iterdir())


def test_a_file_is_held_beside_its_place(tmp_path):
    model = tmp_path / "model.gguf"
    with held_file(model, "writes"), pytest.raises(HeldError, match=r"model\.gguf: process \d+.*writes it"):
        held_file(model, "writes").__enter__()
    assert not list(tmp_path.iterdir())
