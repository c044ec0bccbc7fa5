"""Programs that mean harm, what must become of each, and a machine that shows it when one of them gets through.

`benchmarks/hostile.py` counts them, `tests/sandbox/test_hostile.py` asserts about each. A program prints "won" when it
got what it wanted; a secret file, a server and a word in the environment show what it reads and reaches.
"""

# ruff: noqa: E501 (a program is easier to read as it stands)

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_cli.sandbox.limits import MIB
from nanochat_cli.sandbox.process import Isolation
from nanochat_cli.sandbox.sandbox import Limits, Outcome, Sandbox

LIMITS = Limits(wall=1.5, cpu=1, memory=192 * MIB, file_size=MIB, disk=4 * MIB, files=200, processes=16, output=65536)
COMPILE = Limits(wall=5, cpu=4, memory=1536 * MIB, file_size=32 * MIB, disk=64 * MIB, processes=32, open_files=256)
CALL = (
    "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\ndef call(x86_64, aarch64, *arguments):\n"
    "    number = x86_64 if os.uname().machine == 'x86_64' else aarch64\n"
    "    assert c.syscall(number, *arguments) >= 0, os.strerror(ctypes.get_errno())\n    print('won')\n"
)
"""Defines `call`, which makes a system call by its numbers."""

PYTHON = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 20))\n",
    "memory bomb of many processes": (
        "import os, time\nfor _ in range(3): os.fork()\nx = bytearray(100 << 20)\ntime.sleep(9)\n"
    ),
    "infinite loop": "while True: pass\n",
    "infinite output": "while True: print('x' * 1000)\n",
    "infinite output to standard error": "import sys\nwhile True: sys.stderr.write('x' * 1000)\n",
    "huge file": "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 16)); f.flush()\n",
    "many files": "i = 0\nwhile True:\n    open(f'f{i}', 'wb').write(bytes(65536)); i += 1\n",
    "many folders": "import os\ni = 0\nwhile True: os.mkdir(f'd{i}'); os.chmod(f'd{i}', 0); i += 1\n",
    "reads the home folder": "import os\nprint(os.listdir('HOME'))\n",
    "reads a secret file": "print(open('SECRET').read())\n",
    "reads a secret through a link": "import os\nos.symlink('SECRET', 'link')\nprint(open('link').read())\n",
    "reads a secret through the root of process 1": "print(open('/proc/1/root' + 'SECRET').read())\n",
    "reads passwords": "print(open('/etc/passwd').read())\n",
    "writes outside": "open('OUTSIDE', 'w').write('x')\n",
    "writes to the system": "open('/usr/written', 'w').write('x')\n",
    "removes everything": "import shutil\nshutil.rmtree('/', ignore_errors=True)\nprint(open('SECRET').read())\n",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1).sendall(b'secret')\nprint('won')\n",
    "connects to an abstract socket": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0nanochat-hostile-test')\nprint('won')\n"
    ),
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nwhile True: pass\n",
    "kills all that it may": "import os, signal\nos.kill(-1, signal.SIGKILL)\nwhile True: pass\n",
    "kills the host": "import os, signal\nos.kill(HOSTPID, signal.SIGTERM)\n",
    "kills its process group": "import os, signal\nos.killpg(0, signal.SIGKILL)\n",
    "daemon in a session of its own": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(99)\n    os._exit(0)\n"
    ),
    "closes all descriptors": "import os, time\nos.closerange(0, 1024)\nwhile True: time.sleep(1)\n",
    "ignores signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: pass\n"
    ),
    "writes to its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))\n",
    "writes to /proc": "open('/proc/sys/kernel/hostname', 'w').write('x')\n",
    "triggers /proc/sysrq": "open('/proc/sysrq-trigger', 'w').write('x')\n",
    "sleeps forever": "import time\ntime.sleep(99)\n",
    "recurses deeply": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f() + 1\nf()\n",
    "huge power": "print(len(str(9 ** 9 ** 9)))\n",
    "deep source": "(" * 5000 + ")" * 5000 + "\n",
    "executes a shell": "import os\nos.execv('/bin/sh', ['sh', '-c', 'id > OUTSIDE; while :; do :; done'])\n",
    "environment secrets": "import os\nprint(dict(os.environ), open('/proc/self/environ').read())\n",
    "traces its parent": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
        "assert c.ptrace(16, os.getppid(), 0, 0) == 0, 'refused'\nprint('won')\n"
    ),
    "zombie flood": "import os\nwhile True:\n    try:\n        if os.fork() == 0: os._exit(0)\n    except OSError: pass\n",
    "becomes root": "import os\nos.setuid(0)\nprint('won')\n",
    "mounts": (
        "import ctypes\nc = ctypes.CDLL(None)\nassert c.mount(b'none', b'/work', b'tmpfs', 0, None) == 0, 'refused'\nprint('won')\n"
    ),
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()\n",
    "makes a device": "import os, stat\nos.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0))\nprint('won')\n",
    "connects to the hypervisor": (
        "import socket\ntry: socket.socket(40, socket.SOCK_STREAM)\nexcept OSError as error: raise SystemExit(str(error))\nprint('won')\n"
    ),
    "asks the kernel for a cipher": "import socket\nsocket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)\nprint('won')\n",
    "new user namespace": CALL + "call(272, 97, 0x10000000)\n",
    "joins a namespace": CALL + "call(308, 268, os.open('/proc/self/ns/net', os.O_RDONLY), 0)\n",
    "clones into a user namespace": CALL + "call(56, 220, 0x10000000 | 17, 0, 0, 0, 0)\n",
    "clones into a namespace by clone3": (
        CALL + "a = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)\ncall(435, 435, ctypes.byref(a), 88)\n"
    ),
    "sets up an io_uring": CALL + "p = ctypes.create_string_buffer(120)\ncall(425, 425, 4, p)\n",
    "loads a BPF program": (CALL + "m = (ctypes.c_uint32 * 32)(2, 4, 8, 1)\ncall(321, 280, 0, ctypes.byref(m), 128)\n"),
    "adds a key": CALL + "call(248, 217, b'user', b'hostile', b'x' * 30000, 30000, -3)\n",
    "joins a session of keys": CALL + "call(250, 219, 1, b'hostile')\n",
    "handles its own page faults": CALL + "call(323, 282, 1)\n",
    "counts events of the processor": (
        CALL + "a = ctypes.create_string_buffer(b'\\1\\0\\0\\0\\x80' + bytes(123))\ncall(298, 241, a, 0, -1, -1, 0)\n"
    ),
    "reads memory of its parent": (
        CALL + "b = ctypes.create_string_buffer(8)\nv = (ctypes.c_uint64 * 2)(ctypes.addressof(b), 8)\n"
        "call(310, 270, os.getppid(), ctypes.byref(v), 1, ctypes.byref(v), 1, 0)\n"
    ),
    "System V shared memory": CALL + "call(29, 194, 0, 100 << 20, 0o1600)\n",
    "tmpfs over its folder": (
        CALL
        + "uid = os.getuid()\nc.unshare(0x10020000)\ntry: open('/proc/self/uid_map', 'w').write(f'0 {uid} 1')\nexcept OSError: pass\n"
        "assert c.mount(b't', os.getcwd().encode(), b'tmpfs', 0, b'size=1g') == 0\nprint('won')\n"
    ),
    "reads the environment of the host": "print(open('/proc/HOSTPID/environ').read())\n",
    "shared pages of many processes": (
        "import mmap, os, time\nos.fork(); os.fork()\nm = mmap.mmap(-1, 90 << 20)\n"
        "for start in range(0, len(m), 1 << 20): m[start : start + (1 << 20)] = b'x' * (1 << 20)\ntime.sleep(9)\n"
    ),
}
RUST = {
    "infinite loop": "fn main() { loop {} }\n",
    "memory bomb": "fn main() { let mut v: Vec<Vec<u8>> = vec![]; loop { v.push(vec![1; 1 << 20]); } }\n",
    "recurses deeply": 'fn f(n: u64) -> u64 { if n == 0 { 0 } else { 1 + f(n + 1) } }\nfn main() { println!("{}", f(1)); }\n',
    "macro recursion": "macro_rules! m { ($($t:tt)*) => { m!($($t)* $($t)* x) } }\nfn main() { m!(x); }\n",
    "endless constant": 'const X: u64 = { let mut i = 0u64; while i < u64::MAX { i += 1; } i };\nfn main() { println!("{X}"); }\n',
    "huge array": 'static A: [u8; 1 << 45] = [1; 1 << 45];\nfn main() { println!("{}", A[3]); }\n',
    "includes passwords": 'fn main() { println!("{}", include_str!("/etc/passwd")); }\n',
    "includes a secret": 'fn main() { println!("{}", include_str!("SECRET")); }\n',
    "reads the environment while compiling": 'fn main() { println!("{}", env!("NANOCHAT_SECRET")); }\n',
    "spawns": 'fn main() { let mut n = 0; while std::thread::Builder::new().spawn(|| loop {}).is_ok() { n += 1; } println!("{n}"); }\n',
    "calls as a 32-bit program": (
        "use std::arch::asm;\nfn main() {\n    let mut answer: i32 = 310; // unshare of i386\n"
        '    unsafe { asm!("push rbx", "mov ebx, 0x10000000", "int 0x80", "pop rbx", inout("eax") answer) };\n'
        '    if answer == 0 { println!("won"); }\n    println!("{answer}");\n}\n'
    ),
}
SECRET, WON = "do-not-read-me", "won"

