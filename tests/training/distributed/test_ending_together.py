"""How ranks end: all after the same step when one is told to stop, and all soon, with one line, when one is lost."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.training.distributed.ranks import contents, ended, launcher, line, measured, nanochat, python, start

pytestmark = pytest.mark.slow
LONG = "train.total_steps=100000 train.log_interval=1 eval.interval=100000 checkpoint.interval=5"


def workers(launcher: int) -> dict[int, int]:
    """Process ids of the ranks of a launcher."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        if parent == launcher:
            found |= {int(value[5:]): int(folder.name) for value in environment if value.startswith(b"RANK=")}
    return found


def begun(folder: Path, settings: str = "") -> "subprocess.Popen[str]":
    """A run of two ranks that has logged ten steps and saved."""
    arguments = [word for word in line("run", f"{LONG} {settings}") if word != "--quiet"]
    process = nanochat(folder, 2, arguments)
    assert process.stderr is not None
    for text in process.stderr:
        if text.startswith("step 10/"):
            return process
    raise AssertionError("it ended")


def errors(process: "subprocess.Popen[str]") -> list[str]:
    """What it says until it ends, without the lines of steps."""
    assert process.stderr is not None
    said = [text for text in process.stderr if not text.startswith(("step ", "SIGTERM: stopping"))]
    process.wait()
    return said


def continued(folder: Path, settings: str) -> int:
    """The exit code of going on with the run in one process."""
    words = [part for setting in settings.split() for part in ("--set", setting)]
    process = nanochat(folder, 1, ["train", "--quiet", "--resume", "runs/run", *words])
    process.communicate()
    return process.returncode


@pytest.mark.parametrize("mode", ["owned", "fsdp"])
def test_a_killed_rank_ends_all_within_a_minute_and_the_last_checkpoint_goes_on(folder, mode):
    process = begun(folder, f"distributed.mode={mode}")
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    killed = time.monotonic()
    said = errors(process)
    assert time.monotonic() - killed < 60
    assert process.returncode == 3
    assert len(said) == 1, said
    assert said[0].startswith("error: another rank has ended")
    saved = int((folder / "runs/run/checkpoints/latest").read_text().strip().removeprefix("step-"))
    assert saved >= 5
    assert continued(folder, f"train.total_steps={saved + 2}") == 0


@pytest.mark.parametrize("to", ["launcher", "rank 1"])
def test_a_signal_stops_all_ranks_after_the_same_step_and_everything_is_saved(folder, to):
    process = begun(folder)
    os.kill(process.pid if to == "launcher" else workers(process.pid)[1], signal.SIGTERM)
    said = errors(process)
    assert process.returncode == 130
    assert len(said) == 1, said
    found = re.search(r"stopped by .* after step (\d+), everything saved", said[0])
    assert found is not None, said
    assert (folder / "runs/run/checkpoints/latest").read_text().strip() == f"step-{int(found[1]):06d}"


def test_an_error_of_every_rank_is_one_line(folder):
    process = nanochat(folder, 2, line("run", "collider.enabled=true collider.score=excess collider.reference=nowhere"))
    said = errors(process)
    assert process.returncode in (2, 3)
    assert len(said) == 1, said
    assert "nowhere" in said[0]


def test_other_commands_do_not_run_on_several_ranks(folder):
    process = python(folder, *launcher(2), "-m", "nanochat_cli", "bench", "e3", "--quick")
    said = process.communicate()[1]
    assert process.returncode != 0
    assert said.count("error: nanochat bench runs in one process") == 1


def test_a_launcher_that_restarts_a_killed_rank_gets_the_run_that_nobody_killed(folder):
    arguments = [word for word in line("run", f"{LONG} train.total_steps=150") if word != "--quiet"]
    process = python(folder, *launcher(2, "--max-restarts", "1"), "-m", "nanochat_cli", *arguments, "--resume", "auto")
    assert process.stderr is not None
    said = []
    for text in process.stderr:
        said.append(text)
        if text.startswith("step 10/") and not any(earlier.startswith("step 10/") for earlier in said[:-1]):
            os.kill(workers(process.pid)[1], signal.SIGKILL)
    assert process.wait() == 0, "".join(said)[-4000:]
    assert sum(text.startswith("resumed at step ") for text in said) == 1
    ended(start(folder, 1, [line("whole", f"{LONG} train.total_steps=150")]))
    assert contents(folder / "runs/run") == contents(folder / "runs/whole")
    assert measured(folder / "runs/run") == measured(folder / "runs/whole")
