"""Programs that mean harm: each must end within its limits and leave the machine as it was.

All run side by side in one pool, before the first assertion. What needs namespaces is asserted where the isolation of
this machine promises it; `test_isolation_is_named` says which one that is.
"""

# ruff: noqa: E501 (a program is easier to read as it stands)

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat_cli.sandbox.limits import MIB
from nanochat_cli.sandbox.process import BLOCK, FIRST_UID
from nanochat_cli.sandbox.sandbox import Case, Limits, Outcome, Program, Sandbox

LIMITS = Limits(wall=1.5, cpu=1, memory=192 * MIB, file_size=MIB, disk=4 * MIB, files=200, processes=16, output=65536)
COMPILE = Limits(wall=5, cpu=4, memory=1536 * MIB, file_size=32 * MIB, disk=64 * MIB, processes=32, open_files=256)

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
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1).sendall(b'secret')\nprint('sent')\n",
    "connects to an abstract socket": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0nanochat-hostile-test')\nprint('sent')\n"
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
        "assert c.ptrace(16, os.getppid(), 0, 0) == 0, 'refused'\nprint('traced')\n"
    ),
    "zombie flood": "import os\nwhile True:\n    try:\n        if os.fork() == 0: os._exit(0)\n    except OSError: pass\n",
    "becomes root": "import os\nos.setuid(0)\nprint('root')\n",
    "mounts": (
        "import ctypes\nc = ctypes.CDLL(None)\nassert c.mount(b'none', b'/work', b'tmpfs', 0, None) == 0, 'refused'\nprint('mounted')\n"
    ),
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()\n",
    "makes a device": "import os, stat\nos.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0))\nprint('made')\n",
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
}
SECRET = "do-not-read-me"


@dataclass
class Aftermath:
    outcomes: dict[str, Outcome]
    folder: Path
    connections: list
    largest: int


def _watch(folder: Path, largest: list[int], stop: threading.Event) -> None:
    """Measure the most bytes that the folder holds, until told to stop."""
    while not stop.wait(0.02):
        size = 0
        for base, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):
                    size += (Path(base) / name).lstat().st_blocks * 512
        largest[0] = max(largest[0], size)


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
    folder = tmp_path_factory.mktemp("host")
    folder.chmod(0o755)
    (folder / "secret").write_text(SECRET)
    (folder / "temporary").mkdir()
    tempfile.tempdir = str(folder / "temporary")
    os.environ["NANOCHAT_SECRET"] = SECRET
    server = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0nanochat-hostile-test")
    abstract.listen()
    connections: list = []
    words = {"SECRET": str(folder / "secret"), "OUTSIDE": str(folder / "outside"), "HOME": str(Path.home())}
    words |= {"PORT": str(server.getsockname()[1]), "HOSTPID": str(os.getpid())}
    sandbox = Sandbox(LIMITS, COMPILE)

    def accept() -> None:
        while True:
            try:
                connections.append(server.accept())
            except OSError:
                return

    def run(item: tuple[str, str, str]) -> Outcome:
        language, _, source = item
        for word, value in words.items():
            source = source.replace(word, value) if not (word == "SECRET" and "NANOCHAT" in source) else source
        return sandbox.execute(language, source)

    threading.Thread(target=accept, daemon=True).start()
    items = [("python", name, source) for name, source in PYTHON.items()]
    if shutil.which("rustc"):
        items += [("rust", name, source) for name, source in RUST.items()]
    before = _children()
    stop = threading.Event()
    largest = [0]
    watcher = threading.Thread(target=_watch, args=(folder / "temporary", largest, stop))
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        outcomes = dict(zip([f"{language}: {name}" for language, name, _ in items], pool.map(run, items), strict=True))
    stop.set()
    watcher.join()
    tempfile.tempdir = None
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    abstract.close()
    del os.environ["NANOCHAT_SECRET"]
    result = Aftermath(outcomes, folder, connections, largest[0])
    assert _children() <= before
    return result


def test_isolation_is_named():
    isolation = Sandbox().isolation
    assert isolation.mode in ("namespaces", "bubblewrap", "limits")
    assert "resource limits" in isolation.description


EXPECTED = {
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
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_limit_ends_it(aftermath, name):
    if name not in aftermath.outcomes:
        pytest.skip("rustc is not installed")
    assert aftermath.outcomes[name].status in EXPECTED[name], aftermath.outcomes[name]


def test_everything_ends_in_time(aftermath):
    for name, outcome in aftermath.outcomes.items():
        compiling = COMPILE.wall if name.startswith("rust") else 0
        assert outcome.seconds < LIMITS.wall + compiling + 1, (name, outcome)


def test_no_secret_is_revealed(aftermath):
    for name, outcome in aftermath.outcomes.items():
        said = outcome.stdout + outcome.stderr + repr(outcome.diagnostics)
        assert SECRET not in said, name
        assert "root:x:0" not in said or Sandbox().isolation.mode == "limits", name


def test_nothing_outside_changes(aftermath):
    assert (aftermath.folder / "secret").read_text() == SECRET
    assert sorted(path.name for path in aftermath.folder.iterdir()) == ["secret", "temporary"]
    assert not Path("/usr/written").exists()


def test_nothing_reaches_the_network(aftermath):
    if Sandbox().isolation.mode == "limits":
        assert "use the network" in Sandbox().isolation.description
    else:
        assert aftermath.connections == []
        assert "sent" not in aftermath.outcomes["python: connects"].stdout
        assert "sent" not in aftermath.outcomes["python: connects to an abstract socket"].stdout


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