EXPECTED: dict[str, set[str]] = {
    "python: fork bomb": {"timeout", "killed"},
    "python: memory bomb": {"memory"},
    "python: memory bomb of many processes": {"memory"},
    "python: infinite loop": {"timeout"},
    "python: infinite output": {"output limit"},
    "python: infinite output to standard error": {"output limit"},
    "python: huge file": {"runtime error", "disk limit"},
    "python: many files": {"runtime error", "disk limit"},
    "python: many folders": {"runtime error", "disk limit"},
    "python: sleeps forever": {"timeout"},
    "python: ignores signals": {"timeout"},
    "python: closes all descriptors": {"timeout"},
    "python: huge power": {"timeout"},
    "python: kills its process group": {"killed"},
    "python: zombie flood": {"timeout", "killed"},
    "python: daemon in a session of its own": {"ok"},
    "python: deep source": {"compile error"},
    "python: writes to its own limits": {"runtime error"},
    "python: writes to /proc": {"runtime error"},
    "python: triggers /proc/sysrq": {"runtime error"},
    "python: writes to the system": {"runtime error"},
    "python: becomes root": {"runtime error"},
    "python: mounts": {"runtime error"},
    "python: makes a device": {"runtime error"},
    "python: recurses deeply": {"runtime error", "memory", "killed", "timeout"},
    "rust: infinite loop": {"timeout"},
    "rust: memory bomb": {"memory"},
    "rust: recurses deeply": {"runtime error"},
    "rust: macro recursion": {"compile error", "timeout", "memory"},
    "rust: endless constant": {"compile error", "timeout"},
    "rust: huge array": {"compile error", "memory", "killed"},
    "rust: reads the environment while compiling": {"compile error"},
    "python: shared pages of many processes": {"memory"},
    "rust: calls as a 32-bit program": {"runtime error"},
}
"""Statuses that a program may end with, where that matters; others may print nothing of the host's and win nothing."""


