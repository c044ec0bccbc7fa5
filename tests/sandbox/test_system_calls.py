"""The filter of system calls, executed by a small interpreter of classic BPF that knows nothing of how it is built.

Names and numbers come from the kernel's own headers, where they are installed.
"""

import errno
import re
import struct
from pathlib import Path

import pytest

from nanochat_cli.sandbox.system_calls import filter_program

ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS, EAFNOSUPPORT = (FAIL | number for number in (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT))
HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), 0xC000003E),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"), 0xC00000B7),
}
REFUSED = """
    unshare setns mount umount2 pivot_root chroot open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr
    ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd open_by_handle_at
    bpf perf_event_open userfaultfd fanotify_init io_uring_setup io_uring_enter io_uring_register
    add_key request_key keyctl memfd_create memfd_secret shmget shmat shmctl semget msgget
""".split()
SIGNALS = ["kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "prlimit64"]
NAMESPACES = [0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000]
THREAD = 0x3D0F00
"""The flags with which the C library makes a thread."""
OWN = 4242


def run(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What the kernel would do, by linux/filter.h: the value that the filter returns."""
    data = struct.pack("=iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("<HBBI", program))
    at, accumulator = 0, 0
    while True:
        instruction, if_true, if_false, operand = code[at]
        at += 1
        match instruction:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                (accumulator,) = struct.unpack_from("=I", data, operand)
            case 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
                at += if_true if accumulator == operand else if_false
            case 0x35:  # BPF_JGE
                at += if_true if accumulator >= operand else if_false
            case 0x45:  # BPF_JSET
                at += if_true if accumulator & operand else if_false
            case 0x06:  # BPF_RET
                return operand
            case _:
                raise AssertionError(f"instruction {instruction:#x}")


@pytest.fixture(params=HEADERS)
def machine(request):
    return request.param


@pytest.fixture
def numbers(machine):
    """Every system call of the machine by name, as its header has it."""
    header = HEADERS[machine][0]
    if not header.is_file():
        pytest.skip(f"{header} is not installed")
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", header.read_text(), re.MULTILINE)
    return {name: int(number) for name, number in found}


def call(machine: str, program: bytes, number: int, *arguments: int) -> int:
    return run(program, HEADERS[machine][1], number, *arguments)


@pytest.mark.parametrize("own", [None, OWN])
@pytest.mark.parametrize("network", [True, False])
def test_every_system_call_is_refused_or_allowed_by_its_name(machine, numbers, own, network):
    program = filter_program(machine, own, network=network)
    name_of = {number: name for name, number in numbers.items()}
    later = {"memfd_secret", "process_madvise"} - numbers.keys()  # than these headers
    assert set(REFUSED) - later <= numbers.keys()
    refused = set(REFUSED) | (set() if own is None else {"pidfd_open", "pidfd_send_signal"})
    unnamed = {447, 440, 467}
    for number in range(700):
        name = name_of.get(number, "")
        answer = call(machine, program, number, 0, 0)
        if name in refused or (not name and number in unnamed):
            assert answer == EPERM, name
        elif name == "clone3":
            assert answer == ENOSYS
        elif name == "socket":
            assert answer == (EAFNOSUPPORT if network else EPERM)
        else:
            assert answer == ALLOW, (number, name)


def test_clone_makes_threads_and_processes_but_no_namespace(machine, numbers):
    program, clone = filter_program(machine, None, network=True), numbers["clone"]
    for flags in (THREAD, 17, 0x01200011, 0x4111):  # a thread, fork, glibc's fork, vfork
        assert call(machine, program, clone, flags) == ALLOW
        for chosen in range(1, 1 << len(NAMESPACES)):
            spaces = sum(space for bit, space in enumerate(NAMESPACES) if chosen >> bit & 1)
            assert call(machine, program, clone, flags | spaces) == EPERM
            assert call(machine, program, clone, flags | spaces | 1 << 40) == EPERM


def test_sockets_are_those_that_a_network_namespace_holds(machine, numbers):
    held = filter_program(machine, None, network=True)
    none = filter_program(machine, None, network=False)
    for family in range(64):
        expected = ALLOW if family in (1, 2, 10) else EAFNOSUPPORT
        assert call(machine, held, numbers["socket"], family, 1, 0) == expected
        assert call(machine, none, numbers["socket"], family, 1, 0) == EPERM
        assert call(machine, none, numbers["socketpair"], family, 1, 0) == ALLOW


def test_a_program_that_shares_its_user_signals_itself_alone(machine, numbers):
    shared, alone = (filter_program(machine, own, network=True) for own in (OWN, None))
    others = [1, OWN + 1, OWN - 1, 2**32 - 1, 2**32 - OWN, 99999]
    for name in SIGNALS:
        for pid in (0, OWN):
            assert call(machine, shared, numbers[name], pid, 9) == ALLOW
        for pid in others:
            assert call(machine, shared, numbers[name], pid, 9) == EPERM, (name, pid)
            assert call(machine, alone, numbers[name], pid, 9) == ALLOW
    for command in range(1100):
        owner = command in (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX
        assert call(machine, shared, numbers["fcntl"], 3, command, 77) == (EPERM if owner else ALLOW)


@pytest.mark.parametrize("architecture", [0x40000003, 0x40000028, 0xC000003E, 0xC00000B7, 0xC00000F3, 0])
def test_a_call_of_another_architecture_kills(machine, architecture):
    program = filter_program(machine, OWN, network=False)
    for number in (*range(500), 0x40000000, 2**31 - 1):
        answer = run(program, architecture, number, 0x10000000)
        assert (answer == KILL) == (architecture != HEADERS[machine][1])


def test_the_second_numbers_of_x86_64_do_not_exist():
    program = filter_program("x86_64", None, network=True)
    assert {call("x86_64", program, 0x40000000 + number) for number in range(700)} == {ENOSYS}
    assert call("x86_64", program, -1) == ENOSYS


def test_programs_are_short_enough_for_the_kernel_and_end_on_every_path(machine):
    for own in (None, OWN):
        for network in (True, False):
            code = list(struct.iter_unpack("<HBBI", filter_program(machine, own, network=network)))
            assert len(code) <= 4096
            assert code[-1][0] == 0x06
            for at, (instruction, if_true, if_false, _) in enumerate(code):
                jumps = (if_true, if_false) if instruction in (0x15, 0x35, 0x45) else (0, 0)
                assert max(jumps) + at + 1 < len(code) or instruction == 0x06
