"""Starts one program inside limits and namespaces, watches it, and kills every process that it leaves behind.

A separate script (`python -I -S -B launcher.py SPEC`), so that nothing has to happen between fork and exec in the host,
which has threads. Three processes: the supervisor (watches time and memory; kills the tree when standard input closes,
as it does when nanochat dies), the init (process 1 of the sandbox: builds the file tree, reaps zombies), the program.
Sees only the specification; `process` writes it and reads the report.
"""

import contextlib
import json
import os
import platform
import resource
import select
import shutil
import signal
import stat
import sys
import time
from collections.abc import Iterator

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 (pathlib costs start-up time)
import cgroups  # pyright: ignore[reportImplicitRelativeImport]
import namespaces as kernel  # pyright: ignore[reportImplicitRelativeImport]
import system_calls as calls  # pyright: ignore[reportImplicitRelativeImport]

POLL = 0.02
"""Seconds between two checks of the tree's memory."""
FIRST_FD = 3
"""The channels of a program follow standard input, output and error."""


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:  # noqa: PTH123
        spec = json.load(file)
    if len(sys.argv) > 2:
        inside(spec, int(sys.argv[2]))
    else:
        supervise(spec)


def supervise(spec: dict) -> None:
    """Fork the sandbox, watch it, kill what is left, and report one JSON line."""
    kernel.become_subreaper()
    try:
        with own_group(spec) as group:
            if spec["mode"] == "namespaces":
                kernel.enter_namespaces()
            report = run_tree(spec, group)
    except OSError as error:
        report = {"error": str(error)}
    answer(spec["status"], report)


@contextlib.contextmanager
def own_group(spec: dict) -> Iterator[str | None]:
    """A cgroup for the tree, which may hold its memory and the files of its tmpfs; None where there is none."""
    if spec["cgroup"] is None:
        yield None
        return
    limits = spec["limits"]
    group = cgroups.make(spec["cgroup"], f"nanochat-{os.getpid()}", limits["memory"] + limits["disk"])
    try:
        yield group
    finally:
        cgroups.remove(group)


def run_tree(spec: dict, group: str | None) -> dict:
    """Fork the sandbox, watch it, kill what is left. Returns the report."""
    report: dict = {}
    reader, writer = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        enter(spec, writer, group)
    os.close(writer)
    for descriptor in [*spec["channels"], 1, 2]:
        os.close(descriptor)
    reason, text = watch(spec, child, reader, start)
    end_tree(child)
    with contextlib.suppress(ValueError):
        report = json.loads(text.split(b"\n")[0])  # a program that cannot start reports before the init
    if group is not None and cgroups.ran_over(group):
        reason = "memory"
    elif not report and reason is None:
        reason = "killed"
    return {**report, "reason": reason, "seconds": time.monotonic() - start}


def answer(descriptor: int, values: dict) -> None:
    os.write(descriptor, json.dumps(values).encode() + b"\n")


def watch(spec: dict, child: int, reader: int, start: float) -> tuple[str | None, bytes]:
    """Wait for the report of the init. Returns the reason to kill the tree, if there is one, and the report."""
    limits, text = spec["limits"], b""
    poller = select.poll()
    poller.register(reader, select.POLLIN | select.POLLHUP)
    poller.register(0, select.POLLIN | select.POLLHUP)
    while True:
        for descriptor, _ in poller.poll(POLL * 1000):
            if descriptor == reader:
                block = os.read(reader, 65536)
                if not block:
                    return None, text
                text += block
            elif not os.read(0, 1):
                return "stopped", text
        if text:
            continue
        if time.monotonic() - start > limits["wall"]:
            return "timeout", text
        pids = kernel.descendants(child)
        if sum(map(kernel.memory_of, pids)) > limits["memory"]:
            return "memory", text
        if spec["mode"] == "bubblewrap" and kernel.files_inside(pids, spec["work"]) > limits["files"]:
            return "disk limit", text  # bubblewrap bounds the bytes of a tmpfs alone
        if spec["mode"] == "limits" and not fits(spec["work"], limits, pids):
            return "disk limit", text


def fits(folder: str, limits: dict, pids: list[int]) -> bool:
    """Whether the private folder, unlinked files included, is within its limits where no tmpfs enforces them.

    An unreadable folder may hide anything, so it does not fit.
    """
    size, files = kernel.unlinked_bytes(pids, folder), 0
    faults: list[OSError] = []
    for base, folders, names in os.walk(folder, onerror=faults.append):
        files += len(folders) + len(names)
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(f"{base}/{name}").st_blocks * 512
        if files > limits["files"] or size > limits["disk"]:
            return False
    return size <= limits["disk"] and not any(isinstance(fault, PermissionError) for fault in faults)