@dataclass
class Aftermath:
    """What is left when all programs have run. folder: of the host, with the secret; largest: bytes it ever held."""

    outcomes: dict[str, Outcome]
    folder: Path
    connections: list[object] = field(default_factory=list)
    largest: int = 0


def breach(name: str, outcome: Outcome) -> str | None:
    """How a program got out of its sandbox, by what it said and how it ended; None if it did not."""
    said = outcome.stdout + outcome.stderr + repr(outcome.diagnostics)
    if SECRET in said:
        return "it read the secret"
    if "root:x:0" in said:
        return "it read a file of the system"
    if WON in outcome.stdout.split():
        return "it got what it wanted"
    compiling = COMPILE.wall if name.startswith("rust") else 0
    if outcome.seconds >= LIMITS.wall + compiling + 1:
        return f"it ran for {outcome.seconds:.1f} s"
    if outcome.status not in EXPECTED.get(name, {outcome.status}):
        return f"it ended with: {outcome.status}"
    return None


def release(sandbox_of: Isolation | None, folder: Path, workers: int = 4) -> Aftermath:
    """Run all programs, side by side, on a host whose `folder` is new and holds a secret.

    One that had too little time beside the others to end as it should is run again by itself.
    sandbox_of: None takes what works here. Rust programs are left out where the sandbox cannot start rustc.
    """
    folder.chmod(0o755)
    (folder / "secret").write_text(SECRET)
    (folder / "temporary").mkdir()
    sandbox = Sandbox(LIMITS, COMPILE, isolated=sandbox_of)
    programs = {f"python: {name}": ("python", source) for name, source in PYTHON.items()}
    if shutil.which("rustc") and sandbox.execute("rust", "fn main() {}\n").status == "ok":
        programs |= {f"rust: {name}": ("rust", source) for name, source in RUST.items()}
    after = Aftermath({}, folder)
    with _host(after) as words, ThreadPoolExecutor(workers) as pool:

        def run(program: tuple[str, str]) -> Outcome:
            language, source = program
            for word, value in words.items():
                source = source.replace(word, value) if not (word == "SECRET" and "NANOCHAT" in source) else source
            return sandbox.execute(language, source)

        after.outcomes = dict(zip(programs, pool.map(run, programs.values()), strict=True))
        for name, outcome in after.outcomes.items():
            if outcome.status == "timeout" and breach(name, outcome):
                after.outcomes[name] = run(programs[name])
    return after


