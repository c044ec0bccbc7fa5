"""Where a cgroup for a run can be made, what is written into it, and that a real one ends what needs too much."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_cli.sandbox import cgroups
from nanochat_cli.sandbox.limits import MIB, Limits
from nanochat_cli.sandbox.process import memory_group
from nanochat_cli.sandbox.sandbox import Sandbox

FILES = "cgroup.procs memory.max memory.swap.max memory.oom.group".split()


@pytest.fixture
def tree(tmp_path):
    """A cgroup file system of plain files: /, /user, /user/session, of which only / gives memory to its children."""
    root = tmp_path / "cgroup"
    for folder, controllers in [(root, "cpu memory pids"), (root / "user", "pids"), (root / "user/session", "")]:
        folder.mkdir(parents=True)
        (folder / "cgroup.subtree_control").write_text(controllers + "\n")
        (folder / "cgroup.procs").write_text("")
    (tmp_path / "mounts").write_text(f"proc /proc proc rw 0 0\ncgroup2 {root} cgroup2 rw 0 0\n")
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/user/session\n")
    return root


def place(tree):
    return cgroups.place(str(tree.parent / "mounts"), str(tree.parent / "own"))


def test_the_nearest_group_that_limits_memory_is_taken(tree):
    assert place(tree) == str(tree)
    (tree / "user/cgroup.subtree_control").write_text("memory\n")
    assert place(tree) == str(tree / "user")
    (tree.parent / "own").write_text("0::/\n")
    assert place(tree) == str(tree)


def test_there_is_no_place_without_the_controller_the_file_system_or_the_permission(tree, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert place(tree) is None
    monkeypatch.undo()
    (tree / "cgroup.subtree_control").write_text("cpu\n")
    assert place(tree) is None
    (tree.parent / "own").write_text("4:memory:/\n")
    assert place(tree) is None
    (tree.parent / "mounts").write_text("cgroup /sys/fs/cgroup/memory cgroup rw 0 0\n")
    assert place(tree) is None
    assert cgroups.place("/nowhere", "/nowhere") is None


def test_a_group_gets_its_limits_and_processes_and_says_when_it_ran_over(tree, monkeypatch):
    mkdir = os.mkdir

    def kernel_mkdir(path):
        mkdir(path)
        for name in FILES:
            Path(path, name).write_text("")

    monkeypatch.setattr(os, "mkdir", kernel_mkdir)
    group = Path(cgroups.make(str(tree), "nanochat-1", 300 * MIB))
    cgroups.join(str(group), 77)
    assert {name: (group / name).read_text() for name in FILES} == {
        "cgroup.procs": "77",
        "memory.max": str(300 * MIB),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
    }
    assert not cgroups.ran_over(str(group))
    for events, over in [("low 0\noom 1\noom_kill 0\n", False), ("oom 2\noom_kill 1\noom_group_kill 1\n", True)]:
        (group / "memory.events").write_text(events)
        assert cgroups.ran_over(str(group)) is over


def test_a_group_that_cannot_be_limited_is_not_left_behind(tree):
    with pytest.raises(OSError, match=r"memory\.max"):  # plain files do not appear by themselves
        cgroups.make(str(tree), "nanochat-1", MIB)
    assert not (tree / "nanochat-1").exists()


needs_group = pytest.mark.skipif(memory_group() is None, reason="no cgroup of version 2 with memory can be made here")


@needs_group
def test_memory_that_no_process_maps_ends_a_program():
    source = "import os\nheld = []\nwhile True:\n    r, w = os.pipe(); os.write(w, bytes(65536)); held.append((r, w))\n"
    sandbox = Sandbox(Limits(wall=5, memory=64 * MIB, open_files=65536))
    assert "memory by cgroup" in sandbox.isolation.description
    outcome = sandbox.execute("python", source)
    assert outcome.status in ("memory", "runtime error"), outcome
    assert not list(Path(memory_group() or "").glob("nanochat-*"))


@needs_group
def test_a_real_group_ends_a_process_that_needs_more_at_once():
    group = cgroups.make(memory_group() or "", f"nanochat-test-{os.getpid()}", 64 * MIB)
    try:
        code = "import sys; sys.stdin.read(1); x = b'x' * (200 << 20)"
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        cgroups.join(group, child.pid)
        child.communicate(b"\n")
        assert child.returncode == -9
        assert cgroups.ran_over(group)
    finally:
        cgroups.remove(group)
    assert not Path(group).exists()
