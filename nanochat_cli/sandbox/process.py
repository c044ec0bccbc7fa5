"""The host's side of a sandboxed process: start the launcher, read bounded output, find out how the process ended.

Knows limits and isolation, not languages or tests.
"""

import itertools
import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from nanochat_cli.errors import ConfigError
from nanochat_cli.sandbox import cgroups, namespaces, system_calls
from nanochat_cli.sandbox.limits import MIB, Limits, Status

LAUNCHER = Path(__file__).with_name("launcher.py")
WORK = "/work"
"""The private folder in an isolated file tree."""
TAIL = 4096
"""Bytes kept from the end of each output stream; the default of `Command.tail`."""
GRACE = 5.0
"""Seconds that a supervisor may take beyond the wall-clock limit to end a tree."""

FIRST_UID = 2_000_000_000
"""Root starts each run as another user: every process has a block of user ids and takes them in turn."""
BLOCK = 100_000
_LAST_SYSTEM_UID = 999
_MIN_USERS = 1000
_EXTERNAL = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""Signals that no error of a program raises: a program that dies of one was killed from outside."""
_runs = itertools.count()

Mode = Literal["namespaces", "bubblewrap", "limits"]


@dataclass(frozen=True)
class Isolation:
    """How programs are kept apart on this machine. `drop`: each runs as another unprivileged user."""

    mode: Mode
    drop: bool
    description: str

    @property
    def shared(self) -> bool:
        """Programs share a user and see each other, so they may signal no other process and run one at a time."""
        return self.mode == "limits" and not self.drop


@dataclass
class Ended:
    """How a process tree ended. `code` as in `subprocess`; `reason` says why it was killed, if it was."""

    code: int | None
    reason: str | None
    error: str | None
    seconds: float

    @property
    def status(self) -> Status:
        """How it ended, as a status of `Outcome`."""
        if self.reason in ("timeout", "memory", "output limit", "disk limit", "killed"):
            return self.reason  # type: ignore[return-value]  # narrowed by the test above
        if self.error is not None:
            return "killed"
        if self.code == -signal.SIGXCPU or (self.code == -signal.SIGKILL and self.reason == "cpu"):
            return "timeout"
        if self.code is not None and -self.code in _EXTERNAL:
            return "killed"
        return "ok" if self.code == 0 else "runtime error"


@dataclass
class Command:
    """`argv`, to run in the private folder with copies of `files` (name in the folder → path on the host).

    `channels` become descriptors 3, 4, …; `visible` are folders that the program may read besides the system;
    `output` names a file that is copied to the given path when the program ends with code 0.
    """

    argv: Sequence[str]
    limits: Limits
    files: Mapping[str, Path] = field(default_factory=dict)
    channels: Sequence[int] = ()
    visible: Sequence[str] = ()
    output: tuple[str, Path] | None = None
    tail: int = TAIL


class Running:
    """A started process tree. Use as a context manager: leaving it ends the tree and removes its folder."""

    def __init__(self, command: Command, isolation: Isolation) -> None:
        self._limits, self._keep = command.limits, command.tail
        self.tails = {"stdout": bytearray(), "stderr": bytearray()}
        self._bytes_read = 0
        self._too_much_output = False
        self._report = bytearray()
        self._started = time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="nanochat-sandbox-", ignore_cleanup_errors=True)
        base = Path(self._folder.name)
        base.chmod(0o711)
        reader, writer = os.pipe()
        self._status = reader
        output = None
        try:
            if command.output is not None:
                output = os.open(command.output[1], os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o700)
            spec = _specification(command, isolation, base, writer, output)
            passed = [writer, *command.channels, *([output] if output is not None else [])]
            self._process = subprocess.Popen(
                [*_python(), str(LAUNCHER), str(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=passed,
                env={},
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(writer)
            if output is not None:
                os.close(output)

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        os.close(self._status)
        self._folder.cleanup()

    def stop(self) -> None:
        """End the tree if it still runs, and wait for its supervisor."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def register(self, selector: selectors.BaseSelector) -> None:
        """Watch the output and the report of this tree; the data of each key is the function that takes its bytes."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for name, descriptor in [("stdout", self._process.stdout.fileno()), ("stderr", self._process.stderr.fileno())]:
            selector.register(descriptor, selectors.EVENT_READ, lambda block, name=name: self._take(name, block))
        selector.register(self._status, selectors.EVENT_READ, self._report.extend)

    def _take(self, name: str, block: bytes) -> None:
        self._bytes_read += len(block)
        tail = self.tails[name]
        tail += block
        del tail[: -self._keep]
        if self._bytes_read > self._limits.output and not self._too_much_output:
            self._too_much_output = True
            assert self._process.stdin is not None
            self._process.stdin.close()

    @property
    def ended(self) -> bool:
        """The supervisor has reported."""
        return b"\n" in self._report

    @property
    def overdue(self) -> bool:
        """The supervisor should have ended the tree by now."""
        return time.monotonic() - self._started > self._limits.wall + GRACE

    def end(self) -> Ended:
        """How the tree ended; call it after `stop` or when `ended`."""
        try:
            values: dict[str, Any] = json.loads(bytes(self._report))
        except ValueError:
            values = {"reason": "killed"}
        reason = "output limit" if self._too_much_output else values.get("reason")
        code = values.get("code")
        if code == -signal.SIGKILL and values.get("cpu", 0) >= self._limits.cpu:
            reason = "cpu"
        return Ended(code, reason, values.get("error"), values.get("seconds", 0.0))

    def tail(self, name: Literal["stdout", "stderr"]) -> str:
        """The end of an output stream."""
        return self.tails[name].decode(errors="replace")


def drive(runs: Sequence[Running], until: Running, channel: tuple[int, bytearray, int] | None = None) -> None:
    """Read the streams of `runs` until `until` has ended. channel: (descriptor, buffer for its bytes, most bytes)."""
    with selectors.DefaultSelector() as selector:
        for run in runs:
            run.register(selector)
        if channel is not None:
            descriptor, received, most = channel
            selector.register(
                descriptor, selectors.EVENT_READ, lambda block: received.extend(block[: most - len(received)])
            )
        while selector.get_map() and not until.ended and not until.overdue:
            _read_ready(selector, 0.5)
        until.stop()
        while _read_ready(selector, 0):  # what it wrote before it ended
            pass


def _read_ready(selector: selectors.BaseSelector, timeout: float) -> bool:
    ready = selector.select(timeout)
    for key, _ in ready:
        block = os.read(key.fd, 65536)
        if block:
            key.data(block)
        else:
            selector.unregister(key.fileobj)
    return bool(ready) and bool(selector.get_map())


def run(command: Command, isolation: Isolation) -> tuple[Ended, str, str]:
    """Run to the end: how it ended, and the tails of standard output and error."""
    with Running(command, isolation) as running:
        drive([running], running)
        return running.end(), running.tail("stdout"), running.tail("stderr")


def interpreter() -> tuple[list[str], list[str]]:
    """The command of this process's Python without site packages, and the folders that it must be able to read."""
    return _python(), [sys.base_prefix]


