"""Restrictions on what a program may ask of the kernel: a filter of system calls (seccomp), and files (Landlock).

The filter blocks what limits cannot measure or what undoes namespaces: memory that no process maps (memfd, System V
segments and queues, keys), new namespaces and mounts, other processes' memory, sockets that no network namespace holds.
The launcher installs it itself, right before the program starts, inside bubblewrap too. Imported by the launcher script
under `python -I -S`: standard library only, nothing of nanochat. Sources: seccomp(2), landlock(7), `asm/unistd.h`.
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST, _SECOND = 0, 4, 16, 24
"""Offsets in `struct seccomp_data`; arguments by their lower half, since both architectures are little-endian."""
_NAMESPACES = 0x7E020000
"""CLONE_NEW* in the flags of clone(2)."""
_X32 = 0x40000000
_SET_OWNER, _SET_SIGNAL, _SET_OWNER_EX = 8, 10, 15
"""fcntl(2) commands that make the kernel signal any process."""
_UNIX, _INET, _INET6 = 1, 2, 10
"""Families of sockets that a network namespace holds; others reach the kernel (AF_ALG) or the hypervisor (AF_VSOCK)."""

# Name: (x86_64, aarch64). From 424 on both have the same numbers.
REFUSED = {
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "msgget": (68, 186),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "open_tree_attr": (467, 467), "open_by_handle_at": (304, 265),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "process_madvise": (440, 440), "pidfd_getfd": (438, 438), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "fanotify_init": (300, 262), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
_CLONE, _CLONE3, _FCNTL, _SOCKET = (56, 220), (435, 435), (72, 25), (41, 198)
_SIGNALS = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "prlimit64": (302, 261),
}  # fmt: skip
_BY_HANDLE = {"pidfd_open": (434, 434), "pidfd_send_signal": (424, 424)}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_RIGHTS = (0x1FFF, 1 << 13, 1 << 14)
"""Access rights: all those of version 1, and what versions 2 (REFER) and 3 (TRUNCATE) add."""

Instruction = tuple[int, int, int, int]
"""Code, instructions to skip if a comparison holds, and if it does not, operand."""


def can_filter() -> bool:
    """Whether the system call numbers of this architecture are known."""
    return platform.machine() in _MACHINES


def landlock_version() -> int:
    """Version of the kernel's Landlock (Linux 5.13 and later), or a negative number without it."""
    return _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)


def can_confine() -> bool:
    """Whether this kernel has Landlock."""
    return landlock_version() > 0


def filter_program(machine: str, own: int | None, *, network: bool) -> bytes:
    """The filter as classic BPF, an array of `struct sock_filter`.

    own: the only process that may be signalled; None: any. network: whether the program has a network namespace, where
    sockets reach nothing; without it there are none. A call of another architecture kills the process.
    """
    column, architecture = _MACHINES[machine]
    refuse, allow = _fail(errno.EPERM), (_RETURN, 0, 0, _ALLOW)
    code: list[Instruction] = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL)]
    code += [(_LOAD, 0, 0, _NUMBER)]
    code += [(_AT_LEAST, 0, 1, _X32), _fail(errno.ENOSYS)] if column == 0 else []
    refused = REFUSED if own is None else REFUSED | _BY_HANDLE
    for numbers in refused.values():
        code += [(_EQUAL, 0, 1, numbers[column]), refuse]
    # The flags of clone3 are in memory, where no filter can look; the C library then takes clone.
    code += [(_EQUAL, 0, 1, _CLONE3[column]), _fail(errno.ENOSYS)]
    code += [(_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, _NAMESPACES), refuse, allow]
    if network:
        code += [(_EQUAL, 0, 6, _SOCKET[column]), (_LOAD, 0, 0, _FIRST), (_EQUAL, 3, 0, _UNIX)]
        code += [(_EQUAL, 2, 0, _INET), (_EQUAL, 1, 0, _INET6), _fail(errno.EAFNOSUPPORT), allow]
    else:
        code += [(_EQUAL, 0, 1, _SOCKET[column]), refuse]
    if own is not None:
        for numbers in _SIGNALS.values():
            code += [(_EQUAL, 0, 5, numbers[column]), (_LOAD, 0, 0, _FIRST), (_EQUAL, 2, 0, 0)]
            code += [(_EQUAL, 1, 0, own), refuse, allow]
        code += [(_EQUAL, 0, 6, _FCNTL[column]), (_LOAD, 0, 0, _SECOND), (_EQUAL, 3, 0, _SET_OWNER)]
        code += [(_EQUAL, 2, 0, _SET_SIGNAL), (_EQUAL, 1, 0, _SET_OWNER_EX), allow, refuse]
    code += [allow]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _fail(number: int) -> Instruction:
    return (_RETURN, 0, 0, _FAIL | number)


def filter_calls(*, signals: bool, network: bool) -> None:
    """Refuse system calls in this process and all that it starts; needs no_new_privs. Raises OSError.

    signals: whether other processes may be signalled. False where a program shares its user with the host: then it may
    signal only the process that calls this. network: as in `filter_program`.
    """
    text = filter_program(platform.machine(), None if signals else os.getpid(), network=network)
    buffer = ctypes.create_string_buffer(text, len(text))
    program = struct.pack("HP", len(text) // 8, ctypes.addressof(buffer))
    if _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"filter of system calls: {os.strerror(number)}")


def confine_files(folder: str, visible: Iterable[str]) -> None:
    """Let this process open, from now on, only what is below `folder`, and for reading `visible`. Raises OSError.

    Devices like /dev/null stay, and /proc, of whose processes Landlock itself hides memory and environment. Whether a
    file exists can still be seen.
    """
    rights = sum(_RIGHTS[: min(landlock_version(), 3)])
    readable = _EXECUTE | _READ_FILE | _READ_DIR
    ruleset = _call(_CREATE_RULESET, struct.pack("=Q", rights), 8, 0)
    rules = {folder: rights, "/proc": readable, **dict.fromkeys(visible, readable)}
    rules |= {f"/dev/{name}": _READ_FILE | _WRITE_FILE for name in ("null", "zero", "full")}
    rules |= {f"/dev/{name}": _READ_FILE for name in ("random", "urandom")}
    for path, allowed in rules.items():
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, PermissionError):  # what cannot be reached needs no rule
            continue
        if not os.path.isdir(path):  # noqa: PTH112
            allowed &= ~_READ_DIR
        _call(_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, descriptor), 0)
        os.close(descriptor)
    _call(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _call(number: int, *arguments) -> int:
    result = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
