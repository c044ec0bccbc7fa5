"""Memory of a process tree, limited by the kernel: a cgroup (version 2) of its own, where one can be made.

It counts what looking at the processes does not: files in a tmpfs, pipes, sockets, page tables, and what grows and is
gone between two looks. Imported by the launcher script under `python -I -S`: standard library only, nothing of
nanochat. Source: Linux `Documentation/admin-guide/cgroup-v2.rst`.
"""

import contextlib
import os
import time

PROBES, PAUSE = 100, 0.01
"""How often, and after how many seconds, the removal of a group is tried: its last process may not be gone yet."""


def place(mounts: str = "/proc/self/mounts", own: str = "/proc/self/cgroup") -> str | None:
    """The nearest group, from our own upwards, in which we may make groups that limit memory; None if there is none."""
    try:
        with open(mounts, encoding="utf-8") as file:  # noqa: PTH123
            roots = [words[1] for line in file if (words := line.split())[2] == "cgroup2"]
        with open(own, encoding="utf-8") as file:  # noqa: PTH123
            ours = [line.strip()[3:] for line in file if line.startswith("0::/")]
    except (OSError, IndexError):
        return None
    for root in roots:
        for group in ours:
            names = group.strip("/").split("/") if group.strip("/") else []
            for depth in range(len(names), -1, -1):
                folder = "/".join([root, *names[:depth]])
                if _may_hold_groups(folder):
                    return folder
    return None


def _may_hold_groups(folder: str) -> bool:
    try:
        with open(f"{folder}/cgroup.subtree_control", encoding="ascii") as file:  # noqa: PTH123
            limits_memory = "memory" in file.read().split()
    except OSError:
        return False
    return limits_memory and os.access(folder, os.W_OK) and os.access(f"{folder}/cgroup.procs", os.W_OK)


def make(parent: str, name: str, memory: int) -> str:
    """Make a group of at most `memory` bytes, all of whose processes end when it needs more. Raises OSError."""
    folder = f"{parent}/{name}"
    os.mkdir(folder)  # noqa: PTH102
    try:
        _write(folder, "memory.max", memory)
        _write(folder, "memory.oom.group", 1)
        with contextlib.suppress(FileNotFoundError):  # a kernel without swap
            _write(folder, "memory.swap.max", 0)
    except OSError:
        remove(folder)
        raise
    return folder


def join(folder: str, pid: int = 0) -> None:
    """Move a process into the group, 0: this one. Raises OSError."""
    _write(folder, "cgroup.procs", pid)


def ran_over(folder: str) -> bool:
    """Whether the kernel has ended processes of the group because it needed more than its limit."""
    with contextlib.suppress(OSError), open(f"{folder}/memory.events", encoding="ascii") as file:  # noqa: PTH123
        return any(name == "oom_kill" and int(count) for name, count in map(str.split, file))
    return False


def remove(folder: str) -> None:
    """Remove a group whose processes have ended, or are about to."""
    for _ in range(PROBES):
        try:
            os.rmdir(folder)  # noqa: PTH106
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(PAUSE)


def _write(folder: str, name: str, value: int) -> None:
    descriptor = os.open(f"{folder}/{name}", os.O_WRONLY)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)