def end_tree(child: int) -> None:
    """Kill the sandbox and every process that becomes our child, until none is left."""
    while True:
        for pid in [child, *kernel.descendants(os.getpid())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def enter(spec: dict, report: int, group: str | None) -> None:
    """Become the init, or the bubblewrap that starts it. Does not return."""
    if group is not None:
        try:
            cgroups.join(group)
        except OSError as error:
            answer(report, {"error": f"cgroup: {error.strerror}"})
            os._exit(0)
    if spec["mode"] == "bubblewrap":
        for descriptor in [report, *spec["channels"], *filter(None, [spec["output"]])]:
            os.set_inheritable(descriptor, True)
        os.execv(spec["bubblewrap"][0], [*spec["bubblewrap"], str(report)])
    kernel.die_with_parent()
    inside(spec, report)


def inside(spec: dict, report: int) -> None:
    """Be the init: prepare the folder, run the program, reap, report how it ended. Does not return."""
    try:
        os.umask(0o022)
        uid = choose_uid(spec)
        if spec["mode"] == "namespaces":
            kernel.build_root(spec, uid)
        copy_files(spec, uid)
        if spec["mode"] == "namespaces":
            kernel.pivot(spec["root"])
        kernel.not_dumpable()
        program = os.fork()
        if program == 0:
            run(spec, report, uid)
        for descriptor in [*spec["channels"], 0, 1, 2]:
            os.close(descriptor)
        status = reap(program)
        code = os.waitstatus_to_exitcode(status)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        if code == 0 and spec["output"] is not None:
            copy_output(spec)
        answer(report, {"code": code, "cpu": usage.ru_utime + usage.ru_stime})
    except OSError as error:
        answer(report, {"error": str(error)})
    os._exit(0)


def reap(program: int) -> int:
    """Wait for the program, reaping every orphan that ends before it."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == program:
            return status


def choose_uid(spec: dict) -> int:
    """The user that the program runs as: our own, or for `drop` as root the one of the specification."""
    if os.getuid() != 0 or not spec["drop"]:
        return os.getuid()
    return spec["uid"]


def copy_files(spec: dict, uid: int) -> None:
    folder = spec["root"] + spec["work"] if spec["mode"] == "namespaces" else spec["work"]
    for name, source in spec["files"].items():
        shutil.copyfile(source, f"{folder}/{name}")
        os.chmod(f"{folder}/{name}", 0o700)  # noqa: PTH101
        os.chown(f"{folder}/{name}", uid, -1)
    if spec["mode"] != "namespaces":
        os.chown(folder, uid, -1)


def copy_output(spec: dict) -> None:
    """Copy the program's output, if it is a regular file of permitted size, to the open descriptor `output`."""
    name, descriptor = spec["output_name"], spec["output"]
    source = os.open(f"{spec['work']}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    status = os.fstat(source)
    if stat.S_ISREG(status.st_mode) and status.st_size <= spec["limits"]["file_size"]:
        with os.fdopen(source, "rb") as reader, os.fdopen(descriptor, "wb") as writer:
            shutil.copyfileobj(reader, writer)


def run(spec: dict, report: int, uid: int) -> None:
    """Become the program: new session, limits, no privileges, then exec. Does not return."""
    try:
        os.setsid()
        os.chdir(spec["work"])
        os.umask(0o077)
        report = os.dup2(report, 99, inheritable=False)  # out of the way of the channels
        place_channels(spec["channels"])
        report = os.dup2(report, FIRST_FD + len(spec["channels"]), inheritable=False)
        os.closerange(report + 1, 65536)
        set_limits(spec, uid)
        kernel.drop_privileges(uid)
        if spec["confine"]:
            calls.confine_files(spec["work"], spec["visible"])
        if spec["filter"]:
            calls.filter_calls(signals=spec["signals"], network=spec["mode"] != "limits")
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.execve(spec["argv"][0], spec["argv"], spec["env"])
    except OSError as error:
        answer(report, {"error": f"{spec['argv'][0]} does not start: {error.strerror}"})
    os._exit(0)


def place_channels(channels: list) -> None:
    """Standard input from /dev/null, the channels from descriptor 3 on."""
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    high = [os.dup2(descriptor, 100 + i) for i, descriptor in enumerate(channels)]
    for i, descriptor in enumerate(high):
        os.dup2(descriptor, FIRST_FD + i, inheritable=True)


def set_limits(spec: dict, uid: int) -> None:
    limits = spec["limits"]
    cpu = int(-(-limits["cpu"] // 1))
    processes = limits["processes"]
    if spec["mode"] == "limits":
        processes += kernel.tasks_of(uid)  # here the kernel counts everything that the user runs
    for name, soft, hard in [
        ("CPU", cpu, cpu + 1),
        ("AS", limits["memory"], limits["memory"]),
        ("FSIZE", limits["file_size"], limits["file_size"]),
        ("NOFILE", limits["open_files"], limits["open_files"]),
        ("NPROC", processes, processes),
        ("STACK", 8 << 20, 8 << 20),
        ("CORE", 0, 0),
        ("MEMLOCK", 0, 0),
        ("MSGQUEUE", 0, 0),
    ]:
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))


if __name__ == "__main__":
    if platform.system() != "Linux":
        raise SystemExit("the sandbox needs Linux")
    main()
