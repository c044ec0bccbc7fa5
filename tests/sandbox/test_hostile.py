"""Programs that mean harm: each must end within its limits and leave the machine as it was.

All run side by side in one pool, before the first assertion; the programs are in `benchmarks/hostile_programs.py`. What
needs namespaces is asserted where the isolation of this machine promises it; `test_isolation_is_named` says which one
that is.
"""

import contextlib
import os
from pathlib import Path

import pytest

from benchmarks.hostile_programs import COMPILE, EXPECTED, LIMITS, PYTHON, RUST, SECRET, breach, release
from nanochat_cli.sandbox import system_calls
from nanochat_cli.sandbox.process import BLOCK, FIRST_UID
from nanochat_cli.sandbox.sandbox import Case, Program, Sandbox


def _children() -> set[int]:
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            found |= {int(word) for word in (task / "children").read_text().split()}
    return found


def _processes(folder: Path) -> set[tuple[int, str]]:
    """Processes of our sandboxes: of the users that they are given, or named by their folders."""
    first = FIRST_UID + os.getpid() % 1000 * BLOCK
    users = range(first, first + BLOCK)
    found = set()
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                command = (path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                if path.stat().st_uid in users or str(folder) in command:
                    found.add((int(path.name), command))
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory):
    before = _children()
    after = release(None, tmp_path_factory.mktemp("host"))
    assert _children() <= before
    return after


def test_there_are_sixty_programs():
    assert len(PYTHON) + len(RUST) >= 60
    assert EXPECTED.keys() <= {f"python: {name}" for name in PYTHON} | {f"rust: {name}" for name in RUST}


def test_isolation_is_named():
    isolation = Sandbox().isolation
    assert isolation.mode in ("namespaces", "bubblewrap", "limits")
    assert "resource limits" in isolation.description


def test_a_program_that_gets_through_is_noticed(monkeypatch):
    program = PYTHON["System V shared memory"]
    held = Sandbox(LIMITS)
    assert breach("", held.execute("python", program)) is None
    monkeypatch.setattr(system_calls, "can_filter", lambda: False)
    assert breach("", held.execute("python", program)) == "it got what it wanted"


@pytest.mark.parametrize("name", [f"python: {name}" for name in PYTHON] + [f"rust: {name}" for name in RUST])
def test_it_is_contained(aftermath, name):
    if name not in aftermath.outcomes:
        pytest.skip("rustc is not installed")
    assert breach(name, aftermath.outcomes[name]) is None, aftermath.outcomes[name]


def test_nothing_outside_changes(aftermath):
    assert (aftermath.folder / "secret").read_text() == SECRET
    assert sorted(path.name for path in aftermath.folder.iterdir()) == ["secret", "temporary"]
    assert not Path("/usr/written").exists()


def test_nothing_reaches_the_network(aftermath):
    assert aftermath.connections == [] or "has network" in Sandbox().isolation.description


@pytest.mark.parametrize("name", ["traces its parent", "becomes root", "mounts", "makes a device"])
def test_no_privilege_is_won(aftermath, name):
    outcome = aftermath.outcomes[f"python: {name}"]
    assert outcome.status != "ok"
    assert outcome.stdout == ""


def test_no_process_survives(aftermath):
    assert _processes(aftermath.folder) == set()


def test_the_disk_holds_no_more_than_the_limits(aftermath):
    allowed = 4 * (COMPILE.disk + LIMITS.disk)
    assert 0 < aftermath.largest < allowed


def test_no_folder_is_left(aftermath):
    assert list((aftermath.folder / "temporary").iterdir()) == []


def test_the_sandbox_still_judges(aftermath):
    tests = (Case("f(2)", "4"),)
    assert Sandbox(LIMITS).judge(Program("python", "def f(x):\n    return x * x\n", tests)).solved