@contextlib.contextmanager
def _host(after: Aftermath) -> Iterator[dict[str, str]]:
    """A server, an abstract socket, a secret in the environment, temporary files in the folder; yields their names."""
    stop, kept = threading.Event(), os.environ.get("NANOCHAT_SECRET")
    server, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    abstract.bind("\0nanochat-hostile-test")
    abstract.listen()
    tempfile.tempdir = str(after.folder / "temporary")
    os.environ["NANOCHAT_SECRET"] = SECRET

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                after.connections.append(server.accept())

    threads = [threading.Thread(target=accept, daemon=True), threading.Thread(target=_watch, args=(after, stop))]
    for thread in threads:
        thread.start()
    words = {"SECRET": after.folder / "secret", "OUTSIDE": after.folder / "outside", "HOME": Path.home()}
    try:
        yield {
            **{word: str(path) for word, path in words.items()},
            "PORT": str(server.getsockname()[1]),
            "HOSTPID": str(os.getpid()),
        }
    finally:
        stop.set()
        threads[1].join()
        tempfile.tempdir = None
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        abstract.close()
        del os.environ["NANOCHAT_SECRET"]
        if kept is not None:
            os.environ["NANOCHAT_SECRET"] = kept


def _watch(after: Aftermath, stop: threading.Event) -> None:
    """Measure the most bytes that the temporary folder holds, until told to stop."""
    while not stop.wait(0.02):
        size = 0
        for base, _, names in os.walk(after.folder / "temporary"):
            for name in names:
                with contextlib.suppress(OSError):
                    size += (Path(base) / name).lstat().st_blocks * 512
        after.largest = max(after.largest, size)