def _python() -> list[str]:
    return [os.path.realpath(sys.executable), "-I", "-S", "-B"]


def _specification(command: Command, isolation: Isolation, base: Path, status: int, output: int | None) -> Path:
    """Write the launcher's specification into the run's folder."""
    work = base / "work"
    work.mkdir(mode=0o700)
    (base / "root").mkdir()
    inner = isolation.mode != "limits"
    visible = [*namespaces.SYSTEM, *namespaces.LINKER, *(p for p in command.visible if not _in_system(p))]
    spec = base / "spec.json"
    home = WORK if inner else str(work)
    python = _python()
    limits = asdict(command.limits)
    limits["disk"] += sum(path.stat().st_size for path in command.files.values())  # our own files do not count
    values = {
        "mode": isolation.mode,
        "drop": isolation.drop,
        "uid": _uid() if isolation.drop else os.getuid(),
        "filter": system_calls.can_filter(),
        "signals": not isolation.shared,
        "cgroup": memory_group(),
        "confine": isolation.mode == "limits" and system_calls.can_confine(),
        "argv": list(command.argv),
        "env": {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home},
        "limits": limits,
        "files": {name: str(path) for name, path in command.files.items()},
        "channels": list(command.channels),
        "visible": visible,
        "root": str(base / "root"),
        "work": home,
        "status": status,
        "output": output,
        "output_name": command.output[0] if command.output else None,
        "bubblewrap": [],
    }
    if isolation.mode == "bubblewrap":
        inputs = base / "inputs"
        inputs.mkdir()
        for name, path in command.files.items():
            shutil.copyfile(path, inputs / name)
        values["files"] = {name: f"/inputs/{name}" for name in command.files}
        values["bubblewrap"] = _bubblewrap(visible, base, limits["disk"], python)
    spec.write_text(json.dumps(values), encoding="utf-8")
    return spec


def _uid() -> int:
    """A user id that no other run has now, so that runs cannot signal each other and process limits count one run."""
    users = _users()
    start = os.getpid() * 97 if users.start < FIRST_UID else 0  # without blocks, processes start at different ids
    return users[(start + next(_runs)) % len(users)]


