"""The launcher's calls of the Linux kernel: namespaces, mounts, privileges, the process tree.

Imported by the launcher script under `python -I -S`: standard library only, nothing of nanochat.
"""

import contextlib
import ctypes
import os
import platform
import signal
import stat

_libc = ctypes.CDLL(None, use_errno=True)

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(platform.machine())
SYS_MOUNT_SETATTR = 442
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/etc/ld.so.cache")
"""Paths of the system that a sandbox sees read-only, where they exist."""
LINKER = ("/etc/alternatives",)
"""Further paths that finding `cc` may need."""
DEVICES = ("null", "zero", "full", "random", "urandom")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def become_subreaper() -> None:
    """Make orphaned descendants our children."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")


def die_with_parent() -> None:
    """Ask for SIGKILL when the supervisor ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "parent death signal")


def not_dumpable() -> None:
    """Forbid processes of the same user to trace us or read our memory."""
    _check(_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")


def enter_namespaces() -> None:
    """Enter new process, network, IPC and host-name namespaces; unless we are root, in a new user namespace."""
    uid, gid = os.getuid(), os.getgid()
    flags = NEWPID | NEWNET | NEWIPC | NEWUTS
    _check(_libc.unshare(flags if uid == 0 else flags | NEWUSER), "unshare")
    if uid != 0:
        for name, text in [("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")]:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:  # noqa: PTH123
                file.write(text)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    _check(_libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), f"mount {target}")


def _restrict(target: str, attributes: int, flags: int = AT_RECURSIVE) -> None:
    """Add attributes to a mount and those below it (mount_setattr(2))."""
    words = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    _check(
        _libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, target.encode(), flags, ctypes.byref(words), ctypes.sizeof(words)),
        f"mount_setattr {target}",
    )


def _bind(source: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120
    if os.path.isdir(source):  # noqa: PTH112
        os.makedirs(target, exist_ok=True)  # noqa: PTH103
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, None, MS_BIND | MS_REC)


def build_root(spec: dict, uid: int) -> None:
    """Build an isolated file tree at `root`: system and toolchains read-only, a bounded tmpfs as the private folder."""
    root, limits = spec["root"], spec["limits"]
    _check(_libc.unshare(NEWNS), "unshare mounts")
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1024,mode=755")
    for path in spec["visible"]:
        if os.path.islink(path):  # noqa: PTH114
            os.makedirs(os.path.dirname(root + path), exist_ok=True)  # noqa: PTH103, PTH120
            os.symlink(os.readlink(path), root + path)  # noqa: PTH115, PTH211
        elif os.path.exists(path):  # noqa: PTH110
            _bind(path, root + path)
            _restrict(root + path, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    for name in DEVICES:
        _bind(f"/dev/{name}", f"{root}/dev/{name}")
    os.mkdir(f"{root}/proc")  # noqa: PTH102
    _mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.mkdir(root + spec["work"])  # noqa: PTH102
    options = f"size={limits['disk']},nr_inodes={limits['files']},mode=700,uid={uid}"
    _mount("tmpfs", root + spec["work"], "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.symlink(spec["work"], f"{root}/tmp")  # noqa: PTH211


def pivot(root: str) -> None:
    """Make `root` the root of this process and unmount the old one."""
    if SYS_PIVOT_ROOT is None:
        raise OSError(f"no pivot_root on {platform.machine()}")
    os.chdir(root)
    _check(_libc.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")
    _restrict("/", ATTR_RDONLY, 0)


def drop_privileges(uid: int) -> None:
    """Become `uid` irrevocably, with no capability and no way to gain one by exec."""
    if os.geteuid() == 0:
        for capability in range(64):
            _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for numbers that this kernel lacks
    if uid != os.getuid():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, by the ids that this process sees."""
    below, front = [], [pid]
    while front:
        parent = front.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):  # noqa: PTH208
                with open(f"/proc/{parent}/task/{task}/children", encoding="ascii") as file:  # noqa: PTH123
                    children = [int(word) for word in file.read().split()]
                below += children
                front += children
    return below


def memory_of(pid: int) -> int:
    """Resident bytes of a process that no file backs, with its share of shared memory; 0 when it has ended."""
    sizes = _sizes(f"/proc/{pid}/status")
    shared = sizes.get("RssShmem", 0)
    if shared:
        shared = _sizes(f"/proc/{pid}/smaps_rollup").get("Pss_Shmem", shared)
    return sizes.get("RssAnon", sizes.get("VmRSS", 0)) + shared


def _sizes(path: str) -> dict[str, int]:
    """The kB entries of a /proc file, in bytes; empty when the process has ended or forbids reading."""
    sizes = {}
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        for line in file:
            if line.endswith(" kB\n"):
                name, _, size = line[:-4].partition(":")
                sizes[name] = int(size) * 1024
    return sizes


def unlinked_bytes(pids: list[int], folder: str) -> int:
    """Bytes on disk of unlinked files that these processes hold open, or have mapped from below `folder`."""
    held: dict[tuple[str, int], int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
                with contextlib.suppress(OSError):
                    status = os.stat(f"/proc/{pid}/fd/{name}")  # noqa: PTH116
                    if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
                        held[device, status.st_ino] = status.st_blocks * 512
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
                for line in file:
                    if line.endswith(" (deleted)\n") and folder in line:
                        span, _, _, device, inode, *_ = line.split()
                        start, end = (int(word, 16) for word in span.split("-"))
                        held.setdefault((device, int(inode)), end - start)
    return sum(held.values())


def files_inside(pids: list[int], folder: str) -> int:
    """Files and folders in the tmpfs at `folder` of bubblewrap's tree, as its processes see it; 0 before it exists."""
    for pid in reversed(pids):
        with contextlib.suppress(OSError):
            os.stat(f"/proc/{pid}/root/spec.json")  # noqa: PTH116 (the host's own tree has none)
            found = os.statvfs(f"/proc/{pid}/root{folder}")
            return found.f_files - found.f_ffree
    return 0


def tasks_of(uid: int) -> int:
    """Number of threads that a user runs on this machine."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == uid:  # noqa: PTH116
                count += len(os.listdir(f"/proc/{name}/task"))  # noqa: PTH208
    return count