@lru_cache(maxsize=1)
def _users() -> range:
    """Unused user ids that root may take here (uid_map of user_namespaces(7)); empty if there are too few."""
    first = FIRST_UID + os.getpid() % 1000 * BLOCK
    best = range(0)
    for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines():
        start, _, count = map(int, line.split())
        if start <= first and first + BLOCK <= start + count:
            return range(first, first + BLOCK)
        upper_half = range(max(start + count // 2, _LAST_SYSTEM_UID + 1), min(start + count, 65534))
        best = max(best, upper_half, key=len)
    return best if len(best) >= _MIN_USERS else range(0)


@lru_cache(maxsize=1)
def memory_group() -> str | None:
    """The cgroup below which each run gets its own; None where the memory of a run can only be looked at."""
    parent = cgroups.place()
    if parent is None:
        return None
    try:
        group = cgroups.make(parent, f"nanochat-trial-{os.getpid()}", 256 * MIB)
    except OSError:
        return None
    try:  # that a group can be made does not mean that a process may be moved there
        with subprocess.Popen([*_python(), "-c", "input()"], stdin=subprocess.PIPE, env={}) as child:
            cgroups.join(group, child.pid)
            child.communicate(b"\n")
        return parent
    except OSError:
        return None
    finally:
        cgroups.remove(group)


def _bubblewrap(visible: Sequence[str], base: Path, disk: int, python: Sequence[str]) -> list[str]:
    words = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session"]
    words += ["--cap-drop", "ALL", "--clearenv"]
    for path in [*visible, sys.base_prefix]:
        if Path(path).is_symlink():
            words += ["--symlink", str(Path(path).readlink()), path]
        else:
            words += ["--ro-bind-try", path, path]
    words += ["--ro-bind", str(LAUNCHER.parent), "/launcher", "--ro-bind", str(base / "inputs"), "/inputs"]
    words += ["--ro-bind", str(base / "spec.json"), "/spec.json"]
    words += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    words += ["--size", str(disk), "--tmpfs", WORK, "--symlink", WORK, "/tmp", "--remount-ro", "/"]
    return [*words, *python, f"/launcher/{LAUNCHER.name}", "/spec.json"]


def _in_system(path: str) -> bool:
    return any(Path(path).is_relative_to(system) for system in namespaces.SYSTEM)


@lru_cache(maxsize=1)
def isolation() -> Isolation:
    """The strongest isolation that can run an empty program here. Raises ConfigError when none can."""
    problems = []
    root = os.getuid() == 0
    for candidate in _candidates(root):
        argv, visible = interpreter()
        command = Command([*argv, "-c", "pass"], Limits(wall=10), visible=visible)
        ended, _, errors = run(command, candidate)
        if ended.status == "ok" and ended.error is None:
            why = f" ({'; '.join(problems)})" if problems and candidate.mode == "limits" else ""
            return Isolation(candidate.mode, candidate.drop, candidate.description + why)
        problems.append(f"{candidate.mode}: {ended.error or errors.strip()[-200:] or ended.status}")
    raise ConfigError(f"the sandbox cannot start a process: {'; '.join(problems)}; run on Linux")


def _candidates(root: bool) -> list[Isolation]:
    user = "as an unprivileged user" if root else "as this user without privileges"
    memory = "" if memory_group() is None else ", memory by cgroup"
    calls = memory + ("" if system_calls.can_filter() else f" (no filter of system calls on {platform.machine()})")
    apart = f"own file tree, process, network and IPC namespaces, {user}, resource limits{calls}"
    spaces = Isolation("namespaces", root, f"namespaces: {apart}")
    bubblewrap = Isolation("bubblewrap", False, f"bubblewrap: {apart}")
    own = Isolation("limits", True, _open_world("a user of its own") + calls)
    shared = Isolation("limits", False, f"{_open_world('root' if root else 'this user')}, one program at a time{calls}")
    limits = [own, shared] if root and _users() else [shared]
    if root:  # bubblewrap started by root maps the program to root, for whom the kernel does not limit processes
        return [*([spaces] if _users() else []), *limits]
    return [*([bubblewrap] if shutil.which("bwrap") else []), spaces, *limits]


def _open_world(user: str) -> str:
    """The description of limits alone, for a program that runs as `user`."""
    files = "reads what that user may, writes wherever it may"
    if system_calls.can_confine():
        files = "opens only the system, its toolchain and its own folder"
    network = "no" if system_calls.can_filter() else "has"
    return f"resource limits only: each program runs as {user}, {files}, {network} network"
